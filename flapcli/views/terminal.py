"""The terminal: progress, notes, errors and JSON. Data goes to stdout, the rest to stderr."""

import codecs
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from flapcli.progress import Advance

# Names of models, files and texts are data, never markup.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)


PLAIN = str.maketrans("█░±…┤└─●◆▲■○◇△□", "#.~.|`-*x^#o<v=")  # what tables and plots draw with


def forgive_encodings() -> None:
    """Let what the terminal's encoding has no character for be replaced: printing ends no run."""
    codecs.register_error("flap", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="flap")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end].translate(PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in wanted), error.end


def error(message: str) -> None:
    """One line on stderr, whatever its length."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def note(message: str) -> None:
    err.print(Text(message), soft_wrap=True)


def data(value: Any) -> None:
    """JSON on stdout, plain."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


class Bars:
    """A rich progress bar with rate and time left on a terminal; nothing elsewhere."""

    def note(self, message: str) -> None:
        note(message)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        if not err.is_terminal:
            yield lambda _done: None
            return
        from rich import progress

        class Rate(progress.ProgressColumn):
            def render(self, task: progress.Task) -> Text:
                scale, name = (1e6, "MB") if unit == "bytes" else (1, unit)
                return Text(f"{(task.speed or 0) / scale:,.0f} {name}/s")

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            Rate(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
        )  # fmt: skip
        with progress.Progress(*columns, console=err, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda done: bars.advance(task, done)
