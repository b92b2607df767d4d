"""Which channels of an output projection stay and which are pruned, and tensors cut accordingly."""

from dataclasses import dataclass

import numpy as np
import torch

from flapcli.architecture.rows import Kept
from flapcli.architecture.shape import Module
from flapcli.artifacts.plan import Plan
from flapcli.checkpoints import Checkpoint


@dataclass(frozen=True)
class ModuleCut:
    """One module of one layer: which heads or neurons stay, and channels of its output projection, ascending."""

    layer: int
    module: Module
    stays: Kept
    kept: torch.Tensor
    pruned: torch.Tensor

    @property
    def experts(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of experts those that stay: each one's number and which of its own channels are kept and pruned."""
        of_each = self.stays["expert_size"].reshape(len(self.stays["num_experts"]), -1)
        return [
            (expert, torch.from_numpy(np.flatnonzero(stays)), torch.from_numpy(np.flatnonzero(~stays)))
            for expert, stays in enumerate(of_each)
            if stays.any()
        ]


def cut_of(checkpoint: Checkpoint, plan: Plan, layer: int, module: Module) -> ModuleCut:
    """What the plan keeps of a module, as channels of its output projection."""
    shape, units = checkpoint.shape, plan.kept(layer, module)
    is_kept = np.zeros((shape.units(layer, module), shape.channels_per_unit(module)), dtype=bool)
    is_kept[units] = True
    kept, pruned = (torch.from_numpy(np.flatnonzero(which)) for which in (is_kept, ~is_kept))
    return ModuleCut(layer, module, shape.kept(layer, module, units), kept, pruned)


def read_output(checkpoint: Checkpoint, cut: ModuleCut) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight (out, channels) and bias (out,) of the module's output projection; None where it has none."""
    prefix = checkpoint.family.output(cut.layer, cut.module)
    is_there = checkpoint.family.output_weight(cut.layer, cut.module) in checkpoint.tensors
    weight = checkpoint.read_output(cut.layer, cut.module) if is_there else None
    return weight, checkpoint.read(f"{prefix}.bias") if f"{prefix}.bias" in checkpoint.tensors else None


def scatter(values: torch.Tensor, kept: torch.Tensor, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Kept rows or columns at their old places among zeros."""
    return torch.zeros(shape, dtype=values.dtype).index_copy_(axis, kept, values)
