"""The eval.json artifact. No torch."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from flapcli.artifacts.reuse import Kind, load_json, says_format
from flapcli.storage.atomic import atomic_file
from flapcli.storage.record import Record, unsaid

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # what no measurement falls short of


class Size(Record):
    """Parameters (a tied head counts once) and bytes of the tensors as stored, of `stored_as`."""

    parameters: int
    bytes: int
    stored_as: str


class Divergence(Record):
    """How far a model's next-token distributions q are from the dense model's p, over a text's predicted tokens.

    `kl` is the mean of KL(p || q) = sum p (ln p - ln q), in nats a token, `standard_error` its own, from the spread of
    the windows' means; `equal_tokens`, the share of tokens at whose place both models hold the same one likeliest.
    """

    kl: float
    standard_error: float
    equal_tokens: float


class TextDetails(Record):
    """What a perplexity rests on, and its likes that do not depend on the tokenizer.

    `standard_error` is the perplexity's, from the spread of the windows' mean losses; `bits_per_byte` is over
    the UTF-8 bytes of the predicted tokens' text, which are `tokens` in number. `begins_with` are the special tokens
    that every window begins with, where the tokenizer has some; `of_windows`, how many the text has where not all were
    read; `dtype`, what the model ran in; `divergence`, of a pruned model where that was asked for.
    """

    standard_error: float
    bits_per_byte: float
    windows: int
    tokens: int
    bytes: int
    begins_with: str | None = unsaid()
    of_windows: int | None = unsaid()
    dtype: str | None = unsaid()
    divergence: Divergence | None = unsaid()


class Spread(Record):
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


class SpeedCase(Record):
    """Tokens per second at one batch size and prompt length.

    `macs_prefill` and `macs_decode` are multiply-accumulates per token by formula (`evaluation.speed`).
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill: Spread
    decode: Spread
    macs_prefill: int
    macs_decode: int


class SpeedDetails(Record):
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


class Speedup(Record):
    """Pruned over dense tokens per second, of rounds run next to each other; `possible` by the MACs removed."""

    model_config = ConfigDict(frozen=False)

    prefill: Spread
    decode: Spread
    prefill_possible: float
    decode_possible: float


class Measurement(Record):
    """One model's figures.

    `tasks` holds lm-eval's metrics, each standard error beside its metric as `NAME_stderr`; `task_failures`
    the reason for every task that could not be run; `task_average` the mean of `averaged_tasks`' main metrics.
    """

    model_config = ConfigDict(frozen=False)  # tasks and speed come in after perplexities

    checkpoint: str
    perplexity: dict[str, Positive]
    perplexity_details: dict[str, TextDetails] = Field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    averaged_tasks: list[str] = Field(default_factory=list)
    task_average: float | None = None
    task_failures: dict[str, str] = Field(default_factory=dict)
    speed: dict[str, int | float] | None = None
    speed_details: SpeedDetails | None = None
    size: Size


class EvalReport(Measurement):
    """The pruned model's figures, the dense model's beside them, and what they were measured with.

    `settings` are the options as asked, with the fingerprints of the checkpoints and texts read; `speedup`
    compares both models case by case. `unfinished` says what stopped it where not all was measured that was asked.
    """

    format: Literal["flap-eval/1"] = "flap-eval/1"
    baseline: Measurement | None = None
    speedup: list[Speedup] = Field(default_factory=list)
    unfinished: str | None = None
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether all that was asked could be measured."""
        return self.unfinished is None and not self.all_failures

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
    return load_json(path, EvalReport, f"no evaluation at {path}: run `flap eval` first")


EVAL = Kind(
    load_report,
    lambda path: says_format(path, "flap-eval/"),
    "exists and is not flap's: move it away or write elsewhere",
)
