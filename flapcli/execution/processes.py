"""Whether this process is one of several that torchrun started."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from flapcli.errors import UsageError

if TYPE_CHECKING:
    from flapcli.execution.ranks import Ranks


def several_processes() -> bool:
    """Whether torchrun (or a like launcher) started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def refuse_several_processes() -> None:
    """Raise UsageError under torchrun, for commands whose stages would all run once for each process."""
    if several_processes():
        raise UsageError("only calibrate, apply and heal run under torchrun; the other commands take what these write")


def is_writer() -> bool:
    """Whether this process writes artifacts and reports: the only one, or rank 0."""
    return not several_processes() or os.environ["RANK"] == "0"


def several_ranks(timeout: float) -> "AbstractContextManager[Ranks | None]":
    """The processes that torchrun started; None where this is the only one, so that torch is not imported for that."""
    if not several_processes():
        return nullcontext()
    from flapcli.execution.ranks import Ranks

    return Ranks.from_environment(timeout)
