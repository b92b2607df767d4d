"""The training loop: AdamW over the student's parameters, validated as it goes, the best step kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flapcli.errors import FlapError
from flapcli.execution.batches import Batches
from flapcli.execution.ranks import Ranks
from flapcli.execution.settings import HealOptions
from flapcli.healing.objective import Objective
from flapcli.healing.training_state import SavedTraining, TrainingState
from flapcli.progress import Progress

WARM_UP, VALIDATIONS, PATIENCE = 0.05, 10, 3
RATES = {False: 1e-3, True: 5e-5}  # default of --lr, by whether all weights are trained
BETAS, CLIP = (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Trainer:
    """`steps` of the optimiser, whose windows all ranks share. Raises FlapError for a loss that is not finite."""

    objective: Objective
    options: HealOptions
    steps: int
    batch_size: int | None
    ranks: Ranks
    progress: Progress

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.options.step_windows * self.objective.text.windows.shape[1]

    def train(self, saved: SavedTraining) -> TrainingState:
        """Train to the end, or until it has done harm for long; goes on from what was `saved`."""
        parameters = self.objective.student.trained
        optimiser = torch.optim.AdamW(parameters.values(), betas=BETAS, weight_decay=0.0)
        state = saved.restore(optimiser) or TrainingState.begin(parameters, self.validate())
        if state.step:
            self.progress.note(f"going on after step {state.step} of {self.steps}")
        every = max(1, self.steps // VALIDATIONS)
        with self.progress.task("heal", self.steps * self.tokens, "tokens") as advance:
            advance(state.step * self.tokens)
            while state.step < self.steps and not state.harms(PATIENCE):
                state.took(self.step(optimiser, state.step))
                if state.step % every == 0 or state.step == self.steps:
                    state.mark(state.step * self.tokens, self.validate(), parameters)
                saved.after(state, optimiser)
                advance(self.tokens)
        return state

    def step(self, optimiser: torch.optim.Optimizer, step: int) -> float:
        """One step of the optimiser; returns the mean loss over all its predicted tokens."""
        parameters = list(self.objective.student.trained.values())
        sums = [torch.zeros_like(parameter) for parameter in parameters]

        def learn(part: slice) -> float:
            value, gradients = self.objective.gradients(part, parameters)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient)
            return value

        loss = self._mean(self.objective.text.held_out + step * self.options.step_windows, learn, backward=True)
        share = 1 / (self.options.step_windows * self.objective.predicted)
        for parameter, total in zip(parameters, self._of_all_ranks(sums), strict=True):
            parameter.grad = total * share
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.param_groups[0]["lr"] = self._rate(step)
        optimiser.step()
        optimiser.zero_grad()
        return loss

    def validate(self) -> float:
        """The mean loss over the held-out windows' predicted tokens."""
        return self._mean(0, self.objective.value, backward=False)

    def _mean(self, first: int, work: Callable[[slice], float], backward: bool) -> float:
        """The mean loss of the held-out windows, or of a step's from `first` on; `work` gives that of a batch."""
        count = self.options.step_windows if backward else self.objective.text.held_out
        mine, values = self.ranks.share(count), list[float]()

        def on(part: slice) -> None:
            values.append(work(slice(first + mine.start + part.start, first + mine.start + part.stop)))
            self.ranks.check()

        device = self.objective.student.forward.device
        seqlen = self.objective.text.windows.shape[1]
        Batches(seqlen, device, self.batch_size, self.progress, backward).run(mine.stop - mine.start, on)
        of_ranks = self.ranks.agree(math.fsum(values))
        mean = math.fsum(of_ranks) / (count * self.objective.predicted)
        if not math.isfinite(mean):
            raise FlapError("the loss of healing is not finite: lower --lr, or give --dtype float32")
        return mean

    def _of_all_ranks(self, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients summed over ranks, the same on every one."""
        if self.ranks.size == 1:
            return sums
        flat = self.ranks.summed_on_all(torch.cat([each.flatten() for each in sums]))
        parts = flat.split([each.numel() for each in sums])
        return [part.view_as(each) for part, each in zip(parts, sums, strict=True)]

    def _rate(self, step: int) -> float:
        """The learning rate: linear warm-up, then half a cosine down to nearly 0."""
        highest, warm = self.options.lr or RATES[self.options.full], max(1, round(WARM_UP * self.steps))
        if step < warm:
            return highest * (step + 1) / warm
        return highest * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
