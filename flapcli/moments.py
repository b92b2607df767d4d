"""First and second moments of activations, exact to rounding and mergeable in any order."""

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """Count, mean and sum of squared deviations per channel; `mean` and `m2` are float64 (channels,).

    Merging is Chan's update (Chan, Golub, LeVeque 1979), so batches of any size and order give the same
    moments beyond rounding, and no running mean is subtracted twice (METHOD.md, Known traps).
    """

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def of(cls, activation: torch.Tensor) -> "Moments":
        """Moments of a batch, (..., channels) of any floating dtype; sums in float32."""
        x = activation.reshape(-1, activation.shape[-1]).float()
        mean = x.mean(0)
        deviation = x - mean
        # The float32 mean is off by rounding; what that leaves over in the deviations is put back.
        rest = deviation.mean(0).cpu().double()
        m2 = deviation.square_().sum(0).cpu().double() - len(x) * rest**2
        return cls(len(x), mean.cpu().double() + rest, m2)

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

    @property
    def variance(self) -> torch.Tensor:
        """Unbiased variance, float64 (channels,)."""
        return self.m2 / max(self.count - 1, 1)

    @property
    def square_mean(self) -> torch.Tensor:
        """Mean of squares, float64 (channels,)."""
        return self.m2 / self.count + self.mean**2

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())
