"""The errors that users see: one line each, with the exit code of the contract."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class FlapError(Exception):
    """A failure: what is wrong, which file or option, what to do. Exit code 1."""

    exit_code = 1


class UsageError(FlapError):
    """Misuse, decided by the options alone. Exit code 2."""

    exit_code = 2


class UnfinishedError(FlapError):
    """A failure after part of the work: `made` is what was measured until then, for people to see."""

    def __init__(self, message: str, made: Any) -> None:
        super().__init__(message)
        self.made = made


class UnreachableError(UsageError):
    """More is to be removed than can go; less of it may do, so that a search turns back here."""


def only_with(main: str, given: bool, others: dict[str, bool]) -> None:
    """Raise UsageError where one of `others` is given without the option that it belongs to."""
    if not given and (alone := [option for option, is_given in others.items() if is_given]):
        raise UsageError(f"{alone[0]} is for {main}: give that too, or leave {alone[0]} out")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, and those that it announces by a colon, for messages of one line."""
    first, *rest = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    while first.endswith(":") and rest:
        first += f" {rest.pop(0)}"
    return first[:400]


def meant(given: str, names: Iterable[str]) -> str:
    """`; did you mean X?` where one of `names` is like what was given, whatever their case; else nothing."""
    from difflib import get_close_matches

    known = {name.lower(): name for name in names}
    found = get_close_matches(given.lower(), known, 1)
    return f"; did you mean {known[found[0]]}?" if found else ""


WORDS = {"extra_forbidden": "is no key of this format", "missing": "is missing"}  # for what pydantic says


def problems(error: "ValidationError") -> str:
    """The first of all that pydantic found wrong, each with its place, on one line."""
    found = [
        (
            ".".join(map(str, each["loc"])),
            WORDS.get(each["type"]) or each["msg"].removeprefix("Value error, ").replace("Input should be", "must be"),
        )
        for each in error.errors()[:8]
    ]
    return "; ".join(f"{place:.80}: {what:.200}" if place else what for place, what in found)
