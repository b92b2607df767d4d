"""A healing as asked for, before anything heavy is imported."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flapcli.architecture.flap_section import FlapSection
from flapcli.artifacts.pruned_folder import PrunedFolder
from flapcli.checkpoints import Checkpoint
from flapcli.execution.settings import Execution, HealOptions


@dataclass(frozen=True)
class HealingRequest:
    """Of which pruned `folder`, opened as `checkpoint` too, by which dense model, into which folder.

    `options` are resolved; `teacher` is where its answers are kept. `input_sha256` is of what the folder says of
    itself, `text_sha256` of the texts on this machine.
    """

    out: Path
    folder: PrunedFolder
    checkpoint: Checkpoint
    dense: Checkpoint
    options: HealOptions
    execution: Execution
    teacher: Path
    input_sha256: str
    text_sha256: str | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the folder records of the options."""
        return json.loads(json.dumps(asdict(self.options)))

    def answered_by(self, found: FlapSection) -> bool:
        """Whether a folder that says this of itself is what is asked for."""
        healed = found.healed
        if healed is None:
            return False
        asked = (self.settings, self.input_sha256, self.text_sha256)
        return (healed.settings, healed.input_sha256, healed.text_sha256) == asked

    @property
    def teaches(self) -> bool:
        """Whether the dense model is needed for what is learnt, and not the text alone."""
        return self.options.loss != "ce" or bool(self.options.hidden_layers)

    @property
    def keeps_teacher(self) -> bool:
        """Whether the dense model's answers are kept on disk."""
        return self.teaches and not self.options.online

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The dense model's layers that those to be compared were."""
        kept = self.folder.flap.source_layers
        return tuple(kept[layer] if kept else layer for layer in self.options.hidden_layers)
