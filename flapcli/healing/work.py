"""One process's part of a healing: what it reads, where it stands, and the two models, loaded when they are needed."""

import gc
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedModel

from flapcli.artifacts.versions import versions
from flapcli.execution.device import Runtime, own_gpu
from flapcli.execution.loading import load_model
from flapcli.execution.memory import give_back
from flapcli.execution.ranks import Ranks
from flapcli.execution.settings import CalibrateOptions, Loss
from flapcli.healing.forward import Forward
from flapcli.healing.healing_request import HealingRequest
from flapcli.healing.healing_text import HealingText
from flapcli.healing.objective import Objective
from flapcli.healing.student import Student
from flapcli.healing.teacher import OnlineTeacher, Teacher
from flapcli.healing.training import Trainer
from flapcli.progress import Progress
from flapcli.storage.dtypes import dtype_name
from flapcli.storage.resume import Resume, key_of
from flapcli.texts.calibration_text import CalibrationText
from flapcli.texts.opening import first_predicted


@dataclass(frozen=True)
class Work:
    """One process's part of a healing."""

    request: HealingRequest
    ranks: Ranks
    progress: Progress
    force: bool

    @cached_property
    def runtime(self) -> Runtime:
        found = Runtime.of(self.request.execution, self.request.options.dtype)
        return replace(found, device=own_gpu(found.device))

    @cached_property
    def resume(self) -> Resume:
        """Rank 0's, which all ranks read."""
        facts = {
            "settings": self.request.settings, "input": self.request.input_sha256, "text": self.request.text_sha256,
            "dense": self.request.dense.fingerprint, "device": self.runtime.device.type,
            "dtype": dtype_name(self.runtime.dtype), "ranks": self.ranks.size, "versions": versions(),
        }  # fmt: skip
        if self.ranks.rank:
            self.ranks.agree(None)
        found = Resume(self.request.out, key_of(facts, b""), 0, self.ranks.size)
        if self.ranks.rank == 0:
            if self.force:
                found.discard()
            self.ranks.agree(None)
        return found

    @cached_property
    def text(self) -> CalibrationText:
        """The texts, by the dense model's tokenizer; what it writes itself lies beside the teacher's answers."""
        asked = self.request.options
        options = CalibrateOptions(
            asked.dataset, asked.step_windows, asked.seqlen, asked.seed, asked.dtype, text_column=asked.text_column
        )
        place = self.request.teacher.with_suffix(".self.json")
        return CalibrationText(place, self.request.dense, options, self.runtime, self.request.execution.device_map)

    @property
    def dense(self) -> PreTrainedModel:
        """The dense model, loaded once."""
        text = self.text
        if text.model is None:
            self.progress.doing(f"loading {text.checkpoint.name}")
            text.model = load_model(text.checkpoint, self.runtime.dtype, self.runtime.device, text.device_map)
        return text.model

    def forget_dense(self) -> None:
        """Make room for the student, where the dense model was loaded at all."""
        if self.text.model is not None:
            self.text.model = None
            gc.collect()
            give_back()

    @cached_property
    def start(self) -> int:
        """Place of a window's first token that is predicted."""
        return first_predicted(self.text.tokenizer)

    def online_teacher(self, k: int | None) -> OnlineTeacher:
        return OnlineTeacher(Forward(self.dense, self.request.dense, self.request.dense_layers), self.start, k)

    def trainer(self, teacher: Teacher | None, text: HealingText, steps: int, loss: Loss) -> Trainer:
        request = self.request
        options = request.options
        student = Student(request.checkpoint, options, self.runtime, request.execution, options.hidden_layers)
        objective = Objective(student, teacher, text, loss, self.start)
        return Trainer(objective, request.options, steps, request.execution.batch_size, self.ranks, self.progress)
