"""Elimination: a module's units go one after the other, and those that stay stand in for them (METHOD.md, Elimination).

Calibration keeps the losses of attention's units, which FISHER-OBS reads.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.architecture.shape import Module
from flapcli.artifacts.stats import Vector
from flapcli.artifacts.stats_writer import Eliminate
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.progress import Advance
from flapcli.storage.linear_algebra import cholesky_factor

RIDGE = 0.01  # that of the closed form, which is what stands in
AT_ONCE = 0.02  # of a module's units go between two fits: one by one would take as many fits as there are units


def eliminate(weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The loss E_u at which every unit is eliminated, float64 (units,), never less than that of a unit before it.

    `weight` (out, channels), `gram` the mean of x xᵀ (channels, channels), `fisher` F_u (units,); lambda is `ridge`
    times the mean of the Gram matrix's diagonal.
    """
    w, units, left = weight.double(), len(fisher), torch.arange(len(fisher))
    alone = _unit_errors(w, _blocks(gram, units).double()).clamp_min(torch.finfo(torch.float64).tiny)
    factor = cholesky_factor(lambda: gram.to(torch.float64, copy=True), ridge)
    scale, inverse = fisher.double() / alone, torch.cholesky_inverse(factor.cholesky)
    levels, level = torch.zeros(units, dtype=torch.float64), 0.0
    while len(left):
        rises = scale[left] * _unit_errors(w, torch.linalg.inv(_blocks(inverse, len(left))))
        order = rises.argsort(stable=True)[: max(1, int(AT_ONCE * units))]
        levels[left[order]] = rises[order].clamp_min(level)
        level = float(levels[left[order[-1]]])
        w, inverse, left = _without(order, w, inverse, left)
    return levels


def eliminator(checkpoint: Checkpoint, advance: Advance = lambda _layers: None) -> Eliminate:
    """`eliminate` for a module of this checkpoint, float32 (units,); `advance` counts layers, one each."""

    def of_module(layer: int, module: Module, gram: NDArray[np.float32], fisher: Vector) -> Vector:
        advance(1)
        if not len(fisher):
            return fisher
        weight = checkpoint.read_output(layer, module)
        return eliminate(weight, torch.from_numpy(gram), torch.from_numpy(fisher)).float().numpy()

    return of_module


def _blocks(matrix: torch.Tensor, units: int) -> torch.Tensor:
    """The units' own blocks on the diagonal of a matrix of channels, (units, n, n) for n channels a unit."""
    n = len(matrix) // units
    return matrix.reshape(units, n, units, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _unit_errors(weight: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """tr(W_u M_u W_uᵀ) for every unit's columns of the weight and its matrix, (units,)."""
    columns = weight.reshape(len(weight), len(matrices), -1).transpose(0, 1)
    return ((columns @ matrices) * columns).sum((1, 2))


def _without(
    pruned: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, left: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, fitted anew, inverse and units once those at the places `pruned` are left out."""
    kept = torch.ones(len(left), dtype=torch.bool).index_fill_(0, pruned, False)
    channels = kept.repeat_interleave(len(inverse) // len(left))
    across = inverse[channels][:, ~channels]
    half = torch.linalg.solve(inverse[~channels][:, ~channels], across.T)
    fitted = weight[:, channels].addmm_(weight[:, ~channels], half, alpha=-1)
    places = torch.nonzero(channels)  # in one step: two copies of a large matrix more would be its peak
    return fitted, inverse[places, places.T].addmm_(across, half, alpha=-1), left[kept]
