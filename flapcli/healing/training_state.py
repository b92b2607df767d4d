"""Where a training stands, and how it is kept so that a killed one goes on to the same bits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flapcli.architecture.flap_section import HealingPoint
from flapcli.checkpoints.tensor_file import load_tensors, save_tensors
from flapcli.storage.resume import Pauses, Resume

Parameters = Mapping[str, torch.nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass
class TrainingState:
    """After `step` steps: the curve so far, and the parameters where validation was best. `total` is the sum of the
    losses of the steps since the last point."""

    best: dict[str, torch.Tensor]
    curve: list[HealingPoint]
    step: int = 0
    best_point: int = 0
    total: float = 0.0
    counted: int = 0

    @classmethod
    def begin(cls, parameters: Parameters, validation: float) -> "TrainingState":
        return cls(_copied(parameters), [HealingPoint(tokens=0, training=None, validation=validation)])

    def took(self, loss: float) -> None:
        """One more step, of this mean loss."""
        self.step, self.total, self.counted = self.step + 1, self.total + loss, self.counted + 1

    def mark(self, tokens: int, validation: float, parameters: Parameters) -> None:
        """One more point of the curve; `parameters` are kept where it is the best so far."""
        self.curve.append(HealingPoint(tokens=tokens, training=self.total / self.counted, validation=validation))
        self.total, self.counted = 0.0, 0
        if validation < self.curve[self.best_point].validation:
            self.best, self.best_point = _copied(parameters), len(self.curve) - 1

    def harms(self, points: int) -> bool:
        """Whether the last so many points are all worse than where training began.

        One that only stands still may gain yet, when the rate falls.
        """
        first, *since = self.curve
        return len(since) >= points and all(point.validation >= first.validation for point in since[-points:])

    @torch.no_grad()
    def put_best(self, parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(self.best[name])


def _copied(parameters: Parameters) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


class SavedTraining:
    """The state in the resume folder, with the optimiser's moments and the random numbers' place.

    Who `writes` saves it now and then; all ranks read the same file.
    """

    def __init__(self, resume: Resume, parameters: Parameters, writes: bool = True) -> None:
        self.resume, self.parameters, self.writes = resume, parameters, writes
        self.path = resume.folder / "training.safetensors"
        self._pauses = Pauses()

    @torch.no_grad()
    def restore(self, optimiser: torch.optim.Optimizer) -> TrainingState | None:
        """What an earlier run saved; parameters, optimiser and random numbers are as they were then."""
        if not self.resume.found or not self.path.exists():
            return None
        tensors, metadata = load_tensors(self.path)
        said = json.loads(metadata["state"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            optimiser.state[parameter] = {"step": torch.tensor(float(said["step"])), **moments}
        torch.set_rng_state(tensors["random"])
        best = {name: tensors[f"best.{name}"] for name in self.parameters}
        return TrainingState(best, [HealingPoint(**point) for point in said.pop("curve")], **said)

    def after(self, state: TrainingState, optimiser: torch.optim.Optimizer) -> None:
        """Save now and then."""
        if not self.writes or not self._pauses.is_due:
            return
        tensors = {"random": torch.get_rng_state()} | {f"best.{name}": value for name, value in state.best.items()}
        for name, parameter in self.parameters.items():
            tensors[f"now.{name}"] = parameter.detach()
            tensors |= {f"{moment}.{name}": optimiser.state[parameter][moment] for moment in MOMENTS}
        said = {key: value for key, value in vars(state).items() if key not in ("best", "curve")}
        said["curve"] = [point.model_dump() for point in state.curve]
        self.resume.ready()
        with self._pauses.saving():
            save_tensors(self.path, tensors, {"state": json.dumps(said)})
