"""Which channels of an output projection stay and which are pruned, and tensors cut accordingly."""

from dataclasses import dataclass

import numpy as np
import torch

from flapcli.architecture.rows import Kept
from flapcli.architecture.shape import Module
from flapcli.artifacts.plan import Plan
from flapcli.checkpoints import Checkpoint
from flapcli.pruning.stock_form import gains_bias


@dataclass(frozen=True)
class ModuleCut:
    """One module of one layer: which heads or neurons are written, and channels of its output projection, ascending.

    The written ones are those that stay, but for a module that keeps none (`ModelShape.written`); `columns` of the
    output projection are written, of which those of no kept channel are zeros.
    """

    layer: int
    module: Module
    stays: Kept
    kept: torch.Tensor
    pruned: torch.Tensor
    columns: int

    @property
    def is_whole(self) -> bool:
        """Whether all that the module has is written, pruned or not."""
        return self.columns == len(self.kept) + len(self.pruned)

    @property
    def experts(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of experts those that stay: each one's number and which of its own channels are kept and pruned."""
        of_each = self.stays["expert_size"].reshape(len(self.stays["num_experts"]), -1)
        return [
            (expert, torch.from_numpy(np.flatnonzero(stays)), torch.from_numpy(np.flatnonzero(~stays)))
            for expert, stays in enumerate(of_each)
            if stays.any()
        ]


def cut_of(checkpoint: Checkpoint, plan: Plan, layer: int, module: Module, masked: bool = False) -> ModuleCut:
    """What the plan keeps of a module, as channels of its output projection; `masked`: all columns are written."""
    shape, units = checkpoint.shape, plan.kept(layer, module)
    written = units if masked else shape.written(layer, module, units)
    is_kept = np.zeros((shape.units(layer, module), shape.channels_per_unit(module)), dtype=bool)
    is_kept[units] = True
    kept, pruned = (torch.from_numpy(np.flatnonzero(which)) for which in (is_kept, ~is_kept))
    columns = is_kept.size if masked else len(written) * is_kept.shape[1]
    return ModuleCut(layer, module, shape.kept(layer, module, written), kept, pruned, columns)


def sliced_though_masked(checkpoint: Checkpoint, plan: Plan, adds_bias: bool) -> tuple[int, Module] | None:
    """A module whose shape stops loaders that have no place for added biases, and would leave them out unsaid."""
    modules: list[Module] = ["mlp", "shared_expert", "attention"]
    shape = checkpoint.shape
    if not any(gains_bias(checkpoint, module, adds_bias) for module in modules if module in plan.modules):
        return None
    return next(
        (
            (layer, module)
            for module in modules
            for layer in range(shape.num_layers)
            if module in plan.modules
            and len(shape.written(layer, module, plan.kept(layer, module))) < shape.units(layer, module)
        ),
        None,
    )


def read_output(checkpoint: Checkpoint, cut: ModuleCut) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (out, channels) and bias (out,) of the module's output projection; None where it has none."""
    prefix = checkpoint.family.output(cut.layer, cut.module)
    weight = checkpoint.read_output(cut.layer, cut.module)
    return weight, checkpoint.read(f"{prefix}.bias") if f"{prefix}.bias" in checkpoint.tensors else None


def scatter(values: torch.Tensor, kept: torch.Tensor, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Kept rows or columns at their old places among zeros, where the shape has others."""
    if tuple(values.shape) == tuple(shape):
        return values
    return torch.zeros(shape, dtype=values.dtype).index_copy_(axis, kept, values)
