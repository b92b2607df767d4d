"""The terminal: progress, notes, errors and JSON. Data goes to stdout, the rest to stderr."""

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
