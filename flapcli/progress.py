"""What long work reports. Stages take a `Progress`; only the console draws one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    def task(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A bar of `total` units; the value entered is called with each number of units done."""

    def note(self, message: str) -> None:
        """One line for the user, outside the bar."""


class Silent:
    """No bar, no notes: for library use and tests."""

    def task(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _done: None)

    def note(self, message: str) -> None:
        pass
