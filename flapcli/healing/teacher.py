"""What the dense model says of the windows, computed as it is asked for."""

from dataclasses import dataclass
from typing import Protocol

import torch

from flapcli.execution.divergence import Likeliest
from flapcli.execution.head import predicting
from flapcli.healing.forward import Forward


class Targets(Protocol):
    """What a batch of windows is held to: `hidden` states (batch, seqlen, hidden) by layer, and distributions."""

    @property
    def hidden(self) -> list[torch.Tensor]: ...

    def rows(self, part: slice) -> Likeliest:
        """Of some of the batch's predicting places, window after window."""


class Teacher(Protocol):
    def targets(self, places: slice, ids: torch.Tensor) -> Targets:
        """Of the windows at these `places` of the text, which are `ids` (batch, seqlen)."""


class _Computed:
    """Distributions of what the model makes of `ids`: over the whole vocabulary, or the `k` likeliest tokens."""

    @torch.no_grad()
    def __init__(self, forward: Forward, ids: torch.Tensor, start: int, k: int | None) -> None:
        states, self.hidden = forward.states(ids)
        self._states, self._forward, self._k = predicting(states, start), forward, k

    @torch.no_grad()
    def rows(self, part: slice) -> Likeliest:
        return Likeliest.of(self._forward.logits(self._states[part]), self._k)


@dataclass(frozen=True)
class OnlineTeacher:
    """The dense model in memory; `start` is the place of a window's first token that is predicted."""

    forward: Forward
    start: int
    k: int | None = None

    def targets(self, places: slice, ids: torch.Tensor) -> Targets:
        return _Computed(self.forward, ids, self.start, self.k)
