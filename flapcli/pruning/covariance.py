"""The covariance C of a module's channels, never whole beside the Gram matrix, and solves with it.

METHOD.md, Compensation.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch

from flapcli.storage.linear_algebra import Factor, aligned, cholesky_factor, row_blocks, total

PROBES, CLOSE = 8, 1e-3  # mixtures of outputs that a solution is tried on, and how far off it may be


class Wanted(Protocol):
    """Makes T from what it is linear in, of which it takes `part`: some rows or mixtures of them, one for an output."""

    def __call__(self, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor: ...


class Centred(NamedTuple):
    """C = G - mu muᵀ of a module's channels, made by some rows at a time: never whole beside G."""

    gram: torch.Tensor
    mu: torch.Tensor

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """C at these rows and columns, in the dtype of mu: a difference of things that may be large."""
        found = self.gram.index_select(0, rows).index_select(1, columns).to(self.mu.dtype)
        return found.addr_(self.mu[rows], self.mu[columns], alpha=-1)

    def lower(self, channels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The lower half of C at these channels, in the memory of a whole that nothing else was written to."""
        half = aligned(len(channels), len(channels), dtype, self.gram.device)
        for own in row_blocks(len(channels)):
            half[own, : own.stop] = self.block(channels[own], channels[: own.stop])
        return half

    def product(self, left: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`left` (n, |rows|) by C at these rows and columns, (n, |columns|) in its dtype."""
        made = aligned(len(left), len(columns), left.dtype, left.device)
        for own in row_blocks(len(columns)):
            torch.mm(left, self.block(columns[own], rows).to(left.dtype).mT, out=made[:, own])
        return made

    def power(self, weight: torch.Tensor, columns: torch.Tensor) -> float:
        """tr(W C Wᵀ), the mean square of W x, for W (out, |columns|) and C, which is symmetric, at these columns."""
        found = 0.0
        for own in row_blocks(len(columns)):
            block = self.block(columns[own], columns[: own.stop]).to(weight.dtype)
            block[:, : own.start] *= 2
            found += total((weight[:, : own.stop] @ block.mT).mul_(weight[:, own]))
        return found


class Solution(NamedTuple):
    """S (outputs, |K|) of S (C_KK + lambda I) = T, the sum of S * T, lambda, and the ridge where it had to grow."""

    s: torch.Tensor
    energy: float
    added: float
    raised: float | None


def solve(centred: Centred, channels: torch.Tensor, ridge: float, outputs: int, wanted: Wanted) -> Solution:
    """With C at these channels; `wanted` makes a part of T, in whose memory S is.

    All is in the dtype of G, but solved in float64, some outputs at a time, where no factor exists in that, or a step
    of iterative refinement would move S (`_is_close`).
    """
    own, wide, lower = centred.gram.dtype, centred.mu.dtype, partial(centred.lower, channels)
    factor = cholesky_factor(lower, ridge, dict.fromkeys((own, wide)))
    if factor.lower.dtype != wide:
        made = wanted(lambda whole: whole)
        if _is_close(centred, channels, factor, made, wanted(lambda whole: _mixtures(whole).to(wide))):
            return Solution(made, factor.solve_in_place(made), factor.added, factor.raised)
        del factor, made
        factor = cholesky_factor(lower, ridge, [wide])
    made, energy = aligned(outputs, len(channels), own, channels.device), 0.0
    for rows in row_blocks(outputs):
        part = wanted(partial(_rows, rows, wide))
        energy += factor.solve_in_place(part)
        made[rows] = part
    return Solution(made, energy, factor.added, factor.raised)


def _is_close(
    centred: Centred, channels: torch.Tensor, factor: Factor, target: torch.Tensor, mixed: torch.Tensor
) -> bool:
    """Whether float32's solution for mixtures of T stays where a step of refinement by float64's residual moves it.

    `target` is T, and `mixed` are float64's mixtures, so that T's own rounding counts.
    """
    found = _mixtures(target)
    factor.solve_in_place(found)
    wide = found.to(mixed.dtype)
    step = (mixed - centred.product(wide, channels, channels) - factor.added * wide).to(found.dtype)
    factor.solve_in_place(step)
    return float(step.norm()) <= CLOSE * float(found.norm())


def _rows(which: slice, dtype: torch.dtype, whole: torch.Tensor) -> torch.Tensor:
    return whole[which].to(dtype)


def _mixtures(rows: torch.Tensor) -> torch.Tensor:
    """Sums of all rows with random signs, always the same, (PROBES, columns)."""
    signs = torch.randint(0, 2, (PROBES, len(rows)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.to(rows) @ rows


def combined(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """W x for W (out, channels), in the dtype of x."""
    parts = (weight[:, own].to(x.dtype) @ x[own] for own in row_blocks(len(x)))
    return sum(parts, torch.zeros(len(weight), dtype=x.dtype, device=x.device))
