"""What the ends of commands' helps show: examples for users of that command alone, from examples.md."""

from functools import cache
from pathlib import Path


@cache
def _sections() -> dict[str, str]:
    text = Path(__file__).with_name("examples.md").read_text(encoding="utf-8")
    parts = (section.partition("\n") for section in text.removeprefix("## ").split("\n## "))
    return {name: body.strip("\n") for name, _, body in parts}


def epilog(command: str) -> str | None:
    """The examples of a command, None where it has none."""
    return _sections().get(command)
