"""The eval.json artifact (DESIGN 1.6). No torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flapcli.errors import FlapError
from flapcli.rundir import atomic_file

FORMAT: Literal["flap-eval/1"] = "flap-eval/1"


class Size(BaseModel):
    """Parameters (a tied head counts once) and bytes of the tensors as stored, of `stored_as`."""

    model_config = ConfigDict(extra="forbid")

    parameters: int
    bytes: int
    stored_as: str


class Measurement(BaseModel):
    """One model's figures."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    perplexity: dict[str, float]
    tasks: dict[str, dict[str, float]] = {}
    speed: dict[str, float] | None = None
    size: Size


class EvalReport(Measurement):
    """The pruned model's figures, the dense model's beside them, and what they were measured with.

    `settings` are the options as asked, with the fingerprints of the checkpoints and texts read.
    """

    format: Literal["flap-eval/1"] = FORMAT
    baseline: Measurement | None = None
    settings: dict[str, Any]
    versions: dict[str, str]


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
    except (OSError, ValidationError) as error:
        raise FlapError(f"{path} is not of format {FORMAT}: {str(error).splitlines()[0]}") from error
