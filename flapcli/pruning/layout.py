"""What a pruned checkpoint will be, decided from headers alone: nothing is read, and nothing is renamed afterwards.

Which layers are written and under which index, every module's sizes, which biases there are, stock or not, the dtype,
and for every tensor its final name, shape and dtype and how it is made. `slicing` then makes them in one pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from flapcli.architecture.family import renamed
from flapcli.architecture.rows import RowMap
from flapcli.architecture.shape import LayerShape, Module
from flapcli.artifacts.plan import Plan
from flapcli.artifacts.plan_of_model import pruned_layers
from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.settings import ApplyOptions
from flapcli.pruning.cut import ModuleCut, cut_of, sliced_though_masked
from flapcli.pruning.kept_layers import KeptLayers, kept_layers_of
from flapcli.pruning.stock_form import StockForm, stock_form_of
from flapcli.storage.dtypes import CODES, SLICED
from flapcli.storage.safetensors_file import TensorSpec


@dataclass(frozen=True)
class Copy:
    """A tensor as it is in the source, but for its name and dtype."""

    spec: TensorSpec
    source: str


@dataclass(frozen=True)
class Rows:
    """Some rows of a source tensor: of a projection that produces the channels, of its bias, or of a unit tensor.

    `axis` is where its rows lie.
    """

    spec: TensorSpec
    source: str
    rows: torch.Tensor
    axis: int


@dataclass(frozen=True)
class ExpertRows:
    """Some experts of a source tensor of all of them, and of each some rows, (experts, rows), at `axis` of an expert's.

    `files` are what is written where they are stored one by one, expert by expert, in parts of equally many rows.
    """

    spec: TensorSpec
    files: tuple[TensorSpec, ...]
    source: str
    experts: list[int]
    rows: torch.Tensor
    axis: int


@dataclass(frozen=True)
class Output:
    """The columns of an output projection that are kept, and its bias: made together, since a fit decides both.

    None where the pruned checkpoint has none. `transposed`: the weight is written (channels, out). `files` as
    in `ExpertRows`.
    """

    weight: TensorSpec
    bias: TensorSpec | None
    cut: ModuleCut
    transposed: bool
    files: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class Zeros:
    """A bias that only a stock configuration asks for."""

    spec: TensorSpec


Step = Copy | Rows | ExpertRows | Output | Zeros


def specs_of(step: Step) -> list[TensorSpec]:
    """The tensors that a step makes, in the order they are written."""
    if isinstance(step, ExpertRows | Output) and step.files:
        return list(step.files)
    if isinstance(step, Output):
        return [spec for spec in (step.weight, step.bias) if spec]
    return [step.spec]


@dataclass(frozen=True)
class Layout:
    """The decisions. `sizes` are those of the written layers; `dtype` the code of what matrices are written in.

    `masked`: zeros in place and shapes unchanged, so that steps keep the source's shapes, but for the module `sliced`.
    `stock` None: the folder needs modeling_flap.py, for the reason `why`.
    """

    checkpoint: Checkpoint
    plan: Plan
    masked: bool
    sliced: tuple[int, Module] | None
    adds_bias: bool
    layers: KeptLayers
    sizes: tuple[LayerShape, ...]
    dtype: str
    stock: StockForm | None
    why: str
    steps: tuple[Step, ...]

    def masks(self, layer: int, module: Module) -> bool:
        """Whether what a module of the source loses is zeros in place."""
        return self.masked and (layer, module) != self.sliced

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor of the pruned checkpoint, in the order they are written."""
        return [spec for step in self.steps for spec in specs_of(step)]

    def output_dtype(self, layer: int, module: Module) -> str:
        """The code of what a module's output projection is written in; the layout's where nothing of it is written."""
        for step in self.steps:
            if isinstance(step, Output) and (step.cut.layer, step.cut.module) == (layer, module):
                return specs_of(step)[0].dtype
        return self.dtype

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def layout_of(checkpoint: Checkpoint, plan: Plan, options: ApplyOptions, adds_bias: bool) -> Layout:
    """Decide everything about the pruned checkpoint. The plan belongs to the checkpoint (`check_belongs`).

    `options.dtype` None keeps every tensor's own. Raises FlapError for weights that can't be sliced.
    """
    _refuse_dtypes(checkpoint)
    _refuse_masked_experts(checkpoint, plan, options)
    masked = options.mask_only
    layers = kept_layers_of(checkpoint, plan, adds_bias, masked)
    every = checkpoint.shape.layers if masked else pruned_layers(plan, checkpoint.shape)
    sizes = tuple(every[i] for i in layers.source_indices)
    asked = CODES[options.dtype] if options.dtype else None
    dtype = asked or _stored_dtype(checkpoint)
    stock, why = None, ""
    if options.remote_code == "auto":
        stock, why = stock_form_of(checkpoint, sizes, layers, adds_bias)
    sliced = sliced_though_masked(checkpoint, plan, adds_bias) if masked and not stock else None
    if sliced:
        cut = checkpoint.shape.written(*sliced, plan.kept(*sliced))
        own = sizes[sliced[0]]._replace(**checkpoint.shape.sizes_of(*sliced, cut))
        sizes = (*sizes[: sliced[0]], own, *sizes[sliced[0] + 1 :])
    steps = _Steps(checkpoint, plan, masked, sliced, adds_bias, layers, asked, dtype, stock is not None)
    biases = stock.zero_biases if stock else {}
    zeros = (Zeros(TensorSpec(steps.name_in_files(name), shape, dtype)) for name, shape in biases.items())
    in_order = (*steps.in_order(), *zeros, *steps.carried())
    return Layout(checkpoint, plan, masked, sliced, adds_bias, layers, sizes, dtype, stock, why, in_order)


