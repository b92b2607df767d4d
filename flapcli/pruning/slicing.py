"""Makes the tensors of a pruned checkpoint as its layout says, one at a time; the model is never built."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flapcli.architecture.shape import Module
from flapcli.checkpoints.shards import plan_shards, write_shards
from flapcli.errors import FlapError
from flapcli.progress import Progress
from flapcli.pruning.compensation import Compensation
from flapcli.pruning.cut import read_output, scatter
from flapcli.pruning.layout import Copy, ExpertRows, Layout, Output, Rows, Step, Zeros, specs_of
from flapcli.storage.atomic import require_space
from flapcli.storage.dtypes import dtype_name, torch_dtype
from flapcli.storage.safetensors_file import TensorSpec


@dataclass
class FitReport:
    """What least squares said of each module: `Fit.before` and `after`, and the ridge where it had to grow."""

    errors: dict[tuple[int, Module], tuple[float, float]] = field(default_factory=dict)
    raised: dict[tuple[int, Module], float] = field(default_factory=dict)


def write_tensors(
    folder: Path, layout: Layout, compensation: Compensation, shard_size: int, progress: Progress
) -> FitReport:
    """Make every tensor of the layout, in shards of `folder`, one in memory at a time."""
    report, total = FitReport(), layout.nbytes
    require_space(folder, total)
    with torch.inference_mode(), progress.task("apply", total, "bytes") as advance:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for step in layout.steps:
                made = make(step, layout, compensation, report)
                for spec, tensor in zip(specs_of(step), made, strict=True):
                    yield spec.name, _as_written(tensor, spec)
                    advance(spec.nbytes)

        write_shards(folder, plan_shards(layout.specs, shard_size), tensors())
    return report


def _as_written(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor in the dtype that it is written in. Raises FlapError where that can't hold its values."""
    made = tensor.to(torch_dtype(spec.dtype))
    if made.dtype != tensor.dtype and not torch.isfinite(made).all() and torch.isfinite(tensor).all():
        raise FlapError(
            f"tensor {spec.name} has values beyond {dtype_name(made.dtype)}: write it in another type (--dtype, or "
            "--store-dtype of run)"
        )
    return made


def make(step: Step, layout: Layout, compensation: Compensation, report: FitReport) -> list[torch.Tensor]:
    """The tensors of one step, in the order of `specs_of`."""
    read = layout.checkpoint.read
    match step:
        case Copy():
            return [compensation.copied(step.source, read(step.source))]
        case Rows():
            rows = read(step.source).index_select(step.axis, step.rows)
            return [scatter(rows, step.rows, step.axis, step.spec.shape)]
        case ExpertRows():
            whole = read(step.source)
            of_each = [whole[i].index_select(step.axis, rows) for i, rows in zip(step.experts, step.rows, strict=True)]
            if layout.masked:
                found = zip(of_each, step.rows, strict=True)
                of_each = [scatter(kept, rows, step.axis, tuple(whole.shape[1:])) for kept, rows in found]
            return _in_files(torch.stack(of_each), step)
        case Zeros():
            return [torch.zeros(step.spec.shape)]
        case Output():
            return _output(step, layout, compensation, report)


def _in_files(whole: torch.Tensor, step: ExpertRows | Output) -> list[torch.Tensor]:
    """A tensor of all experts, as it is written."""
    if not step.files:
        return [whole]
    parts = [part for expert in whole for part in expert.split(step.files[0].shape[0])]
    return [part.contiguous() for part in parts]


def _output(step: Output, layout: Layout, compensation: Compensation, report: FitReport) -> list[torch.Tensor]:
    """The kept columns of an output projection as fitted, and its bias: its own plus what the fit adds."""
    cut = step.cut
    weight, own_bias = read_output(layout.checkpoint, cut)
    fit = compensation.fit(weight, cut)
    if fit.before is not None and fit.after is not None:
        report.errors[cut.layer, cut.module] = (fit.before, fit.after)
    if fit.raised is not None:
        report.raised[cut.layer, cut.module] = fit.raised
    if cut.module == "experts":
        channels = len(cut.kept) + len(cut.pruned)
        columns = scatter(fit.weight, cut.kept, 1, (len(fit.weight), channels)) if layout.masked else fit.weight
        of_each = columns.unflatten(1, (len(cut.experts), -1)).movedim(1, 0)
        return _in_files(of_each.mT if step.transposed else of_each, step)
    columns, axis = (fit.weight.T, 0) if step.transposed else (fit.weight, 1)
    made = [scatter(columns, cut.kept, axis, step.weight.shape)]
    if step.bias:
        parts = (part for part in (own_bias, fit.bias) if part is not None)
        made.append(sum(parts, torch.zeros(step.bias.shape, dtype=torch.float64)))
    return made
