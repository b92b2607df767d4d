"""Linear algebra that several rooms need, in the memory and on the device of what it is given.

By blocks of rows, so that nearly all of it is matrix products: libraries' own factors and inverses take several times
as long for the same operations where they were not written for the processor (MKL on AMD).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from flapcli.errors import FlapError

ROWS = 512  # a block


def row_blocks(count: int) -> list[slice]:
    return [slice(first, min(first + ROWS, count)) for first in range(0, count, ROWS)]


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A matrix yet to be written, each row of which begins a line of the cache: products write it half again as fast.

    (MKL on AMD: 90 instead of 60 billion operations a second into 3,280 float32 columns and into 3,277.)
    """
    return torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]


def total(products: torch.Tensor) -> float:
    """Sum of all of a matrix, over rows in float64."""
    return float(products.sum(1).cpu().double().sum())


def sum_of_squares(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1).cpu().double().square().sum())


class Factor(NamedTuple):
    """Cholesky factor of matrix + lambda I: the lower half of `lower`, and the inverses of its diagonal blocks.

    `added` is lambda, and `raised` the ridge, where it had to grow.
    """

    lower: torch.Tensor
    inverses: list[torch.Tensor]
    added: float
    raised: float | None

    def solve_in_place(self, right: torch.Tensor) -> float:
        """x of x (matrix + lambda I) = `right`, (rows, n), whose memory it takes; returns the sum of x * right."""
        blocks, energy = row_blocks(len(self.lower)), 0.0
        for own, inverse in zip(blocks, self.inverses, strict=True):
            before = slice(0, own.start)
            right[:, own] = right[:, own].addmm_(right[:, before], self.lower[own, before].mT, alpha=-1) @ inverse.mT
            energy += sum_of_squares(right[:, own])  # |half way|^2, of half way Lᵀ = right
        for own, inverse in zip(reversed(blocks), reversed(self.inverses), strict=True):
            after = slice(own.stop, None)
            right[:, own] = right[:, own].addmm_(right[:, after], self.lower[after, own], alpha=-1) @ inverse
        return energy


def cholesky_factor(make: Callable[[torch.dtype], torch.Tensor], ridge: float, dtypes: Iterable[torch.dtype]) -> Factor:
    """Factor of matrix + lambda I, lambda = ridge * mean of the diagonal, in the very memory of what `make` gives.

    The matrix is symmetric, its lower half is read, and it is the caller's to lose. In the first of the dtypes in
    which a factor exists, for which the matrix is made anew; where there is none, the ridge is raised tenfold. Raises
    FlapError where none makes it definite.
    """
    asked, tried = ridge, list(dtypes)
    for _ in range(20):
        for dtype in tried:
            matrix = make(dtype)
            added = max(ridge * float(matrix.diagonal().mean()), torch.finfo(dtype).tiny)
            matrix.diagonal().add_(added)
            if inverses := _cholesky_in_place(matrix):
                return Factor(matrix, inverses, added, ridge if ridge > asked else None)
        ridge = max(ridge * 10, 1e-12)
    raise FlapError(
        "a Gram matrix is not finite, or too coarse to take the means out: calibrate with --gram-dtype float32, or "
        "leave biases out (--no-bias)"
    )


def _cholesky_in_place(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Inverses of the factor's diagonal blocks; none where there is no factor."""
    inverses = []
    for own in row_blocks(len(matrix)):
        before, after = slice(0, own.start), slice(own.stop, None)
        matrix[own.start :, own].addmm_(matrix[own.start :, before], matrix[own, before].mT, alpha=-1)
        square, failed = torch.linalg.cholesky_ex(matrix[own, own])
        if failed:
            return []
        inverse = torch.linalg.solve_triangular(square, torch.eye(len(square)).to(square), upper=False)
        matrix[own, own] = square
        matrix[after, own] = matrix[after, own] @ inverse.mT
        inverses.append(inverse)
    return inverses


def inverse_in_place(factor: Factor) -> torch.Tensor:
    """(matrix + lambda I)^-1, in the memory of the factor."""
    matrix, blocks = factor.lower, row_blocks(len(factor.lower))
    for own, inverse in zip(blocks, factor.inverses, strict=True):  # of the factor first
        for one in blocks[: own.start // ROWS]:  # what those before it leave to be read is what comes after
            between = slice(one.start, own.start)
            matrix[own, one] = matrix[own, between] @ matrix[between, one]
        matrix[own, : own.start] = inverse.neg() @ matrix[own, : own.start]
        matrix[own, own] = inverse
    for own in blocks:
        matrix[own, : own.stop] = matrix[own.start :, own].mT @ matrix[own.start :, : own.stop]
    return mirrored(matrix)


def squared(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product of a matrix's transpose and itself, in this dtype."""
    count = matrix.shape[1]
    made = torch.zeros(count, count, dtype=dtype, device=matrix.device)
    for rows in row_blocks(len(matrix)):
        part = matrix[rows].to(dtype)
        for own in row_blocks(count):
            made[own, : own.stop].addmm_(part[:, own].mT, part[:, : own.stop])
    return mirrored(made)


def mirrored(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its lower half in the place of its upper one."""
    for own in row_blocks(len(matrix)):
        matrix[: own.start, own] = matrix[own, : own.start].mT
    return matrix