def _refuse_dtypes(checkpoint: Checkpoint) -> None:
    for spec in checkpoint.tensors.values():
        if spec.dtype not in SLICED:
            raise FlapError(f"{checkpoint.name}: tensor {spec.name} is {spec.dtype}; flap slices {', '.join(SLICED)}")


def _refuse_masked_experts(checkpoint: Checkpoint, plan: Plan, options: ApplyOptions) -> None:
    """Raise FlapError where experts go, to which the router would go on to send tokens."""
    for layer, sizes in enumerate(checkpoint.shape.layers if options.mask_only else ()):
        kept = checkpoint.shape.sizes_of(layer, "experts", plan.kept(layer, "experts"))["num_experts"]
        if 0 < kept < sizes.num_experts:
            raise FlapError(f"--mask-only zeroes neurons, and the plan drops experts of layer {layer}: leave it out")


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The embedding's, which every checkpoint has and pruning leaves whole; else that of the first matrix."""
    embedding = checkpoint.tensors.get(f"{checkpoint.family.outside_layers[0]}.weight")
    return (embedding or next(s for s in checkpoint.tensors.values() if len(s.shape) == 2)).dtype


@dataclass(frozen=True)
class _Steps:
    """Makes the list of steps; `asked` is the code of --dtype, None where every tensor keeps its own; `sliced` is the
    module that is cut though others are masked."""

    checkpoint: Checkpoint
    plan: Plan
    masked: bool
    sliced: tuple[int, Module] | None
    adds_bias: bool
    layers: KeptLayers
    asked: str | None
    dtype: str
    is_stock: bool

    def in_order(self) -> Iterator[Step]:
        """Steps in the order of the source's tensors; biases of modules that have no tensor there come last."""
        special: dict[str, Step] = {}
        skipped: set[str] = set()
        for layer in self.layers.source_indices:
            for module in self.checkpoint.family.modules:
                masked = self.masked and (layer, module) != self.sliced
                cut = cut_of(self.checkpoint, self.plan, layer, module, masked)
                special |= self._producers(cut) | self._output(cut)
                skipped |= self._replaced(cut)
        for name, spec in self.checkpoint.tensors.items():
            if name in special:
                yield special.pop(name)
            elif name not in skipped and self._final_name(name) is not None:
                yield Copy(self._written(name, spec.shape, spec.dtype), name)
        yield from special.values()

    def _producers(self, cut: ModuleCut) -> dict[str, Step]:
        """Rows of the projections that produce the channels, and their biases' entries."""
        family, found = self.checkpoint.family, dict[str, Step]()
        if cut.columns == 0:
            return found
        prefix, producers = family.layer.format(i=cut.layer), family.module(cut.module).producers
        of_experts = family.module(cut.module).of_experts
        for local, row_map in self.checkpoint.rows(cut.module).items():
            if of_experts and local in producers:
                found |= self._expert_rows(cut, local, row_map)
                continue
            rows = torch.from_numpy(row_map.indices(cut.stays))
            for name in [f"{local}.weight", f"{local}.bias"] if local in producers else [local]:
                if spec := self.checkpoint.tensors.get(f"{prefix}.{name}"):
                    axis = len(spec.shape) - 1 if family.transposed and local in producers else 0
                    after = list(spec.shape)
                    after[axis] = spec.shape[axis] if cut.is_whole else len(rows)
                    found[spec.name] = Rows(self._written(spec.name, tuple(after), spec.dtype), spec.name, rows, axis)
        return found

    def _expert_rows(self, cut: ModuleCut, local: str, row_map: RowMap) -> dict[str, Step]:
        """A producing projection of all experts, and its bias."""
        description, found = self.checkpoint.family.module(cut.module), dict[str, Step]()
        prefix = f"{self.checkpoint.family.layer.format(i=cut.layer)}."
        size = len(cut.stays["expert_size"]) // len(cut.stays["num_experts"])
        of_each = cut.stays["expert_size"].reshape(-1, size)
        kept = [expert for expert, _, _ in cut.experts]
        rows = torch.tensor(np.array([row_map.indices({"expert_size": of_each[expert]}) for expert in kept]))
        for name, axis in (
            (description.weight(local), -1 if description.transposed else 0),
            (description.bias(local), 0),
        ):
            if spec := self.checkpoint.tensors.get(prefix + name):
                found[spec.name] = self._of_experts(spec, kept, rows, axis, len(row_map.blocks))
        return found

    def _of_experts(self, spec: TensorSpec, kept: list[int], rows: torch.Tensor, axis: int, parts: int) -> ExpertRows:
        after = [len(kept), *spec.shape[1:]]
        after[axis % (len(after) - 1) + 1] = spec.shape[axis % (len(after) - 1) + 1] if self.masked else rows.shape[1]
        written = self._written(spec.name, tuple(after), spec.dtype)
        return ExpertRows(written, self._files(spec, written, parts), spec.name, kept, rows, axis)

    def _files(self, source: TensorSpec, written: TensorSpec, parts: int) -> tuple[TensorSpec, ...]:
        """What a stock folder holds for a tensor of all experts where the source's hold it expert by expert."""
        known = self.checkpoint.experts_in_files.get(str(self._final_name(source.name))) if self.is_stock else None
        experts, rows, columns = written.shape if known else (0, 0, 0)
        return tuple(
            TensorSpec(name, (rows // parts, columns), written.dtype)
            for names in (known or [])[:experts]
            for name in names
        )

    def _output_of_experts(self, cut: ModuleCut) -> dict[str, Step]:
        """The output projection of the experts that stay, each one's kept columns, and their biases as they are."""
        description, shape = self.checkpoint.family.module(cut.module), self.checkpoint.shape
        kept, prefix = [expert for expert, _, _ in cut.experts], f"{self.checkpoint.family.layer.format(i=cut.layer)}."
        if not (source := self.checkpoint.tensors.get(prefix + description.weight(description.output))) or not kept:
            return {}
        columns = source.shape[1 if description.transposed else 2] if self.masked else len(cut.kept) // len(kept)
        sizes = (shape.hidden_size, columns)[:: -1 if description.transposed else 1]
        weight = self._written(source.name, (len(kept), *sizes), source.dtype)
        found: dict[str, Step] = {
            source.name: Output(weight, None, cut, description.transposed, self._files(source, weight, 1))
        }
        if bias := self.checkpoint.tensors.get(prefix + description.bias(description.output)):
            every = torch.arange(shape.hidden_size).expand(len(kept), -1)
            found[bias.name] = self._of_experts(bias, kept, every, 0, 1)
        return found

    def _output(self, cut: ModuleCut) -> dict[str, Step]:
        """The output projection and its bias."""
        if self.checkpoint.lacks(cut.layer, cut.module):
            return {}
        if self.checkpoint.family.module(cut.module).of_experts:
            return self._output_of_experts(cut)
        prefix = self.checkpoint.family.output(cut.layer, cut.module)
        weight_name, bias_name = f"{prefix}.weight", f"{prefix}.bias"
        source, hidden_size = self.checkpoint.tensors[weight_name], self.checkpoint.shape.hidden_size
        transposed, own_bias = self.checkpoint.family.transposed, self.checkpoint.tensors.get(bias_name)
        shape, bias = (hidden_size, cut.columns)[:: -1 if transposed else 1], None
        if self.adds_bias or own_bias:
            bias = self._written(bias_name, (hidden_size,), (own_bias or source).dtype)
        return {weight_name: Output(self._written(weight_name, shape, source.dtype), bias, cut, transposed)}

    def _replaced(self, cut: ModuleCut) -> set[str]:
        """Tensors of a module that have steps of their own."""
        family = self.checkpoint.family
        prefix, description = family.layer.format(i=cut.layer), family.module(cut.module)
        parts = [description.output, *description.producers]
        found = {f"{prefix}.{name(part)}" for part in parts for name in (description.weight, description.bias)}
        if len(cut.kept) or not description.of_experts:  # the router of none goes on
            found |= {f"{prefix}.{name}" for name in description.unit_tensors}
        return found

    def _final_name(self, name: str) -> str | None:
        """A source tensor's name in the pruned checkpoint; None where its layer is dropped."""
        before, after = self.checkpoint.family.layer.split("{i}")
        index, dot, local = name.removeprefix(before).partition(f"{after}.")
        if not (name.startswith(before) and dot and index.isdigit()):
            return name
        place = self.layers.written_index.get(int(index))
        return None if place is None else f"{before}{place}{after}.{local}"

    def _written(self, name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
        """A tensor of a layer that is written, under its name in the source, as the pruned checkpoint has it.

        A stock folder's files go on calling it as the source's call the one, or its like, of the layer whose index it
        takes; others have the model's own names, or those of the class that it is a part of.
        """
        return TensorSpec(self.name_in_files(str(self._final_name(name))), shape, self.asked or dtype)

    def name_in_files(self, final: str) -> str:
        """What the pruned checkpoint's files call a tensor of its model."""
        if not self.is_stock:
            return renamed(final, wrapper.text_in_class) if (wrapper := self.checkpoint.wrapper) else final
        known = self.checkpoint.name_in_files
        if final not in known:  # a bias that is added
            owner, _, leaf = final.rpartition(".")
            stored = known.get(f"{owner}.weight", "")
            final = stored.removesuffix("weight") + leaf if stored.endswith(".weight") else final
        return known.get(final, final)

    def carried(self) -> Iterator[Step]:
        """Tensors of other parts than the model, which are as they were but for a --dtype."""
        wrapper = None if self.is_stock else self.checkpoint.wrapper
        for name, spec in self.checkpoint.carried.items():
            dtype = self.asked if self.asked and spec.dtype in SLICED else spec.dtype
            final = renamed(name, wrapper.others_in_class) if wrapper else name
            yield Copy(TensorSpec(final, spec.shape, dtype), name)
