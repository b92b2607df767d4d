"""Linear algebra that several rooms need."""

import torch

from flapcli.errors import FlapError


def cholesky_factor(matrix: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float | None]:
    """Cholesky factor of matrix + lambda I, lambda = ridge * mean of the diagonal; the ridge, where it was raised.

    It is raised tenfold until the factor exists. Raises FlapError where none makes the matrix definite.
    """
    asked = ridge
    padded, scale = matrix.clone(), matrix.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    for _ in range(20):
        padded.diagonal().copy_(matrix.diagonal() + ridge * scale)
        cholesky, failed = torch.linalg.cholesky_ex(padded)
        if not failed:
            return cholesky, ridge if ridge > asked else None
        ridge = max(ridge * 10, 1e-12)
    raise FlapError(
        "a Gram matrix is not finite, or too coarse to take the means out: calibrate with --gram-dtype float32, or "
        "leave biases out (--no-bias)"
    )
