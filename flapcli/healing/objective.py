"""What the student is held to, and the gradient of it, a batch of windows at a time (METHOD.md, Healing)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flapcli.execution.divergence import state_loss, token_losses
from flapcli.execution.head import loss_and_gradient, parts_of, predicting
from flapcli.execution.settings import Loss
from flapcli.healing.healing_text import HealingText
from flapcli.healing.student import Student
from flapcli.healing.teacher import Targets, Teacher

RowsLoss = Callable[[torch.Tensor, slice], torch.Tensor]


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
        states, hidden, loss_of, targets = self._forward(places)
        rows = predicting(states, self.start)
        losses = (float(loss_of(rows[part], part)) for part in parts_of(len(rows)))
        return sum(losses) + (float(self._hidden_loss(hidden, targets)) if hidden and targets else 0.0)

    def gradients(
        self, places: slice, parameters: Sequence[torch.nn.Parameter]
    ) -> tuple[float, Sequence[torch.Tensor | None]]:
        """The loss, and what it says to every parameter, by one pass back through the decoder."""
        with self.student.attention(self.text.windows.shape[1]):
            states, hidden, loss_of, targets = self._forward(places)
            value, gradient = loss_and_gradient(states, self.start, loss_of)
            ends, seeds = [states], [gradient]
            if hidden and targets:
                apart = self._hidden_loss(hidden, targets)
                value += apart.item()
                ends, seeds = [states, apart], [gradient, torch.ones_like(apart)]
            return value, torch.autograd.grad(ends, parameters, seeds, allow_unused=True)

    def _forward(self, places: slice) -> tuple[torch.Tensor, list[torch.Tensor], RowsLoss, Targets | None]:
        """The student's states and hidden states, what makes losses of its states' rows, and what the teacher says."""
        ids = torch.from_numpy(self.text.windows[places])
        with self.student.autocast:
            states, hidden = self.student.forward.states(ids)
        targets = self.teacher.targets(places, ids) if self.teacher else None
        following = ids[:, self.start :].flatten()

        def loss_of(rows: torch.Tensor, part: slice) -> torch.Tensor:
            with self.student.autocast:
                logits = self.student.forward.logits(rows)
            likeliest = targets.rows(part).to(logits.device) if targets and self.loss != "ce" else None
            return token_losses(logits, following[part].to(logits.device), likeliest, self.loss).sum()

        return states, hidden, loss_of, targets

    def _hidden_loss(self, hidden: list[torch.Tensor], targets: Targets) -> torch.Tensor:
        """Mean over layers, sum over places that predict."""
        pairs = zip(hidden, targets.hidden, strict=True)
        losses = [state_loss(predicting(ours, self.start), predicting(theirs, self.start)) for ours, theirs in pairs]
        return torch.stack([loss.to(hidden[0].device) for loss in losses]).mean()
