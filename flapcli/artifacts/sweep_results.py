"""The sweep artifact: what a model costs and says at several ratios, from one calibration. No torch."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from flapcli.artifacts.eval_report import Positive, Size
from flapcli.artifacts.reuse import Kind, load_json, says_format
from flapcli.storage.atomic import atomic_file
from flapcli.storage.record import Record, unsaid

FORMAT: Literal["flap-sweep/1"] = "flap-sweep/1"


class Figures(Size):
    """One model's size and its results by text and task."""

    perplexity: dict[str, Positive]
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    task_average: float | None = None


class Row(Figures):
    """One ratio: as asked, as the plan achieved it, and each text's perplexity over the dense model's.

    `method` where several are compared.
    `folder`, relative to this file's, holds its plan and evaluation.
    """

    ratio: float
    achieved: float
    relative: dict[str, float]
    folder: str
    method: str | None = unsaid()


class Sweep(Record):
    """Rows by rising ratio (of each method), the dense model beside them, and what they were made with.

    `unfinished` says what stopped it where rows are missing.
    """

    format: Literal["flap-sweep/1"] = FORMAT
    model: str
    fingerprint: str
    stats_sha256: str
    settings: dict[str, Any]
    dense: Figures | None
    rows: list[Row]
    unfinished: str | None = None
    versions: dict[str, str]

    @property
    def series(self) -> list[tuple[str, str, list[Row]]]:
        """The lines of its picture: what each is called, its text, and its rows by rising ratio."""
        methods = dict.fromkeys(row.method for row in self.rows)
        return [
            (", ".join(filter(None, (method, Path(text).name))), text, [r for r in self.rows if r.method == method])
            for method in methods
            for text in self.rows[0].perplexity
        ]

    @model_validator(mode="after")
    def _same_texts(self) -> Self:
        models = [*self.rows, *([self.dense] if self.dense else [])]
        if not self.unfinished and not self.rows:
            raise ValueError("it has no rows")
        if any(model.perplexity.keys() != models[0].perplexity.keys() for model in models):
            raise ValueError("its models were not measured on the same texts")
        return self


def save_sweep(path: Path, sweep: Sweep) -> None:
    """Write the artifact atomically. Raises FlapError where the file system refuses."""
    with atomic_file(path) as scratch:
        scratch.write_text(sweep.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_sweep(path: Path) -> Sweep:
    """Read sweep.json. Raises FlapError where it is missing or not of the format."""
    return load_json(path, Sweep, f"no sweep at {path}: run `flap sweep` first")


SWEEP = Kind(
    load_sweep,
    lambda path: says_format(path, "flap-sweep/"),
    "exists and is not a sweep of flap's: move it away or write elsewhere",
)
