"""The terminal: notes, errors and JSON. Data goes to stdout, the rest to stderr."""

import codecs
import io
import json
import sys
from math import isfinite
from typing import Any

from rich.console import Console
from rich.text import Text

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
    """JSON on stdout, plain: null for a number that JSON has none for."""
    sys.stdout.write(json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def duration(seconds: float) -> str:
    """As people say it: 8 s, 1 min 23 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
