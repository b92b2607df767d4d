"""First and second moments of activations, exact to rounding and mergeable in any order."""

from dataclasses import dataclass

import torch

from flapcli.execution.ranks import Ranks


@dataclass
class Moments:
    """Count, and mean and sum of squared deviations of each channel (METHOD.md, Moments), float64 (channels,)."""

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def of(cls, activation: torch.Tensor) -> "Moments":
        """Moments of a batch, (..., channels) of any floating dtype."""
        return cls.from_sums(activation.numel() // activation.shape[-1], batch_sums(activation).cpu())

    @classmethod
    def from_sums(cls, count: int, sums: torch.Tensor) -> "Moments":
        """Moments from what `batch_sums` returned."""
        return cls.side_by_side([(count, sums)])[0]

    @classmethod
    def side_by_side(cls, parts: list[tuple[int, torch.Tensor]]) -> list["Moments"]:
        """Moments of several modules, each of so many tokens, from what `batch_sums` returned of each."""
        sizes = [sums.shape[1] for _, sums in parts]
        counts = torch.tensor([count for count, _ in parts]).repeat_interleave(torch.tensor(sizes))
        mean, rest, m2 = torch.cat([sums for _, sums in parts], dim=1).double()
        rest /= counts  # what rounding the mean to float32 left over in the deviations
        split = zip((mean + rest).split(sizes), (m2 - counts * rest**2).split(sizes), strict=True)
        return [cls(count, *found) for (count, _), found in zip(parts, split, strict=True)]

    @classmethod
    def none(cls, channels: int) -> "Moments":
        """Moments of no tokens yet."""
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def merge(self, other: "Moments") -> None:
        """Take in another set of tokens."""
        total = self.count + other.count
        if total == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / total)
        self.count = total

    def over(self, ranks: Ranks) -> "Moments":
        """On rank 0 the moments of all ranks, merged in rank order; elsewhere meaningless."""
        if ranks.size == 1:
            return self
        channels = len(self.mean)
        count = torch.tensor([self.count], dtype=torch.float64)
        total = Moments.none(channels)
        for part in ranks.gathered(torch.cat([count, self.mean, self.m2])):
            total.merge(Moments(int(part[0]), part[1 : 1 + channels], part[1 + channels :]))
        return total

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased variance, float64 (channels,)."""
        return self.m2 / max(self.count - 1, 1)

    @property
    def square_mean(self) -> torch.Tensor:
        """Mean of squares, float64 (channels,)."""
        return self.m2 / max(self.count, 1) + self.mean**2


def batch_sums(activation: torch.Tensor) -> torch.Tensor:
    """Mean, sum of deviations from it and sum of their squares, (3, channels) float32 on its device.

    From an activation (..., channels) of any floating dtype.
    """
    x = activation.reshape(-1, activation.shape[-1]).float()
    mean = x.mean(0)
    deviation = x - mean
    return torch.stack([mean, deviation.sum(0), deviation.square_().sum(0)])
