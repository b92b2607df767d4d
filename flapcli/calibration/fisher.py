"""Fisher information of a gate on every unit: how much the loss feels the unit (METHOD.md, Fisher information)."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from flapcli.execution.head import drawn, loss_and_gradient
from flapcli.execution.settings import fisher_windows


@dataclass(frozen=True)
class Sample:
    """The windows that Fisher information is made of, and what their labels are drawn by.

    `places` of the windows among those of a rank, ascending; `numbers` in [0, 1), float64 (windows, seqlen), each
    window's own, so that batches and ranks change nothing. The token at `start` is the first that is predicted.
    """

    places: NDArray[np.int64]
    numbers: torch.Tensor
    start: int = 1

    @classmethod
    def of(cls, shape: tuple[int, ...], share: slice, seed: int, start: int) -> "Sample":
        """For a calibration's windows of this shape (windows, seqlen), of which a rank has a share."""
        count, seqlen = shape
        size = fisher_windows(count)
        chosen = [at for i in range(size) if share.start <= (at := i * count // size) < share.stop]
        numbers = [[draw.random() for _ in range(seqlen)] for at in chosen if (draw := random.Random(f"{seed} {at}"))]
        places = np.array(chosen, np.int64) - share.start
        return cls(places, torch.tensor(numbers, dtype=torch.float64).reshape(-1, seqlen), start)

    def within(self, part: slice) -> slice:
        """Which of them are in a batch of the rank's windows."""
        start, stop = np.searchsorted(self.places, [part.start, part.stop])
        return slice(int(start), int(stop))


def gate_gradients(x: torch.Tensor, gradient: torch.Tensor, channels: int) -> torch.Tensor:
    """dL/dz_tu, (tokens, units) float32, for x and dL/dx (..., units * channels) of any floating dtype."""
    products = x.float() * gradient.reshape(x.shape).float()
    return products.reshape(-1, x.shape[-1] // channels, channels).sum(-1)


def loss_gradient(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, numbers: torch.Tensor, start: int = 1
) -> torch.Tensor:
    """dL/d(states) for what the head makes logits of, (batch, seqlen, hidden), and labels that the model itself draws.

    L is the cross entropy of those at `start` and later, in float32 whatever the model runs in; `numbers` as in
    `Sample`. Positions that predict none of these, as the last of a window, have zeros.
    """
    draws = numbers[:, start:].flatten()

    def loss(rows: torch.Tensor, part: slice) -> torch.Tensor:
        logits = head(rows[None])[0].float()
        labels = drawn(logits.detach().softmax(-1), draws[part])
        return cross_entropy(logits, labels, reduction="sum")

    return loss_and_gradient(states, start, loss)[1]


def gradient_before(
    forward: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """dL/d(states) from dL/d(forward(states)); forward is run again for it, so that only its graph is there."""
    leaf = states.detach().requires_grad_()
    with torch.enable_grad():
        output = forward(leaf)
    return torch.autograd.grad(output, leaf, gradient.to(output.device))[0]
