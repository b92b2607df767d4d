"""Ctrl-C: exit code 130 and one line that is true, from the first import to the last thing at exit.

While a command works, an interrupt is raised in it, so that it cleans up; else, or when it comes again, the process
ends at once, which leaves no more behind than a kill does. Imports nothing of flap's: it goes first.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

CODE = 130
# What is true of each command whenever it is interrupted; the rest only read.
LEFT = {
    "calibrate": "no half-done statistics are left, and run again it goes on after what it had saved",
    "plan": "no half-done plan is left",
    "apply": "no half-done folder is left, and run again a sequential fit goes on with the layer that it was at",
    "heal": "no half-done folder is left, and run again it goes on after what it had saved",
    "eval": "no half-done report is left; run again to measure",
    "run": "stages that are done stay, and run again it goes on after them",
    "sweep": "ratios that are done stay, and run again it goes on after them",
    "report": "no half-done page is left",
    "export": "no half-done file is left",
    "push": "the hub may hold a part of the folder: push again",
}


@dataclass
class _State:
    """What is to be said now, and whether an interrupt has been raised."""

    line: str = "interrupted before anything was done"
    pressed: bool = False


_now = _State()


def end_at_once() -> None:
    """From here on, while no command works, an interrupt ends the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _end)


def _end(_signal: int, _frame: FrameType | None) -> None:
    with suppress(OSError):
        # A line that moved is wiped, and its cursor shown again.
        os.write(2, (b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b"") + f"error: {_now.line}\n".encode())
    os._exit(CODE)


def line_of(command: str) -> str:
    return f"interrupted; {LEFT.get(command, 'nothing was to be written')}"


def was_pressed(error: BaseException) -> bool:
    """Whether an error comes of an interrupt, also where a library made another one of it."""
    return _now.pressed or isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)


@contextmanager
def raised_in(command: str) -> Iterator[None]:
    """While `command` works an interrupt is raised in it, once."""
    before = signal.getsignal(signal.SIGINT)
    ours = before in (_end, signal.default_int_handler)
    _now.line, _now.pressed = line_of(command), False
    if ours:
        signal.signal(signal.SIGINT, _press)
    try:
        yield
    finally:
        if ours:
            with suppress(Exception):
                sys.stdout.flush()  # for what comes next may end the process
            if not _now.pressed:
                _now.line = "interrupted at its end: all was done"
            signal.signal(signal.SIGINT, before)


def _press(number: int, frame: FrameType | None) -> None:
    if _now.pressed:
        _end(number, frame)
    _now.pressed = True
    raise KeyboardInterrupt
