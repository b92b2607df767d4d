"""The sweep artifact: what a model costs and says at several ratios, from one calibration. No torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flapcli.errors import FlapError, problems
from flapcli.rundir import atomic_file

FORMAT: Literal["flap-sweep/1"] = "flap-sweep/1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figures(_Part):
    """One model's size (bytes of the tensors as stored, in `stored_as`) and its results by text and task."""

    parameters: int
    bytes: int
    stored_as: str
    perplexity: dict[str, float]
    tasks: dict[str, dict[str, float]] = {}
    task_average: float | None = None


class Row(Figures):
    """One ratio: as asked, as the plan achieved it, and each text's perplexity over the dense model's.

    `folder`, relative to this file's, holds its plan and evaluation.
    """

    ratio: float
    achieved: float
    relative: dict[str, float]
    folder: str


class Sweep(_Part):
    """Rows by rising ratio, the dense model beside them, and what they were made with."""

    format: Literal["flap-sweep/1"] = FORMAT
    model: str
    fingerprint: str
    stats_sha256: str
    settings: dict[str, Any]
    dense: Figures | None
    rows: list[Row]
    versions: dict[str, str]


def save_sweep(path: Path, sweep: Sweep) -> None:
    """Write the artifact atomically. Raises FlapError where the file system refuses."""
    with atomic_file(path) as scratch:
        scratch.write_text(sweep.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_sweep(path: Path) -> Sweep:
    """Read sweep.json. Raises FlapError where it is missing or not of the format."""
    try:
        return Sweep.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise FlapError(f"no sweep at {path}: run `flap sweep` first") from error
    except ValidationError as error:
        raise FlapError(f"{path} is not of format {FORMAT}: {problems(error)}") from error
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error
