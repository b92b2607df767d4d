"""Stage 3: slice a checkpoint by a plan, tensor by tensor; the model is never built."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flapcli.checkpoint.base import Checkpoint
from flapcli.checkpoint.write import plan_shards, retyped, write_shards
from flapcli.compensate import bias_correction
from flapcli.errors import FlapError
from flapcli.plan import Plan, check_belongs
from flapcli.progress import Progress
from flapcli.rundir import require_space
from flapcli.safetensors_io import TensorSpec
from flapcli.shape import MODULES, Module
from flapcli.stats import Stats

DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One source tensor's way into the pruned checkpoint: what it becomes, and how."""

    outputs: tuple[TensorSpec, ...]
    make: Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Cut:
    """One module of one layer: which channels of its output projection stay, which go."""

    module: Module
    kept_units: torch.Tensor
    kept: torch.Tensor
    pruned: torch.Tensor


def jobs(checkpoint: Checkpoint, plan: Plan, stats: Stats | None, mask_only: bool, dtype: str | None) -> list[Job]:
    """Everything that goes into the pruned checkpoint, in the source's order, decided from headers alone.

    `stats` given: biases compensate for the pruned channels' mean (else nothing does).
    Raises FlapError where plan, statistics and checkpoint do not fit.
    """
    shape = checkpoint.shape
    check_belongs(plan, shape, Path("plan"))
    bad = [spec for spec in checkpoint.tensors.values() if spec.dtype not in TORCH_DTYPES]
    if bad:
        raise FlapError(
            f"{checkpoint.name}: tensor {bad[0].name} is {bad[0].dtype}; flap slices F32, F16, BF16 and F64"
        )
    code = DTYPE_CODES[dtype] if dtype else None
    made: dict[str, Job] = {}
    done: set[str] = set()
    for layer in range(shape.num_layers):
        for module in MODULES:
            cut = _cut(checkpoint, plan, layer, module)
            for name, job in _module_jobs(checkpoint, layer, cut, stats, mask_only, code):
                made[name] = job
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


def _cut(checkpoint: Checkpoint, plan: Plan, layer: int, module: Module) -> Cut:
    units = torch.from_numpy(plan.kept(layer, module))
    channels = checkpoint.shape.units(layer, module) * checkpoint.shape.channels_per_unit(module)
    kept = _rows_of(units, checkpoint.shape.channels_per_unit(module))
    stays = torch.zeros(channels, dtype=torch.bool)
    stays[kept] = True
    return Cut(module, units, kept, torch.nonzero(~stays).flatten())


def _rows_of(units: torch.Tensor, rows_per_unit: int) -> torch.Tensor:
    """Row (or column) indices that belong to units, ascending."""
    return (units[:, None] * rows_per_unit + torch.arange(rows_per_unit)).flatten()


def _module_jobs(
    checkpoint: Checkpoint, layer: int, cut: Cut, stats: Stats | None, mask_only: bool, code: str | None
) -> Iterator[tuple[str, Job]]:
    """Jobs of a module's projections, each under the source tensor whose place it takes."""
    shape, tensors = checkpoint.shape, checkpoint.tensors
    prefix = checkpoint.family.layer.format(i=layer)
    description = checkpoint.family.module(cut.module)
    emptied = len(cut.kept) == 0 and not mask_only
    for producer, size in description.producers.items():
        per_unit = shape.channels_per_unit(cut.module) if size != "num_key_value_heads" else shape.head_dim
        rows = _rows_of(cut.kept_units, per_unit)
        for suffix in ("weight", "bias"):
            name = f"{prefix}.{producer}.{suffix}"
            if name in tensors and not emptied:
                yield name, _slice(checkpoint, retyped(tensors[name], code), rows, 0, mask_only)
    weight = f"{prefix}.{description.output}.weight"
    bias = f"{prefix}.{description.output}.bias"
    source = tensors.get(weight)
    if source is not None and not emptied:
        yield weight, _slice(checkpoint, retyped(source, code), cut.kept, 1, mask_only)
    if stats is not None or bias in tensors:
        like = source or tensors.get(bias) or next(iter(tensors.values()))
        spec = TensorSpec(bias, (shape.hidden_size,), code or like.dtype)
        yield bias, _bias(checkpoint, spec, weight, layer, cut, stats)


def _slice(checkpoint: Checkpoint, spec: TensorSpec, kept: torch.Tensor, axis: int, mask_only: bool) -> Job:
    """Keep some rows (axis 0) or columns (axis 1); masked, the others become zeros in place."""
    if mask_only:

        def mask() -> tuple[torch.Tensor, ...]:
            tensor = checkpoint.read(spec.name)
            masked = torch.zeros_like(tensor)
            return (masked.index_copy_(axis, kept, tensor.index_select(axis, kept)),)

        return Job((spec,), mask)
    sizes = tuple(len(kept) if i == axis else size for i, size in enumerate(spec.shape))
    return Job((replace(spec, shape=sizes),), lambda: (checkpoint.read(spec.name).index_select(axis, kept),))


def _bias(checkpoint: Checkpoint, spec: TensorSpec, weight: str, layer: int, cut: Cut, stats: Stats | None) -> Job:
    """The output projection's bias: what the model had, and what the pruned channels add on average."""

    def make() -> tuple[torch.Tensor, ...]:
        bias = torch.zeros(spec.shape, dtype=torch.float64)
        if spec.name in checkpoint.tensors:
            bias += checkpoint.read(spec.name)
        if stats is not None and len(cut.pruned):
            mean = torch.from_numpy(stats.modules[layer, cut.module].mean)
            bias += bias_correction(checkpoint.read(weight), cut.pruned, mean)
        return (bias,)

    return Job((spec,), make)


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
