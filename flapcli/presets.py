"""Presets: named combinations of the stages' options. What the command line gives stands. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flapcli.errors import UsageError
from flapcli.mixture import SELF, combined


@dataclass(frozen=True)
class Preset:
    """What the stages do where the command line leaves it open; None leaves it to the option's own default.

    `self_share` of the calibration windows are text that the model writes itself.
    """

    metric: Literal["FISHER"] | None = None
    structure: Literal["AL-AM"] | None = None
    compensate: Literal["lstsq"] | None = None
    bias: bool = True
    gram: bool = False
    fisher: bool = False
    self_share: float = 0.0

    @property
    def adds_bias(self) -> bool | None:
        """Whether compensation adds biases; None where the method decides."""
        return self.bias if self.compensate else None

    def text(self, named: Sequence[str] | None, default: str, nsamples: int) -> str:
        """The calibration text: what `--dataset` names, with the model's own text mixed in.

        Shares that the user gives are left alone, a single one such as `pydoc:1` too, and so is `self`.
        """
        given = combined(named) if named else default
        asked = named is None or list(named) == [given]
        if not asked or given == SELF or round(self.self_share * nsamples) == 0:
            return given
        return f"{given}:{1 - self.self_share:.6g}+{SELF}:{self.self_share:.6g}"


PRESETS = {
    "paper": Preset(),
    # What won on the scoreboard (tests/benchmarks/quality.py, README), on text that no choice was made by.
    "best": Preset("FISHER", "AL-AM", "lstsq", bias=False, gram=True, fisher=True, self_share=0.2),
}


def preset_of(name: str, method: str = "flap") -> Preset:
    """The preset of that name. Raises UsageError with a baseline, which is defined by options of its own."""
    if name != "paper" and method != "flap":
        raise UsageError(f"--preset {name}: --method {method} is a baseline with options of its own; leave out one")
    return PRESETS[name]
