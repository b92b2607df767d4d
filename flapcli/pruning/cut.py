"""Which channels of an output projection stay and which are pruned, and tensors cut accordingly."""

from dataclasses import dataclass

import torch

from flapcli.architecture.shape import Module
from flapcli.artifacts.plan import Plan
from flapcli.checkpoints import Checkpoint


@dataclass(frozen=True)
class ModuleCut:
    """One module of one layer: its kept units, and kept and pruned channels of its output projection, ascending."""

    layer: int
    module: Module
    kept_units: torch.Tensor
    kept: torch.Tensor
    pruned: torch.Tensor


def cut_of(checkpoint: Checkpoint, plan: Plan, layer: int, module: Module) -> ModuleCut:
    """What the plan keeps of a module, as channels of its output projection."""
    units = torch.from_numpy(plan.kept(layer, module))
    channels = checkpoint.shape.units(layer, module) * checkpoint.shape.channels_per_unit(module)
    kept = rows_of(units, checkpoint.shape.channels_per_unit(module))
    is_kept = torch.zeros(channels, dtype=torch.bool)
    is_kept[kept] = True
    return ModuleCut(layer, module, units, kept, torch.nonzero(~is_kept).flatten())


def read_output(checkpoint: Checkpoint, cut: ModuleCut) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight (out, channels) and bias (out,) of the module's output projection as stored; None where it has none."""
    prefix = checkpoint.family.output(cut.layer, cut.module)
    names = (f"{prefix}.weight", f"{prefix}.bias")
    weight, bias = (checkpoint.read(name) if name in checkpoint.tensors else None for name in names)
    return weight, bias


def rows_of(units: torch.Tensor, rows_per_unit: int) -> torch.Tensor:
    """Row (or column) indices that belong to units, ascending."""
    return (units[:, None] * rows_per_unit + torch.arange(rows_per_unit)).flatten()


def scatter(values: torch.Tensor, kept: torch.Tensor, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Kept rows or columns at their old places among zeros."""
    return torch.zeros(shape, dtype=values.dtype).index_copy_(axis, kept, values)
