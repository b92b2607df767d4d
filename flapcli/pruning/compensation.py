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
from flapcli.execution.device import sums_dtype
from flapcli.pruning.covariance import Centred, Solution, combined, solve
from flapcli.pruning.cut import ModuleCut
from flapcli.storage.linear_algebra import row_blocks, sum_of_squares, total

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fit:
    """The kept columns (out, |K|) as they shall be, and what is added to the bias (out,), float64; on the CPU.

    `before` and `after`: share of the output's variance on the calibration text that is lost when the pruned
    channels are replaced by their mean, and with this fit; None where no covariance is known. `raised`: the ridge,
    where it had to grow. `whole` is that variance, and `added` lambda.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    before: float | None = None
    after: float | None = None
    raised: float | None = None
    whole: float = 0.0
    added: float = 0.0


def mean_bias(weight: torch.Tensor, kept: torch.Tensor, pruned: torch.Tensor, mean: torch.Tensor) -> Fit:
    """b' = b + W_P mu_P: the pruned channels' mean goes on acting (the paper; METHOD.md, Compensation).

    `weight` (out, channels) of any floating dtype, `kept` and `pruned` indices, `mean` mu (channels,).
    """
    return Fit(weight[:, kept], combined(weight[:, pruned], mean[pruned].double()))


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

    `gram` (channels, channels) is G, the mean of x xᵀ; the others are as in `mean_bias`. On its device, in its dtype
    or in float64 (`solve`), and in no more than two matrices of its size beside it.
    """
    device, mean = gram.device, mean.to(gram.device, sums_dtype(gram.device))
    kept, pruned, weight = kept.to(device), pruned.to(device), weight.to(device)
    centred = Centred(gram, mean if with_bias else torch.zeros_like(mean))
    gone = weight.index_select(1, pruned).to(gram.dtype)
    bias, before = combined(gone, mean[pruned]), Centred(gram, mean).power(gone, pruned)
    missed = before if with_bias else before + float(bias.square().sum())
    found = Solution(gone.new_zeros(len(weight), len(kept)), 0.0, 0.0, None)
    if len(kept) and len(pruned):
        found = solve(centred, kept, ridge, len(weight), lambda part: centred.product(part(gone), pruned, kept))
    moved, energy, added, raised = found
    bias -= combined(moved, mean[kept])
    square, along = _add_kept(moved, weight, kept)
    # What is left over is at right angles to the kept channels, but for lambda.
    lost = max(missed - energy - added * square, 0.0)
    whole = lost + 2 * added * along + centred.power(moved, kept)
    if not with_bias:
        whole -= float(combined(weight, mean).square().sum())
    shares = (before / whole, lost / whole) if whole > 0 else (0.0, 0.0)
    return Fit(moved.cpu(), bias.double().cpu() if with_bias else None, *shares, raised, whole, added)


