"""What the student is held to, and the gradient of it, a batch of windows at a time (METHOD.md, Healing)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flapcli.execution.settings import Loss
from flapcli.healing.divergence import state_loss, token_losses
from flapcli.healing.healing_text import HealingText
from flapcli.healing.student import Student
from flapcli.healing.teacher import Targets, Teacher

ROWS = 256  # tokens whose logits exist at once


@dataclass(frozen=True)
class Objective:
    """Who learns what from whom; `teacher` None where the text alone is learnt from.

    `start` is the place of a window's first token that is predicted. Losses are sums over predicted tokens.
    """

    student: Student
    teacher: Teacher | None
    text: HealingText
    loss: Loss
    start: int

    @property
    def predicted(self) -> int:
        """Tokens of a window that are."""
        return self.text.windows.shape[1] - self.start

    @torch.no_grad()
    def value(self, places: slice) -> float:
        """The loss of the windows at these places of the text."""
        states, hidden, ids, targets = self._forward(places)
        rows = self._predicting(states)
        losses = (float(self._rows_loss(rows[part], ids[part], targets, part)) for part in self._parts(len(rows)))
        return sum(losses) + (float(self._hidden_loss(hidden, targets)) if hidden and targets else 0.0)

    def gradients(
        self, places: slice, parameters: Sequence[torch.nn.Parameter]
    ) -> tuple[float, Sequence[torch.Tensor | None]]:
        """The loss, and what it says to every parameter.

        The head takes a few tokens at once; the rest of the way back is one pass through the decoder.
        """
        states, hidden, ids, targets = self._forward(places)
        rows, value = self._predicting(states).detach(), 0.0
        found: list[torch.Tensor] = []
        for part in self._parts(len(rows)):
            leaf = rows[part].requires_grad_()
            loss = self._rows_loss(leaf, ids[part], targets, part)
            found += torch.autograd.grad(loss, leaf)
            value += loss.item()
        gradient = torch.zeros_like(states)
        gradient[:, self.start - 1 : -1] = torch.cat(found).view(len(states), self.predicted, -1)
        ends, seeds = [states], [gradient]
        if hidden and targets:
            apart = self._hidden_loss(hidden, targets)
            value += apart.item()
            ends, seeds = [states, apart], [gradient, torch.ones_like(apart)]
        return value, torch.autograd.grad(ends, parameters, seeds, allow_unused=True)

    def _forward(self, places: slice) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, Targets | None]:
        """The student's states and hidden states, the tokens to be predicted, (n,), and what the teacher says."""
        ids = torch.from_numpy(self.text.windows[places])
        with self.student.autocast:
            states, hidden = self.student.forward.states(ids)
        targets = self.teacher.targets(places, ids) if self.teacher else None
        return states, hidden, ids[:, self.start :].flatten().to(states.device), targets

    def _predicting(self, states: torch.Tensor) -> torch.Tensor:
        """Rows (n, hidden) of the places that predict a token."""
        return states[:, self.start - 1 : -1].flatten(0, 1)

    def _parts(self, rows: int) -> Iterator[slice]:
        return (slice(first, min(first + ROWS, rows)) for first in range(0, rows, ROWS))

    def _rows_loss(self, rows: torch.Tensor, ids: torch.Tensor, targets: Targets | None, part: slice) -> torch.Tensor:
        with self.student.autocast:
            logits = self.student.forward.logits(rows)
        likeliest = targets.rows(part).to(logits.device) if targets and self.loss != "ce" else None
        return token_losses(logits, ids.to(logits.device), likeliest, self.loss).sum()

    def _hidden_loss(self, hidden: list[torch.Tensor], targets: Targets) -> torch.Tensor:
        """Mean over layers, sum over places that predict."""
        pairs = zip(hidden, targets.hidden, strict=True)
        return torch.stack(
            [
                state_loss(self._predicting(ours), self._predicting(theirs)).to(hidden[0].device)
                for ours, theirs in pairs
            ]
        ).mean()
