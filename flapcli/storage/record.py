"""The base of everything that flap reads from JSON and YAML."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Typed data that is checked when it is made and never changes; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
