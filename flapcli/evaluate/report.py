"""The eval.json artifact (DESIGN 1.6). No torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flapcli.errors import FlapError, problems
from flapcli.rundir import atomic_file

FORMAT: Literal["flap-eval/1"] = "flap-eval/1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Size(_Part):
    """Parameters (a tied head counts once) and bytes of the tensors as stored, of `stored_as`."""

    parameters: int
    bytes: int
    stored_as: str


class TextDetails(_Part):
    """What a perplexity rests on, and its likes that do not depend on the tokenizer.

    `standard_error` is the perplexity's, from the spread of the windows' mean losses; `bits_per_byte` is over
    the UTF-8 bytes of the predicted tokens' text, which are `tokens` in number.
    """

    standard_error: float
    bits_per_byte: float
    windows: int
    tokens: int
    bytes: int


class Spread(_Part):
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


class SpeedCase(_Part):
    """Tokens per second at one batch size and prompt length.

    `macs_prefill` and `macs_decode` are multiply-accumulates per token by formula (`evaluate.cost`).
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill: Spread
    decode: Spread
    macs_prefill: int
    macs_decode: int


class SpeedDetails(_Part):
    """Every case measured and on what; `weight_bytes` are the weights in memory in `dtype`.

    `odd_widths` is the share of layers whose MLP width is no multiple of 16.
    """

    device: str
    dtype: str
    threads: int
    rounds: int
    weight_bytes: int
    odd_widths: float
    cases: list[SpeedCase]


class Speedup(_Part):
    """Pruned over dense tokens per second, of rounds run next to each other; `possible` by the MACs removed."""

    prefill: Spread
    decode: Spread
    prefill_possible: float
    decode_possible: float


class Measurement(_Part):
    """One model's figures.

    `tasks` holds lm-eval's metrics, each standard error beside its metric as `NAME_stderr`; `task_failures`
    the reason for every task that could not be run; `task_average` the mean of `averaged_tasks`' main metrics.
    """

    checkpoint: str
    perplexity: dict[str, float]
    perplexity_details: dict[str, TextDetails] = {}
    tasks: dict[str, dict[str, float]] = {}
    averaged_tasks: list[str] = []
    task_average: float | None = None
    task_failures: dict[str, str] = {}
    speed: dict[str, int | float] | None = None
    speed_details: SpeedDetails | None = None
    size: Size


class EvalReport(Measurement):
    """The pruned model's figures, the dense model's beside them, and what they were measured with.

    `settings` are the options as asked, with the fingerprints of the checkpoints and texts read; `speedup`
    compares both models case by case.
    """

    format: Literal["flap-eval/1"] = FORMAT
    baseline: Measurement | None = None
    speedup: list[Speedup] = []
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def all_failures(self) -> dict[str, str]:
        """Why tasks could not be run, on either model."""
        return (self.baseline.task_failures if self.baseline else {}) | self.task_failures


def save_report(path: Path, report: EvalReport) -> None:
    """Write the artifact atomically. Raises FlapError where the file system refuses."""
    ordered = {"format": report.format} | report.model_dump()
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def load_report(path: Path) -> EvalReport:
    """Read eval.json. Raises FlapError where it is missing or not of the format."""
    try:
        return EvalReport.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise FlapError(f"no evaluation at {path}: run `flap eval` first") from error
    except ValidationError as error:
        raise FlapError(f"{path} is not of format {FORMAT}: {problems(error)}") from error
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error
