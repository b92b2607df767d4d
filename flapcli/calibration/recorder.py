"""What both ways of calibrating share: hooks that gather moments, and the statistics made of them."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

from flapcli.architecture.shape import Module
from flapcli.artifacts.stats import ExpertStats, Influence, ModuleStats
from flapcli.artifacts.stats_writer import LayerStats
from flapcli.calibration.block_influence import observe_layer
from flapcli.calibration.fisher import gate_gradients
from flapcli.calibration.moments import Moments, batch_sums
from flapcli.calibration.routed import show_experts
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.checkpoints.column_norms import ColumnNorms
from flapcli.errors import FlapError
from flapcli.execution.memory import on_host
from flapcli.execution.ranks import Ranks

# Of a layer's modules, of experts one by one as in `experts.0`; of its residual stream, whose channels are the numbers
# of `Influence`; of an expert's saliency, as `experts.0.output`; or of the gates on a module's units, as `mlp.fisher`,
# whose channels are their gradients.
Key = tuple[int, str]
GATES = ".fisher"
AT_ONCE = {"cpu": 1}  # batches that are taken in at once, else 8: each time, a GPU waits until all is computed


class NotFiniteError(FlapError):
    """Activations that are NaN or infinite: trying again gives the same."""


class Recorder:
    """Hooks on the inputs of a decoder's output projections, which gather moments (and Gram sums), and on its layers.

    With `fisher`, backward passes gather the moments of gates' gradients once `keep_gates_only` is called, from where
    on nothing else is recorded. A batch, which `begin` names, counts only once `commit` is called. Gram sums alone have
    it at once, since a second copy of them all would be the peak of memory: those that a batch reached before it failed
    pass over its windows when they come again. What was taken out is recorded no more.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: torch.nn.Module, gram: bool, device: torch.device, fisher: bool = False
    ) -> None:
        self.gram, self.device, self.fisher, self.gates_only = gram, device, fisher, False
        self.moments: dict[Key, Moments] = {}
        self.grams: dict[Key, torch.Tensor] = {}
        self._batch: dict[Key, tuple[int, torch.Tensor]] = {}  # tokens and their sums
        self._pending: list[dict[Key, tuple[int, torch.Tensor]]] = []  # batches that count, but are not taken in yet
        self._summed: dict[Key, int] = {}  # windows that a Gram sum has
        self._stop = 0
        self._handles: list[RemovableHandle] = []
        shape, family = checkpoint.shape, checkpoint.family
        self.modules, self.experts = shape.modules, [layer.num_experts for layer in shape.layers]
        for layer in range(shape.num_layers):
            block = model.get_submodule(family.layer.format(i=layer))
            self.moments[layer, "residual"] = Moments.none(len(Influence._fields))
            self._handles += observe_layer(block, family, partial(self._sum, (layer, "residual")))
            for module in (m for m in shape.modules if m != "experts"):
                channels = shape.channels(layer, module)
                self._expect((layer, module), channels, shape.units(layer, module))
                if channels:
                    record = partial(self._record_input, (layer, module), shape.channels_per_unit(module))
                    model.get_submodule(family.output(layer, module)).register_forward_pre_hook(record)
            for expert in range(shape.layers[layer].num_experts):
                self._expect((layer, f"experts.{expert}"), shape.layers[layer].expert_size)
                self.moments[layer, f"experts.{expert}.output"] = Moments.none(1)
            if shape.layers[layer].num_experts:
                path = family.output(layer, "experts").rpartition(".")[0]
                show_experts(model.get_submodule(path), partial(self._record_expert, layer))

    def _expect(self, key: Key, channels: int, units: int | None = None) -> None:
        self.moments[key] = Moments.none(channels)
        if self.fisher:
            self.moments[key[0], key[1] + GATES] = Moments.none(channels if units is None else units)

    def _record_input(self, key: Key, channels: int, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._record(key, inputs[0], inputs[0], channels)

    def _record_expert(
        self, layer: int, expert: int, x: torch.Tensor, share: torch.Tensor, output: torch.Tensor
    ) -> None:
        """An expert's channels weighed as the router weighs what comes out, and by how much that moves the stream."""
        key: Key = (layer, f"experts.{expert}")
        with torch.no_grad():
            if not self.gates_only:
                self._sum((key[0], f"{key[1]}.output"), share.float() * output.float().norm(dim=-1, keepdim=True))
            weighed = x * share
        self._record(key, weighed, x, 1)

    @torch.no_grad()
    def _record(self, key: Key, values: torch.Tensor, x: torch.Tensor, channels: int) -> None:
        """Take in what goes into an output projection, of whose units each has so many channels, `x` in the graph."""
        if self.gates_only:
            if x.requires_grad:
                gate, found = (key[0], key[1] + GATES), x.detach()
                x.register_hook(lambda gradient: self._sum(gate, gate_gradients(found, gradient, channels)))
            return
        values = values.detach().reshape(-1, values.shape[-1])
        self._sum(key, values)
        if self.gram and key in self.moments and self._summed.get(key, 0) < self._stop:
            self._add_product(key, values.float())

    def _add_product(self, key: Key, x: torch.Tensor) -> None:
        total = self.grams.get(key)
        self.grams[key] = x.T @ x if total is None else total.to(x.device).addmm_(x.T, x)
        self._summed[key] = self._stop

    def begin(self, windows: slice) -> None:
        """Of the batch that comes: its windows. One that failed half-way is forgotten."""
        self._batch = {}
        self._stop = windows.stop

    def keep_gates_only(self) -> None:
        """Record nothing but gates from here on; what was recorded stays."""
        self.gates_only = True
        for handle in self._handles:
            handle.remove()

    def _sum(self, key: Key, values: torch.Tensor) -> None:
        if key not in self.moments:
            return
        self._batch[key] = len(values), batch_sums(values)

    def commit(self) -> None:
        """Count the last batch. Raises as `settle`, which is called now and then."""
        self._pending.append(self._batch)
        self._batch = {}
        if len(self._pending) >= AT_ONCE.get(self.device.type, 8):
            self.settle()

    def settle(self) -> None:
        """Take in the batches that count. Raises NotFiniteError naming the first layer with such activations.

        What all modules share is done for their channels side by side: small operations for each would cost more than
        the sums, and a copy from a GPU for each more still.
        """
        pending = [(key, *found) for batch in self._pending for key, found in batch.items()]
        self._pending.clear()
        if not pending:
            return
        keys, counts, sums = zip(*pending, strict=True)
        channels = [part.shape[1] for part in sums]
        parts = torch.cat([part.to(self.device) for part in sums], dim=1).cpu().split(channels, dim=1)
        for (layer, module), part in zip(keys, parts, strict=True):
            if not torch.isfinite(part).all():
                kind = "gradients" if module.endswith(GATES) else "activations"
                raise NotFiniteError(
                    f"{kind} of layer {layer}, {module.partition('.')[0]} are NaN or infinite: "
                    "try --dtype float32 or bfloat16, and check that the checkpoint's weights are finite"
                )
        for key, moments in zip(keys, Moments.side_by_side(list(zip(counts, parts, strict=True))), strict=True):
            self.moments[key].merge(moments)

    def take(self, key: Key) -> tuple[Moments, torch.Tensor | None]:
        """A module's moments and Gram sum (None where none is kept), which leave the recorder."""
        self.settle()
        moments = self.moments.pop(key)
        if not self.gram or not len(moments.mean) or key[1].endswith((GATES, "residual", "output")):
            return moments, None
        total = self.grams.pop(key, None)
        return moments, torch.zeros(2 * moments.mean.shape, device=self.device) if total is None else total


def layer_stats_of(
    recorder: Recorder, layer: int, norms: Mapping[Module, ColumnNorms | None], ranks: Ranks
) -> LayerStats:
    """All but a layer's Fisher information, over all ranks, which leaves the recorder; of use on rank 0 alone."""
    influence = Influence(*recorder.take((layer, "residual"))[0].over(ranks).mean.float().tolist())
    modules: dict[Module, ModuleStats] = {}
    grams = {}
    for module in recorder.modules:
        if module == "experts":
            modules[module], total = _expert_stats(recorder, layer, norms[module], ranks)
        else:
            moments, total = _taken(recorder, (layer, module), ranks)
            modules[module] = _module_stats(moments, norms[module])
        if total is not None:
            grams[module] = total
    return LayerStats(influence, modules, grams)


def _taken(recorder: Recorder, key: Key, ranks: Ranks) -> tuple[Moments, NDArray[np.float32] | None]:
    mine, total = recorder.take(key)
    moments = mine.over(ranks)
    return moments, None if total is None else on_host(ranks.summed(total).div_(max(moments.count, 1))).numpy()


def _expert_stats(
    recorder: Recorder, layer: int, norms: ColumnNorms | None, ranks: Ranks
) -> tuple[ExpertStats, NDArray[np.float32] | None]:
    """All experts' channels side by side, and their Gram matrices in a stack."""
    keys = [(layer, f"experts.{expert}") for expert in range(recorder.experts[layer])]
    found = [_taken(recorder, key, ranks) for key in keys]
    outputs = [_taken(recorder, (layer, f"{key}.output"), ranks)[0] for _, key in keys]
    empty = torch.zeros(0)
    mean, variance, square_mean = (
        torch.cat([empty, *(getattr(moments, field).float() for moments, _ in found)]).numpy()
        for field in ("mean", "variance", "square_mean")
    )
    counts = np.array([moments.count for moments, _ in found], np.float32)
    saliency = torch.cat([empty, *(moments.mean.float() for moments in outputs)]).numpy()
    squares, magnitudes = (empty.numpy(),) * 2 if norms is None else (norms.square_sum, norms.abs_mean)
    stats = ExpertStats(mean, variance, square_mean, squares, magnitudes, counts, saliency)
    grams = [gram for _, gram in found if gram is not None]
    return stats, np.stack(grams) if grams else None


def _module_stats(moments: Moments, norms: ColumnNorms | None) -> ModuleStats:
    """Moments as float32 vectors, the norms of the output projection's columns beside them."""
    if norms is None:
        return ModuleStats(*(np.zeros(0, np.float32) for _ in range(5)))
    vectors = (moments.mean, moments.variance, moments.square_mean)
    mean, variance, square_mean = (values.float().numpy() for values in vectors)
    return ModuleStats(mean, variance, square_mean, norms.square_sum, norms.abs_mean)


def fisher_of(recorder: Recorder, layer: int, ranks: Ranks) -> dict[Module, NDArray[np.float32]]:
    """Fisher information of a layer's units over all ranks, float32 (units,); of use on rank 0 alone."""
    found: dict[Module, NDArray[np.float32]] = {}
    for module in recorder.modules:
        names = [f"experts.{i}" for i in range(recorder.experts[layer])] if module == "experts" else [module]
        gates = [recorder.take((layer, name + GATES))[0].over(ranks).square_mean.float() for name in names]
        found[module] = torch.cat([torch.zeros(0), *gates]).numpy()
    return found
