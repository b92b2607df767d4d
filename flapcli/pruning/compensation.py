"""What the kept channels owe for the pruned ones (METHOD.md, Compensation).

P pruned, K kept channels of one output projection with weight W (out, channels).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.architecture.flap_section import adds_bias
from flapcli.artifacts.few_tokens import over_experts, shrunk
from flapcli.artifacts.stats import ExpertStats, Stats
from flapcli.pruning.cut import ModuleCut
from flapcli.storage.linear_algebra import cholesky_factor, solve_in_place

ROWS = 512  # of a matrix are taken at a time where all of them would be one more of its size


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

    `gram` (channels, channels) is G, the mean of x xᵀ; the others are as in `mean_bias`. Float64 throughout, in no more
    than the Gram matrix and two blocks of it beside what is returned.
    """
    mu = mean.double() if with_bias else torch.zeros(len(mean), dtype=torch.float64)
    w_pruned, moved = weight[:, pruned].double(), weight[:, kept].double()
    bias = w_pruned @ mu[pruned]
    before, explained, raised = _power(w_pruned, gram, mean, pruned), 0.0, None
    if len(kept) and len(pruned):
        factor = cholesky_factor(lambda: _block(gram, mu, kept, kept), ridge)
        across = _block(gram, mu, kept, pruned)
        for rows in _parts(len(weight)):
            target = w_pruned[rows] @ across.T
            solution = solve_in_place(factor.cholesky, target.clone().mT).mT
            # (C + lambda I) S = T: what the fit takes off the error, without another product by C.
            explained += float((solution * target).sum() + factor.added * solution.square().sum())
            moved[rows] += solution
            bias[rows] -= solution @ mu[kept]
        raised = factor.raised
    lost = before if with_bias else before + float((w_pruned @ mean[pruned].double()).square().sum())
    whole = _power(weight, gram, mean, torch.arange(len(mean)))
    return Fit(moved, bias if with_bias else None, *_shares(before, max(lost - explained, 0.0), whole), raised)


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
    change, mu, everything = torch.zeros(weight.shape, dtype=torch.float64), mean.double(), torch.arange(len(mean))
    change[:, pruned] = -weight[:, pruned].double()
    change[:, kept] = moved.double() - weight[:, kept].double()
    off = change @ mu if bias is None else change @ mu + bias
    after = _power(change, gram, mean, everything) + float(off.square().sum())
    whole = _power(weight, gram, mean, everything)
    return _shares(_power(weight[:, pruned], gram, mean, pruned), after, whole)


def _shares(before: float, after: float, whole: float) -> tuple[float, float]:
    return (before / whole, after / whole) if whole > 0 else (0.0, 0.0)


def _block(gram: torch.Tensor, mu: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """G - mu muᵀ at these rows and columns, float64; by some rows at a time, so that no second one is made."""
    block = torch.empty(len(rows), len(columns), dtype=torch.float64)
    for part in _parts(len(rows)):
        block[part] = gram[rows[part, None], columns].double() - torch.outer(mu[rows[part]], mu[columns])
    return block


def _parts(count: int) -> list[slice]:
    return [slice(first, first + ROWS) for first in range(0, count, ROWS)]


def _power(weight: torch.Tensor, gram: torch.Tensor, mean: torch.Tensor, columns: torch.Tensor) -> float:
    """tr(W C Wᵀ), the mean square of W x, for a weight (out, |columns|) and C at these columns.

    Of C, which is symmetric, the upper half, some rows at a time.
    """
    w, mu, total = weight.double(), mean.double(), 0.0
    for part in _parts(len(columns)):
        own, onward = columns[part], slice(part.start, None)
        block = _block(gram, mu, own, columns[onward])
        block[:, len(own) :] *= 2
        total += float(((w[:, part] @ block) * w[:, onward]).sum())
    return total


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
    mu, everything = means.x if with_bias else torch.zeros_like(means.x), torch.arange(len(means.x))
    change, raised = torch.zeros_like(start, dtype=torch.float64), None
    if len(mu):
        factor = cholesky_factor(lambda: _block(means.xx, mu, everything, everything), ridge)
        change = solve_in_place(factor.cholesky, (means.xr - torch.outer(mu, means.r)).T.clone().mT).mT
        raised = factor.raised
    return start.double() + change, means.r - change @ means.x if with_bias else None, raised


class Compensation(Protocol):
    """What says of every output projection how its kept columns shall be."""

    def fit(self, weight: torch.Tensor, cut: ModuleCut) -> Fit:
        """For a projection's weight (out, channels) as stored."""


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

    def fit(self, weight: torch.Tensor, cut: ModuleCut) -> Fit:
        if self.kind == "none" or self.stats is None:
            return Fit(weight[:, cut.kept], None)
        if cut.module == "experts":
            return self._fit_experts(weight, cut)
        mean = self.mean(cut)
        if self.kind == "bias":
            return mean_bias(weight, cut.kept, cut.pruned, mean)
        return least_squares(weight, cut.kept, cut.pruned, mean, self.gram(cut), self.ridge, self.lstsq_bias)

    def _fit_experts(self, weight: torch.Tensor, cut: ModuleCut) -> Fit:
        """Least squares expert by expert, without bias, which would act in every token that comes by; else nothing."""
        count = len(cut.stays["num_experts"])
        of_each = weight.unflatten(1, (count, -1))
        if self.kind == "bias":
            return Fit(weight[:, cut.kept], None)
        stats = self._stats.modules[cut.layer, "experts"]
        means, grams = torch.from_numpy(stats.mean).view(count, -1), torch.from_numpy(self._gram_of_experts(cut.layer))
        fits = [
            least_squares(of_each[:, i], kept, pruned, means[i], grams[i], self.ridge, with_bias=False)
            for i, kept, pruned in cut.experts
        ]
        return Fit(torch.cat([weight[:, :0].double(), *(fit.weight for fit in fits)], dim=1), None)

    def _gram_of_experts(self, layer: int) -> NDArray[np.float32]:
        """Gram matrices (experts, neurons, neurons); few tokens' lean towards those of like, unrelated channels."""
        found = self._stats.modules[layer, "experts"]
        grams = self._stats.gram(layer, "experts")
        if not isinstance(found, ExpertStats):
            raise TypeError("experts without their counts of tokens")
        square = found.square_mean.reshape(len(found.tokens), -1).mean(axis=1)
        alike = over_experts(square, found.tokens) * np.eye(grams.shape[1], dtype=np.float32)
        return shrunk(grams, alike, found.tokens)

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
