"""A calibration as asked for, before anything heavy is imported."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flapcli.artifacts.stats import StatsHeader
from flapcli.checkpoints import Checkpoint
from flapcli.execution.settings import CalibrateOptions, Execution
from flapcli.texts.mixture import Mixture
from flapcli.texts.opening import opens_as

# How Fisher information is made (calibration/fisher.py), so that what was made in another way is made anew.
FISHER_OF = "own labels, every 8th window, 128 at least"


@dataclass(frozen=True)
class CalibrationRequest:
    """Of which checkpoint, into which file, on what text, and how the model runs."""

    out: Path
    checkpoint: Checkpoint
    options: CalibrateOptions
    execution: Execution

    @cached_property
    def text_sha256(self) -> str | None:
        """Hash of the texts that lie on this machine; None where none does."""
        return Mixture.read(str(self.options.dataset)).sha256()

    @cached_property
    def tokenizer_sha256(self) -> str | None:
        """Hash of what lies beside the weights and decides token ids."""
        return self.checkpoint.tokenizer_sha256(Mixture.read(str(self.options.dataset)).may_hold_chats)

    @property
    def settings(self) -> dict[str, Any]:
        """What the statistics record of the options; the unit of attention is said with the model."""
        of_model = ("attention_unit", "prefers_query_heads")
        asked = {key: value for key, value in asdict(self.options).items() if key not in of_model}
        return asked | {"fisher_of": FISHER_OF if self.options.fisher else None}

    def answered_by(self, found: StatsHeader) -> bool:
        """Whether these statistics are what is asked for.

        A dtype that `auto` stands for is as good, and so are Gram matrices and Fisher information on top. What does
        not say its tokenizer, of an older version, is taken to be of this one.
        """
        asked = self.settings
        recorded = {"gram_dtype": "float32", "fisher": False, "fisher_of": None} | found.settings
        if asked["dtype"] == found.calibration.dtype:
            recorded["dtype"] = asked["dtype"]
        if not asked["gram"]:
            recorded |= {"gram": False, "gram_dtype": asked["gram_dtype"]}
        if not asked["fisher"]:
            recorded |= {"fisher": False, "fisher_of": None}
        model, checkpoint = found.model, self.checkpoint
        theirs = (model.fingerprint, model.name, model.revision)
        same_model = theirs == (checkpoint.fingerprint, checkpoint.name, checkpoint.hub.revision)
        text = found.calibration
        same_text = text.source_sha256 == self.text_sha256 and text.tokenizer_sha256 in (None, self.tokenizer_sha256)
        same_unit = model.attention_unit == checkpoint.shape.attention_unit
        same = same_model and recorded == asked and same_text and same_unit
        return same and opens_as(checkpoint, text.begins_with)
