"""Elimination: a module's units go one after the other, and those that stay stand in for them (METHOD.md, Elimination).

Calibration keeps the losses of attention's units, which FISHER-OBS reads.
"""

from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.architecture.shape import Module
from flapcli.artifacts.stats import Vector
from flapcli.artifacts.stats_writer import Eliminate
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.execution.device import float64_device, sums_dtype
from flapcli.progress import Advance
from flapcli.storage.linear_algebra import cholesky_factor, inverse_in_place, row_blocks, squared, total

RIDGE = 0.01  # that of the closed form, which is what stands in
CLOSE = 1e-3  # share of all rises together that they may miss what the formula has for their sum in float32
AT_ONCE = 0.02  # of a module's units go between two fits: one by one would take as many fits as there are units


def eliminate(weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The loss E_u at which every unit is eliminated, float64 (units,), never less than that of a unit before it.

    `weight` (out, channels), `gram` the mean of x xᵀ (channels, channels), `fisher` F_u (units,); lambda is `ridge`
    times the mean of the Gram matrix's diagonal. On the device of the Gram matrix, in its dtype, but in float64 where
    rounding shows, and where it shows there with ten times the ridge.
    """
    dtypes = list(dict.fromkeys((gram.dtype, sums_dtype(gram.device))))
    while True:
        with suppress(torch.linalg.LinAlgError):
            return _eliminate(weight.to(gram.device), gram, fisher, ridge, dtypes)
        ridge, dtypes = (ridge if len(dtypes) > 1 else max(ridge * 10, 1e-12)), dtypes[-1:]


def _eliminate(
    weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, ridge: float, dtypes: list[torch.dtype]
) -> torch.Tensor:
    """As `eliminate`. Raises LinAlgError where what is left of H is lost in rounding, or all rises miss their sum."""
    count = len(fisher)
    factor = cholesky_factor(lambda dtype: gram.to(dtype, copy=True), ridge, dtypes)
    inverse, added, dtype = inverse_in_place(factor), factor.added, factor.lower.dtype
    square = squared(weight, dtype)
    whole = sum(total(gram[rows] * square[rows]) for rows in row_blocks(len(gram))) + added * float(square.trace())
    alone = _sums(_blocks(gram, count).to(dtype), _blocks(square, count)).clamp_min(torch.finfo(torch.float64).tiny)
    left, scale, lost = _Left(inverse, square, count), fisher.double() / alone, 0.0
    levels, level = torch.zeros(count, dtype=torch.float64), 0.0
    while len(left.units):
        rises = torch.full((count,), torch.inf, dtype=torch.float64)
        rises[left.units] = scale[left.units] * left.errors()
        order = rises.argsort(stable=True)[: min(max(1, int(AT_ONCE * count)), len(left.units))]
        levels[order] = rises[order].clamp_min(level)
        level = float(levels[order[-1]])
        for unit in order.tolist():
            lost += left.remove(unit)
    if dtype != dtypes[-1] and abs(lost - whole) > CLOSE * whole:
        raise torch.linalg.LinAlgError
    return levels


class _Left:
    """H and W'ᵀ W' of the channels that are left, whose weight W' is fitted anew whenever a unit goes.

    Both in place: what goes moves to the front, and its columns become those of the pivoted Cholesky factor of H,
    and of what W'ᵀ W' changes by, from which those of the next are brought up to date when it goes. On the diagonal
    all blocks always are.
    """

    def __init__(self, inverse: torch.Tensor, square: torch.Tensor, count: int) -> None:
        self.inverse, self.square, self.size = inverse, square, len(inverse) // count
        self.units = torch.arange(count)  # in the order that they lie in
        self._inverses, self._squares = _blocks(inverse, count).contiguous(), _blocks(square, count).contiguous()

    def errors(self) -> torch.Tensor:
        """tr(W'_u (H_uu)^-1 W'_uᵀ) for each of `units` that is left, float64."""
        return _sums(torch.cholesky_inverse(torch.linalg.cholesky(self._inverses)), self._squares)

    def remove(self, unit: int) -> float:
        """Leave the unit out; by how much the error rises."""
        n, gone = self.size, len(self.inverse) - self.size * len(self.units)
        self._to_front(int((self.units == unit).nonzero()), gone)
        before, own, onward, after = slice(gone), slice(gone, gone + n), slice(gone, None), slice(gone + n, None)
        panel, moved = self.inverse[onward, own], self.square[onward, own]
        panel.addmm_(self.inverse[onward, before], self.inverse[own, before].mT, alpha=-1)
        moved.addmm_(self.square[onward, before], self.inverse[own, before].mT, alpha=-1)
        moved.addmm_(self.inverse[onward, before], self.square[own, before].mT, alpha=-1)
        back = torch.linalg.inv(torch.linalg.cholesky(panel[:n])).mT
        below = panel[n:] @ back  # H is left with - below belowᵀ
        middle = back.mT @ moved[:n] @ back
        half = moved[n:] @ back - below @ (middle / 2)  # W'ᵀ W' is left with - half belowᵀ - below halfᵀ
        self.inverse[after, own], self.square[after, own] = below, half
        of_unit, change = below.view(-1, n, n), half.view(-1, n, n) @ below.view(-1, n, n).mT
        self.units = self.units[1:]
        self._inverses = self._inverses[1:] - of_unit @ of_unit.mT
        self._squares = self._squares[1:] - change - change.mT
        return float(middle.trace())

    def _to_front(self, place: int, gone: int) -> None:
        """Change places with the first that is left."""
        here, there = (slice(start, start + self.size) for start in (gone, gone + place * self.size))
        if place:
            for matrix in (self.inverse, self.square):
                for lines in (matrix, matrix.mT):
                    lines[here], lines[there] = lines[there].clone(), lines[here].clone()
            for one_each in (self.units, self._inverses, self._squares):
                one_each[[0, place]] = one_each[[place, 0]]


def _sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """tr(L R) of every two symmetric matrices, float64, on the CPU."""
    return (left * right).sum((1, 2)).cpu().double()


def eliminator(checkpoint: Checkpoint, device: torch.device, advance: Advance = lambda _layers: None) -> Eliminate:
    """`eliminate` for a module of this checkpoint, float32 (units,); on `device`; `advance` counts layers."""

    def of_module(layer: int, module: Module, gram: NDArray[np.float32], fisher: Vector) -> Vector:
        advance(1)
        if not len(fisher):
            return fisher
        weight = checkpoint.read_output(layer, module)
        return (
            eliminate(weight, torch.from_numpy(gram).to(float64_device(device)), torch.from_numpy(fisher))
            .float()
            .numpy()
        )

    return of_module


def _blocks(matrix: torch.Tensor, units: int) -> torch.Tensor:
    """The units' own blocks on the diagonal of a matrix of channels, (units, n, n) for n channels a unit."""
    n = len(matrix) // units
    return matrix.reshape(units, n, units, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
