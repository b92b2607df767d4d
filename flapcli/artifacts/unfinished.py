"""What a long measurement leaves where a later part of it fails, or where it can't be saved."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flapcli.errors import FlapError, UnfinishedError

Made = TypeVar("Made")


def save_measured(
    save: Callable[[Path, Made], None], path: Path, made: Made, failure: BaseException | None, keeps_old: bool
) -> None:
    """Save what was measured; raise UnfinishedError with it where that fails, or where `failure` cut it short.

    What was cut short does not replace what is there where that is whole (`keeps_old`).
    """
    kept = failure is not None and keeps_old
    if not kept:
        try:
            save(path, made)
        except FlapError as error:
            raise UnfinishedError(f"{error}; what was measured is printed alone", made) from error
    if failure is not None:
        place = f"printed alone: {path} stays as it was" if kept else f"in {path}, and the next run goes on from there"
        raise UnfinishedError(f"{told(failure)}; what was measured until then is {place}", made) from failure


def told(failure: BaseException) -> str:
    """A failure in a few words, also of other kinds than ours."""
    if isinstance(failure, FlapError):
        return str(failure)
    return "interrupted" if isinstance(failure, KeyboardInterrupt) else f"{type(failure).__name__}: {failure}"[:300]
