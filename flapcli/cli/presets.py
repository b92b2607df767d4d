"""Presets: named combinations of the stages' options. What the command line gives stands. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flapcli.errors import UsageError
from flapcli.execution.settings import CalibrateOptions, Compensate
from flapcli.texts.mixture import SELF, combined


@dataclass(frozen=True)
class Preset:
    """What the stages do where the command line leaves it open; None leaves it to the option's own default.

    `nsamples`: windows. `own_text`: beside them as many of text that the model writes itself. `query_heads`: units of
    attention are single query heads, of models whose heads share keys in equal groups.
    """

    metric: Literal["FISHER-OBS"] | None = None
    structure: Literal["AL-AM"] | None = None
    compensate: Compensate | None = None
    bias: bool = True
    sequential: bool = False
    own_text: bool = False
    query_heads: bool = False
    nsamples: int = CalibrateOptions.nsamples

    def compensation(
        self, compensate: Compensate | None, bias: bool | None, sequential: bool | None
    ) -> tuple[Compensate | None, bool, bool]:
        """`--compensate`, `--bias` and `--sequential`; a preset's own go with its own compensation alone."""
        compensate = compensate or self.compensate
        own = self if compensate == self.compensate else Preset()
        return compensate, own.bias if bias is None else bias, own.sequential if sequential is None else sequential

    def text(self, named: Sequence[str] | None, default: str, nsamples: int | None = None) -> tuple[str, int]:
        """The calibration text and how many windows: what is asked for, and the model's own text beside it.

        Shares that the user gives are left alone, a single one such as `pydoc:1` too, and so is `self`.
        """
        nsamples = nsamples or self.nsamples
        given = combined(named) if named else default
        asked = named is None or list(named) == [given]
        if not (self.own_text and asked) or given == SELF:
            return given, nsamples
        return combined([given, SELF]), 2 * nsamples


PRESETS = {
    "paper": Preset(),
    # What won in trials, of which tests/benchmarks/README.md tells; quality.py beside it holds it against the others.
    # Eight times its windows take eight times as long, and gain little on other text.
    "best": Preset(
        "FISHER-OBS", "AL-AM", "lstsq", bias=False, sequential=True, own_text=True, query_heads=True, nsamples=128
    ),
}


def preset_of(name: str | None, method: str = "flap") -> Preset:
    """The preset of that name; None is that of `flap run`: best, but for baselines.

    Raises UsageError for best with a baseline, which is defined by options of its own.
    """
    if name is None:
        name = "best" if method == "flap" else "paper"
    if name != "paper" and method != "flap":
        raise UsageError(f"--preset {name}: --method {method} is a baseline with options of its own; leave out one")
    return PRESETS[name]
