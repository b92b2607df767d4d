"""Stage 3: slice a checkpoint by a plan, tensor by tensor; the model is never built."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flapcli.checkpoint.base import Checkpoint
from flapcli.checkpoint.write import plan_shards, retyped, write_shards
from flapcli.compensation import Compensation, Cut, cut_of, rows_of, scatter
from flapcli.device import TORCH_DTYPES
from flapcli.errors import FlapError
from flapcli.plan import Plan
from flapcli.progress import Progress
from flapcli.rundir import require_space
from flapcli.safetensors_io import DTYPE_CODES, TensorSpec
from flapcli.shape import MODULES, Module


@dataclass(frozen=True)
class Job:
    """One source tensor's way into the pruned checkpoint: what it becomes, and how."""

    outputs: tuple[TensorSpec, ...]
    make: Callable[[], tuple[torch.Tensor, ...]]


def jobs(
    checkpoint: Checkpoint, plan: Plan, compensation: Compensation, mask_only: bool, dtype: str | None
) -> list[Job]:
    """Everything that goes into the pruned checkpoint, in the source's order, decided from headers alone.

    The plan belongs to the checkpoint (`check_belongs`). Raises FlapError for weights that can't be sliced.
    """
    shape = checkpoint.shape
    bad = [spec for spec in checkpoint.tensors.values() if spec.dtype not in TORCH_DTYPES]
    if bad:
        kinds = ", ".join(TORCH_DTYPES)
        raise FlapError(f"{checkpoint.name}: tensor {bad[0].name} is {bad[0].dtype}; flap slices {kinds}")
    code = DTYPE_CODES[dtype] if dtype else None
    made: dict[str, Job] = {}
    done: set[str] = set()
    for layer in range(shape.num_layers):
        for module in MODULES:
            cut = cut_of(checkpoint, plan, layer, module)
            made |= _producer_jobs(checkpoint, cut, mask_only, code)
            made |= _output_job(checkpoint, cut, compensation, mask_only, code)
            done |= _module_tensors(checkpoint, layer, module)
        if not mask_only:
            done |= _orphans(checkpoint, plan, layer)
    ordered = []
    for name, spec in checkpoint.tensors.items():
        if name in made:
            ordered.append(made.pop(name))
        elif name not in done:
            ordered.append(_copy(checkpoint, retyped(spec, code)))
    return ordered + list(made.values())


def zeros(specs: list[TensorSpec]) -> list[Job]:
    """Tensors of zeros, which a stock configuration asks for."""
    return [Job((spec,), lambda spec=spec: (torch.zeros(spec.shape),)) for spec in specs]  # type: ignore[misc]


def write(folder: Path, work: list[Job], max_shard_size: int, progress: Progress) -> None:
    """Carry the jobs out into shards of `folder`, one tensor in memory at a time."""
    specs = [spec for job in work for spec in job.outputs]
    shards = plan_shards(specs, max_shard_size)
    total = sum(spec.nbytes for spec in specs)
    require_space(folder, total)
    with torch.inference_mode(), progress.task("apply", total, "bytes") as advance:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for job in work:
                for spec, tensor in zip(job.outputs, job.make(), strict=True):
                    yield spec.name, tensor.to(TORCH_DTYPES[spec.dtype])
                    advance(spec.nbytes)

        write_shards(folder, shards, tensors())


def _producer_jobs(checkpoint: Checkpoint, cut: Cut, mask_only: bool, code: str | None) -> dict[str, Job]:
    """Rows of the projections that produce the channels, and their biases' entries."""
    shape, found = checkpoint.shape, {}
    if len(cut.kept) == 0 and not mask_only:
        return {}
    for producer, size in checkpoint.family.module(cut.module).producers.items():
        per_unit = shape.head_dim if size == "num_key_value_heads" else shape.channels_per_unit(cut.module)
        rows = rows_of(cut.kept_units, per_unit)
        for suffix in ("weight", "bias"):
            name = f"{checkpoint.family.layer.format(i=cut.layer)}.{producer}.{suffix}"
            if name in checkpoint.tensors:
                found[name] = _rows(checkpoint, retyped(checkpoint.tensors[name], code), rows, mask_only)
    return found


def _rows(checkpoint: Checkpoint, spec: TensorSpec, kept: torch.Tensor, mask_only: bool) -> Job:
    """Keep some rows; masked, the others become zeros in place."""
    if mask_only:
        return Job((spec,), lambda: (scatter(checkpoint.read(spec.name)[kept], kept, 0, spec.shape),))
    sliced = replace(spec, shape=(len(kept), *spec.shape[1:]))
    return Job((sliced,), lambda: (checkpoint.read(spec.name)[kept],))


def _output_job(
    checkpoint: Checkpoint, cut: Cut, compensation: Compensation, mask_only: bool, code: str | None
) -> dict[str, Job]:
    """Columns of the output projection and its bias, made together since compensation decides both."""
    output = checkpoint.family.output(cut.layer, cut.module)
    weight, bias = f"{output}.weight", f"{output}.bias"
    source, had_bias = checkpoint.tensors.get(weight), bias in checkpoint.tensors
    hidden_size = checkpoint.shape.hidden_size
    like = source or next(iter(checkpoint.tensors.values()))
    specs = []
    if source is not None and (len(cut.kept) or mask_only):
        columns = source.shape[1] if mask_only else len(cut.kept)
        specs.append(retyped(replace(source, shape=(hidden_size, columns)), code))
    if had_bias or compensation.adds_bias:
        specs.append(TensorSpec(bias, (hidden_size,), code or like.dtype))

    def make() -> tuple[torch.Tensor, ...]:
        values = {bias: torch.zeros(hidden_size, dtype=torch.float64)}
        if had_bias:
            values[bias] += checkpoint.read(bias)
        fit = compensation.fit(checkpoint.read(weight) if source else None, cut)
        if source is not None:
            values[weight] = scatter(fit.weight, cut.kept, 1, source.shape) if mask_only else fit.weight
        if fit.bias is not None:
            values[bias] += fit.bias
        return tuple(values[spec.name] for spec in specs)

    return {specs[0].name: Job(tuple(specs), make)} if specs else {}


def _copy(checkpoint: Checkpoint, spec: TensorSpec) -> Job:
    return Job((spec,), lambda: (checkpoint.read(spec.name),))


def _module_tensors(checkpoint: Checkpoint, layer: int, module: Module) -> set[str]:
    """All tensors of a module's projections, which jobs of their own take care of."""
    description = checkpoint.family.module(module)
    prefix = checkpoint.family.layer.format(i=layer)
    parts = [description.output, *description.producers]
    return {f"{prefix}.{part}.{suffix}" for part in parts for suffix in ("weight", "bias")}


def _orphans(checkpoint: Checkpoint, plan: Plan, layer: int) -> set[str]:
    """Other tensors inside a module that the plan empties, such as norms of queries and keys."""
    prefix = checkpoint.family.layer.format(i=layer)
    emptied = [checkpoint.family.module(m).output.rpartition(".")[0] for m in MODULES if len(plan.kept(layer, m)) == 0]
    return {n for n in checkpoint.tensors if any(n.startswith(f"{prefix}.{parent}.") for parent in emptied)}