def _add_kept(change: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> tuple[float, float]:
    """Make D into W' = W_K + D, in its place; |D|^2 and the sum of D * W'."""
    square = along = 0.0
    for own in row_blocks(len(kept)):
        part, old = change[:, own], weight.index_select(1, kept[own])
        here = sum_of_squares(part)
        square, along = square + here, along + here + total(part * old)
        part += old
    return square, along


def refit_errors(
    weight: torch.Tensor,
    kept: torch.Tensor,
    stats: Centred,
    closed: Fit,
    moved: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[float, float]:
    """`Fit.before` and `after` of other kept columns and another gain than the closed form's, whose minimum is known.

    `stats` are the activations' G and mean, of which the closed form is, without bias where it has none.
    """
    change, kept_there = moved - closed.weight, kept.to(stats.mu.device)
    along = sum(total(change[:, own] * (closed.weight[:, own] - weight[:, kept[own]])) for own in row_blocks(len(kept)))
    more, change = -2 * closed.added * along, change.to(stats.gram)
    if closed.bias is None or bias is None:
        stats = stats._replace(mu=torch.zeros_like(stats.mu))
    else:
        off = bias - closed.bias + combined(change, stats.mu[kept_there]).double().cpu()
        more += float(off.square().sum())
    more += stats.power(change, kept_there)
    before, after = closed.before or 0.0, closed.after or 0.0
    return before, max(after + more / closed.whole, 0.0) if closed.whole > 0 else 0.0


class Means(NamedTuple):
    """Means over tokens of x (|K|,), r (out,), x xᵀ (|K|, |K|) and r xᵀ (out, |K|)."""

    x: torch.Tensor
    r: torch.Tensor
    xx: torch.Tensor
    rx: torch.Tensor


def refit_on_means(
    start: torch.Tensor, means: Means, ridge: float, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """W0 + D and e (None without bias) of METHOD.md, Sequential fit, on the CPU; and `Fit.raised`.

    `start` is W0 (out, |K|), and `means` hold r, what W0 and the projection's own bias leave to explain, and are lost.
    Solved on their device.
    """
    mu, rx = means.x if with_bias else torch.zeros_like(means.x), means.rx
    change, raised = torch.zeros_like(start), None
    if len(mu):
        rx.addr_(means.r.to(rx), mu.to(rx), alpha=-1)
        everything = torch.arange(len(mu), device=mu.device)
        change, *_, raised = solve(Centred(means.xx, mu), everything, ridge, len(rx), lambda part: part(rx))
    gain = means.r - combined(change, means.x) if with_bias else None
    return change.to(start).add_(start), gain if gain is None else gain.double().cpu(), raised


class Compensation(Protocol):
    """What says of every output projection how its kept columns shall be, and of what is not cut what it is."""

    def fit(self, weight: torch.Tensor, cut: ModuleCut) -> Fit:
        """For a projection's weight (out, channels) as stored."""

    def copied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """For a tensor of the source."""


@dataclass(frozen=True)
class ClosedForm:
    """The compensations that need nothing but statistics.

    `kind` is none, bias or lstsq; all but none read `stats`, lstsq its Gram matrices too, with `ridge`, on `device`.
    """

    kind: str
    stats: Stats | None = None
    ridge: float = 0.0
    lstsq_bias: bool = True
    device: torch.device = CPU

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
        means = torch.from_numpy(stats.mean).view(count, -1)
        grams = torch.from_numpy(self._gram_of_experts(cut.layer)).to(self.device)
        fits = [
            least_squares(of_each[:, i], kept, pruned, means[i], grams[i], self.ridge, with_bias=False)
            for i, kept, pruned in cut.experts
        ]
        return Fit(torch.cat([weight[:, :0].float(), *(fit.weight for fit in fits)], dim=1), None)

    def _gram_of_experts(self, layer: int) -> NDArray[np.float32]:
        """Gram matrices (experts, neurons, neurons); few tokens' lean towards those of like, unrelated channels."""
        found = self._stats.modules[layer, "experts"]
        grams = self._stats.gram(layer, "experts")
        if not isinstance(found, ExpertStats):
            raise TypeError("experts without their counts of tokens")
        square = found.square_mean.reshape(len(found.tokens), -1).mean(axis=1)
        alike = over_experts(square, found.tokens) * np.eye(grams.shape[1], dtype=np.float32)
        return shrunk(grams, alike, found.tokens)

    def copied(self, _name: str, tensor: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return tensor

    def mean(self, cut: ModuleCut) -> torch.Tensor:
        """Mean of the module's channels, float32 (channels,)."""
        return torch.from_numpy(self._stats.modules[cut.layer, cut.module].mean)

    def gram(self, cut: ModuleCut) -> torch.Tensor:
        """Mean of x xᵀ of the module's channels, float32 (channels, channels), on the device."""
        return torch.from_numpy(self._stats.gram(cut.layer, cut.module)).to(self.device)

    @property
    def _stats(self) -> Stats:
        if self.stats is None:
            raise ValueError(f"{self.kind} has no statistics")
        return self.stats
