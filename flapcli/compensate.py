"""What the kept channels owe for the pruned ones (METHOD.md, Compensation).

P pruned, K kept channels of one output projection with weight W (out, channels).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flapcli.errors import FlapError


@dataclass(frozen=True)
class Fit:
    """The kept columns (out, |K|) as they shall be, and what is added to the bias (out,), float64.

    `before` and `after`: share of the output's variance on the calibration text that is lost when the pruned
    channels are replaced by their mean, and with this fit; None where no covariance is known. `raised`: the ridge,
    where it had to grow.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    before: float | None = None
    after: float | None = None
    raised: float | None = None


def no_compensation(weight: torch.Tensor, kept: torch.Tensor) -> Fit:
    """The kept columns as they are."""
    return Fit(weight[:, kept], None)


def mean_bias(weight: torch.Tensor, kept: torch.Tensor, pruned: torch.Tensor, mean: torch.Tensor) -> Fit:
    """b' = b + W_P mu_P: the pruned channels' mean goes on acting (the paper; METHOD.md, bias).

    `weight` (out, channels) of any floating dtype, `kept` and `pruned` indices, `mean` mu (channels,).
    """
    return Fit(weight[:, kept], weight[:, pruned].double() @ mean[pruned].double())


def least_squares(
    weight: torch.Tensor,
    kept: torch.Tensor,
    pruned: torch.Tensor,
    mean: torch.Tensor,
    gram: torch.Tensor,
    ridge: float,
    with_bias: bool,
) -> Fit:
    """The kept channels predict the pruned ones (METHOD.md, least squares; closed-form minimiser).

    With C the covariance (or, without a bias, the Gram matrix G = mean x xᵀ itself), lambda = ridge times the
    mean of diag C_KK, and B = (C_KK + lambda I)^-1 C_KP:
        W' = W_K + W_P Bᵀ,  b' = b + W_P mu_P - (W_P Bᵀ) mu_K.
    Solved for (W_P Bᵀ)ᵀ, whose columns are the outputs: fewer than pruned channels in all but narrow models.
    Float64 throughout. Where rounding leaves C_KK + lambda I indefinite, lambda grows tenfold until it is not.
    """
    w, mu, covariance = weight.double(), mean.double(), gram.double()
    if with_bias:
        covariance = covariance - torch.outer(mu, mu)
    solution, raised = torch.zeros(len(kept), len(w), dtype=torch.float64), None
    if len(kept) and len(pruned):
        target = covariance[kept][:, pruned] @ w[:, pruned].T
        cholesky, raised = factor(covariance[kept][:, kept], ridge)
        solution = torch.cholesky_solve(target, cholesky)
    moved = w[:, kept] + solution.T
    bias = w[:, pruned] @ mu[pruned] - solution.T @ mu[kept] if with_bias else None
    return Fit(moved, bias, *lost(weight, kept, pruned, mean, gram, moved, bias), raised)


def lost(
    weight: torch.Tensor,
    kept: torch.Tensor,
    pruned: torch.Tensor,
    mean: torch.Tensor,
    gram: torch.Tensor,
    moved: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[float, float]:
    """Shares of the output's variance that are lost with the pruned channels' mean, and with `moved` and `bias`.

    On the activations that mean and Gram matrix are of. The mean square of E x + e, with E what all columns
    change by and e what the bias gains, is tr(E C Eᵀ) + |E mu + e|², C the covariance.
    """
    w, mu = weight.double(), mean.double()
    covariance = gram.double() - torch.outer(mu, mu)
    change = torch.zeros_like(w)
    change[:, pruned] = -w[:, pruned]
    whole, before = _power(w, covariance), _power(change, covariance)
    change[:, kept] = moved.double() - w[:, kept]
    off = change @ mu if bias is None else change @ mu + bias
    after = _power(change, covariance) + float(off.square().sum())
    return (before / whole, after / whole) if whole > 0 else (0.0, 0.0)


class Means(NamedTuple):
    """Means over tokens of x (|K|,), r (out,), x xᵀ (|K|, |K|) and x rᵀ (|K|, out), float64."""

    x: torch.Tensor
    r: torch.Tensor
    xx: torch.Tensor
    xr: torch.Tensor


def refined(
    start: torch.Tensor, means: Means, ridge: float, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Weights and bias of argmin over D, b of mean |(W0 + D) x + b - y|² + lambda |D|², float64; and `Fit.raised`.

    `start` is W0 (out, |K|), r = y - W0 x. Centred with a bias, else as they are and b = 0: Dᵀ = (C + lambda I)^-1
    C_xr, lambda = ridge * mean(diag C), b = mean r - D mean x. Where r is 0 or a constant that b takes, D = 0.
    """
    gram, cross = means.xx, means.xr
    if with_bias:
        gram, cross = gram - torch.outer(means.x, means.x), cross - torch.outer(means.x, means.r)
    change, raised = torch.zeros_like(start, dtype=torch.float64), None
    if len(means.x):
        cholesky, raised = factor(gram, ridge)
        change = torch.cholesky_solve(cross, cholesky).T
    return start.double() + change, means.r - change @ means.x if with_bias else None, raised


def factor(matrix: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float | None]:
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


def _power(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """tr(W C Wᵀ): the mean square of W x."""
    return float(((weight @ covariance) * weight).sum())
