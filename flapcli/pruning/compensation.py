"""What the kept channels owe for the pruned ones (METHOD.md, Compensation).

P pruned, K kept channels of one output projection with weight W (out, channels).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from flapcli.architecture.flap_section import adds_bias
from flapcli.artifacts.stats import Stats
from flapcli.pruning.cut import ModuleCut
from flapcli.storage.linear_algebra import cholesky_factor


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


def mean_bias(weight: torch.Tensor, kept: torch.Tensor, pruned: torch.Tensor, mean: torch.Tensor) -> Fit:
    """b' = b + W_P mu_P: the pruned channels' mean goes on acting (the paper; METHOD.md, Compensation).

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
    """The kept channels predict the pruned ones: least squares, with a bias or without (METHOD.md, Compensation).

    `gram` (channels, channels) is G, the mean of x xᵀ; the others are as in `mean_bias`. Float64 throughout.
    """
    w, mu, covariance = weight.double(), mean.double(), gram.double()
    if with_bias:
        covariance = covariance - torch.outer(mu, mu)
    solution, raised = torch.zeros(len(kept), len(w), dtype=torch.float64), None
    if len(kept) and len(pruned):
        target = covariance[kept][:, pruned] @ w[:, pruned].T
        cholesky, raised = cholesky_factor(covariance[kept][:, kept], ridge)
        solution = torch.cholesky_solve(target, cholesky)
    moved = w[:, kept] + solution.T
    bias = w[:, pruned] @ mu[pruned] - solution.T @ mu[kept] if with_bias else None
    return Fit(moved, bias, *output_error_shares(weight, kept, pruned, mean, gram, moved, bias), raised)


def output_error_shares(
    weight: torch.Tensor,
    kept: torch.Tensor,
    pruned: torch.Tensor,
    mean: torch.Tensor,
    gram: torch.Tensor,
    moved: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[float, float]:
    """Shares of the output's variance that are lost with the pruned channels' mean, and with `moved` and `bias`.

    On the activations that mean and Gram matrix are of (METHOD.md, Compensation: output error).
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


def refit_on_means(
    start: torch.Tensor, means: Means, ridge: float, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """W0 + D and e (None without bias) of METHOD.md, Sequential fit, float64; and `Fit.raised`.

    `start` is W0 (out, |K|), and `means` hold r, what W0 and the projection's own bias leave to explain.
    """
    gram, cross = means.xx, means.xr
    if with_bias:
        gram, cross = gram - torch.outer(means.x, means.x), cross - torch.outer(means.x, means.r)
    change, raised = torch.zeros_like(start, dtype=torch.float64), None
    if len(means.x):
        cholesky, raised = cholesky_factor(gram, ridge)
        change = torch.cholesky_solve(cross, cholesky).T
    return start.double() + change, means.r - change @ means.x if with_bias else None, raised


def _power(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """tr(W C Wᵀ): the mean square of W x."""
    return float(((weight @ covariance) * weight).sum())


class Compensation(Protocol):
    """What says of every output projection how its kept columns shall be."""

    def fit(self, weight: torch.Tensor | None, cut: ModuleCut) -> Fit:
        """For a projection's weight (out, channels) as stored; None of one that has no channels."""


@dataclass(frozen=True)
class ClosedForm:
    """The compensations that need nothing but statistics.

    `kind` is none, bias or lstsq; all but none read `stats`, lstsq its Gram matrices too, with `ridge`.
    """

    kind: str
    stats: Stats | None = None
    ridge: float = 0.0
    lstsq_bias: bool = True

    @property
    def adds_bias(self) -> bool:
        """Whether biases are added to output projections."""
        return adds_bias(self.kind, self.lstsq_bias)

    def fit(self, weight: torch.Tensor | None, cut: ModuleCut) -> Fit:
        if weight is None:
            return Fit(torch.zeros(0, 0), None)
        if self.kind == "none" or self.stats is None:
            return Fit(weight[:, cut.kept], None)
        mean = self.mean(cut)
        if self.kind == "bias":
            return mean_bias(weight, cut.kept, cut.pruned, mean)
        return least_squares(weight, cut.kept, cut.pruned, mean, self.gram(cut), self.ridge, self.lstsq_bias)

    def mean(self, cut: ModuleCut) -> torch.Tensor:
        """Mean of the module's channels, float32 (channels,)."""
        return torch.from_numpy(self._stats.modules[cut.layer, cut.module].mean)

    def gram(self, cut: ModuleCut) -> torch.Tensor:
        """Mean of x xᵀ of the module's channels, float32 (channels, channels)."""
        return torch.from_numpy(self._stats.gram(cut.layer, cut.module))

    @property
    def _stats(self) -> Stats:
        if self.stats is None:
            raise ValueError(f"{self.kind} has no statistics")
        return self.stats
