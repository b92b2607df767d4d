"""Values of options that are more than a word or a number, read from what is typed."""

from typing import get_args

from flapcli.errors import UsageError, meant
from flapcli.execution import settings as s


def windows(text: str, option: str, word: str) -> int | None:
    """The number of windows that `option` gives; None for `word`. Raises UsageError for anything else."""
    if text == word:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"{option} {text}: give a number of windows, at least 1, or {word}")
    return int(text)


def ratios(text: str) -> tuple[float, ...]:
    """`0.1,0.2` as (0.1, 0.2), ascending. Raises UsageError for anything but shares of at least 0 and less than 1."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 <= ratio < 1 for ratio in found):
        percent = all(1 < ratio < 100 for ratio in found)
        hint = f"; did you mean {','.join(f'{ratio / 100:g}' for ratio in found)}?" if found and percent else ""
        raise UsageError(f"--ratios {text}: give shares of at least 0 and less than 1, separated by commas{hint}")
    return tuple(found)


def methods(text: str | None) -> tuple[s.Method, ...]:
    """`flap,wanda-sp` as a tuple, none twice; empty for None. Raises UsageError for what is no method."""
    found: dict[s.Method, None] = {}
    for part in text.split(",") if text is not None else ():
        name = next((known for known in get_args(s.Method) if known == part.strip()), None)
        if name is None:
            known = get_args(s.Method)
            raise UsageError(f"--methods {text}: give some of {', '.join(known)}{meant(part, known)}")
        found[name] = None
    return tuple(found)


def numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """`1,8` as (1, 8). Raises UsageError for anything but numbers of at least `least`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise UsageError(f"{option} {text}: give numbers of at least {least}, separated by commas")
    return tuple(int(part) for part in parts)
