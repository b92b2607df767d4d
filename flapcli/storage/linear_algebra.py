"""Linear algebra that several rooms need."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from flapcli.errors import FlapError


class Factor(NamedTuple):
    """Lower Cholesky factor of matrix + lambda I, that lambda, and the ridge, where it had to be raised."""

    cholesky: torch.Tensor
    added: float
    raised: float | None


def cholesky_factor(make: Callable[[], torch.Tensor], ridge: float) -> Factor:
    """Factor of matrix + lambda I, lambda = ridge * mean of the diagonal, in the very memory of what `make` gives.

    The matrix is symmetric, float64, and the caller's to lose. The ridge is raised tenfold until the factor exists,
    for which the matrix is made anew. Raises FlapError where none makes it definite.
    """
    asked = ridge
    for _ in range(20):
        matrix = make()
        added = ridge * matrix.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        matrix.diagonal().add_(added)
        columns = matrix.mT  # by columns, as LAPACK has it: by rows it would work on a copy
        failed = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(columns, out=(columns, failed))
        if not failed:
            return Factor(columns, float(added), ridge if ridge > asked else None)
        ridge = max(ridge * 10, 1e-12)
    raise FlapError(
        "a Gram matrix is not finite, or too coarse to take the means out: calibrate with --gram-dtype float32, or "
        "leave biases out (--no-bias)"
    )


def solve_in_place(cholesky: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x of L Lᵀ x = `right`, (n, columns) stored by columns, whose memory it takes."""
    torch.linalg.solve_triangular(cholesky, right, upper=False, out=right)
    return torch.linalg.solve_triangular(cholesky.mT, right, upper=True, out=right)
