"""Whether this process is one of several that torchrun started."""

import os

from flapcli.errors import UsageError


def several_processes() -> bool:
    """Whether torchrun (or a like launcher) started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def refuse_several_processes() -> None:
    """Raise UsageError under torchrun, for commands whose stages would all run once for each process."""
    if several_processes():
        raise UsageError("of all commands only calibrate runs under torchrun; the others take its statistics")


def is_writer() -> bool:
    """Whether this process writes artifacts and reports: the only one, or rank 0."""
    return not several_processes() or os.environ["RANK"] == "0"
