"""What long work reports. Stages take a `Progress`; only the console draws one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]


IMPORTING = "importing torch and transformers"  # some seconds in which nothing else can be said


class Progress(Protocol):
    def task(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A bar of `total` units; the value entered is called with each number of units done."""

    def doing(self, what: str) -> None:
        """What is done from here on, of unknown length, until the next is said; never part of what is kept."""

    def note(self, message: str) -> None:
        """One line for the user, outside the bar."""


class Silent:
    """No bar, no notes: for library use and tests."""

    def task(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _done: None)

    def doing(self, what: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass
