"""Elimination: a module's units go one after the other, and those that stay stand in for them as well as they can.

Optimal Brain Surgeon (Hassibi and Stork 1993) on whole units, for the output error of one projection W on the
calibration text, in units of the loss. With G the mean of x xᵀ over the channels that are left plus lambda I,
H = G^-1, and W' the weight as least squares has made it so far, the projection's mean squared output error rises by

    e_u = tr(W'_u (H_uu)^-1 W'_uᵀ)

when unit u goes and the rest is fitted anew, where it would rise by b_u = tr(W_u G_uu W_uᵀ) if u alone went from the
dense model and nothing were fitted. The loss feels the latter as F_u, the unit's Fisher information (fisher.py), so

    E_u = F_u e_u / b_u

says what the loss feels of u's going next. The lowest goes, H and W' follow, and so on to the last unit. Calibration
keeps the losses of attention's units, which FISHER-OBS reads (scores.py).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.compensate import factor
from flapcli.progress import Advance
from flapcli.shape import Module
from flapcli.stats import Eliminate, Vector

RIDGE = 0.01  # that of the closed form, which is what stands in
AT_ONCE = 0.02  # of a module's units go between two fits: one by one would take as many fits as there are units


def eliminate(weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """E_u of every unit at its going, or that of a unit before it where that is higher; float64 (units,).

    So the order of the values is the order of elimination, but for ties, and a threshold on them cuts every module
    at the same loss. `weight` (out, channels), `gram` the mean of x xᵀ (channels, channels), `fisher` F_u (units,);
    lambda is `ridge` times the mean of the Gram matrix's diagonal.
    """
    w, units, left = weight.double(), len(fisher), torch.arange(len(fisher))
    alone = _unit_errors(w, _blocks(gram, units).double()).clamp_min(torch.finfo(torch.float64).tiny)
    scale, inverse = fisher.double() / alone, torch.cholesky_inverse(factor(gram.double(), ridge)[0])
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
        weight = checkpoint.read(f"{checkpoint.family.output(layer, module)}.weight")
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
    gone: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, left: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, fitted anew, inverse and units once those at the places `gone` are left out."""
    stays = torch.ones(len(left), dtype=torch.bool).index_fill_(0, gone, False)
    channels = stays.repeat_interleave(len(inverse) // len(left))
    across = inverse[channels][:, ~channels]
    half = torch.linalg.solve(inverse[~channels][:, ~channels], across.T)
    fitted = weight[:, channels].addmm_(weight[:, ~channels], half, alpha=-1)
    places = torch.nonzero(channels)  # in one step: two copies of a large matrix more would be its peak
    return fitted, inverse[places, places.T].addmm_(across, half, alpha=-1), left[stays]
