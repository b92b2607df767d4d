"""What is being done: a moving line on a terminal, plain lines elsewhere; both on stderr, from one state."""

import io
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import TracebackType
from typing import Self, TextIO

from rich.live import Live
from rich.text import Text

from flapcli.progress import Advance
from flapcli.views.terminal import duration, err, note

CELLS = 12  # of a bar
LATELY, FEWEST = 60.0, 5  # the rate is that of so many seconds, and of no fewer steps
SOON, OFTEN, SHARE = 2.0, 30.0, 0.1  # plain lines: what is new after so long, what goes on every so often or so much


class Pace:
    """How much of a total is done, and how fast lately."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self._begun = time.monotonic()
        self._seen = deque([(self._begun, 0)])

    def advance(self, done: int) -> None:
        now = time.monotonic()
        self.done += done
        if now - self._begun < 0.05:  # what an earlier run had done is no measure of this one's speed
            self._seen.clear()
        self._seen.append((now, self.done))
        while len(self._seen) > FEWEST and now - self._seen[0][0] > LATELY:
            self._seen.popleft()

    @property
    def share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def __str__(self) -> str:
        """Share, rate and time left, as far as they are known: between two steps of a minute the time still runs."""
        (first, before), (last, done) = self._seen[0], self._seen[-1]
        if last <= first or done <= before:
            return f"{self.share:.0%} of {_amount(self.total, self.unit)}"
        rate = (done - before) / (last - first)
        left = max((self.total - done) / rate - (time.monotonic() - last), 0)
        return f"{self.share:.0%}, {_amount(rate, self.unit)}/s, {duration(left)} left"


def _amount(count: float, unit: str) -> str:
    count, unit = (count / 1e6, "MB") if unit == "bytes" else (count, unit)
    return f"{count:,.1f} {unit}" if 0 < count < 10 and count != int(count) else f"{count:,.0f} {unit}"


class Display:
    """A `Progress` that people see while its block lasts, named by what is at work, such as `[1/4] calibrate`."""

    def __init__(self, name: str, shown: bool = True) -> None:
        self.name, self.shown, self.began = name, shown, time.monotonic()
        self._what, self._since = "", self.began
        self._pace: Pace | None = None
        self._told: tuple[str, float, float] = ("", self.began, 0.0)  # what, when, and at which share
        self._live: Live | None = None
        self._stop = Event()

    @property
    def took(self) -> float:
        return time.monotonic() - self.began

    def __enter__(self) -> Self:
        if self.shown and err.is_interactive and err.file.isatty():
            # No redirecting of rich's: what others write is heard by Heard.
            self._live = Live(
                get_renderable=self._line, console=err, transient=True, refresh_per_second=5, redirect_stdout=False,
                redirect_stderr=False,
            )  # fmt: skip
            self._live.start(refresh=True)
            self._stderr, sys.stderr = sys.stderr, Heard(sys.stderr, self)
        elif self.shown:
            self._thread = Thread(target=self._tell_often, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._live:
            sys.stderr = self._stderr
            self._live.stop()
            self._live = None

    def note(self, message: str) -> None:
        note(message)

    def doing(self, what: str) -> None:
        self._what, self._since = what, time.monotonic()

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        before = self._what
        self.doing("" if self.name.endswith(description) else description)
        self._pace = pace = Pace(total, unit)
        try:
            yield pace.advance
        finally:
            self._pace = None
            self.doing(before)

    def _said(self) -> str:
        return ": ".join(part for part in (self.name, self._what) if part)

    def _line(self) -> Text:
        """The line on a terminal, which rich asks for some times a second."""
        frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if err.encoding.startswith("utf") else "-\\|/"
        begun = [frames[int(time.monotonic() * 5) % len(frames)], self._said()]
        if pace := self._pace:
            full = round(CELLS * pace.share)
            begun += ["█" * full + "░" * (CELLS - full), str(pace)]
        return Text(" ".join([*begun, f"({duration(self.took)})"]), no_wrap=True, overflow="ellipsis")

    def _tell_often(self) -> None:
        while not self._stop.wait(0.5):
            self.tell(time.monotonic())

    def tell(self, now: float) -> None:
        """A plain line, where something new has gone on for a while, or the same for long."""
        pace = self._pace
        said, share = self._said(), pace.share if pace else 0.0
        before, when, at = self._told
        new, waited = said != before, now - (self._since if said != before else when)
        if waited < SOON or not (new or waited >= OFTEN or share >= at + SHARE):
            return
        self._told = said, now, share
        note(f"{said}: {pace}" if pace else f"{said} ({duration(now - self.began)})")


class Heard(io.TextIOBase):
    """What others write to stderr while the line moves: bars of theirs are said in it, whole lines stand above it."""

    def __init__(self, stream: TextIO, display: Display) -> None:
        self.rich_proxied_file, self._display, self._begun = stream, display, ""

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    def fileno(self) -> int:
        return self.rich_proxied_file.fileno()

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip() and "\r" not in line:
                note(line)
        if "\r" in self._begun:
            self._begun = self._begun.rpartition("\r")[2] or self._begun.rstrip("\r")
            if self._begun.strip():
                self._display.doing(self._begun.strip())
        return len(text)
