"""The base of everything that flap reads from JSON and YAML."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Typed data that is checked when it is made and never changes; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def unsaid() -> Any:
    """A field that is left out where it is None, so that artifacts without it stay what they were before it came."""
    return Field(default=None, exclude_if=lambda value: value is None)
