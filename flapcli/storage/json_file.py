"""JSON objects of files that others wrote, whatever lies there; and files that only stand for others."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from flapcli.errors import FlapError, first_line

LFS = b"version https://git-lfs"


def read_json(path: Path, otherwise: str = "") -> dict[str, Any]:
    """A JSON object from a file. Raises FlapError, begun with `otherwise` where the file is missing."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FlapError(f"{otherwise}: {path} is missing" if otherwise else f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FlapError(f"{path} can't be read as JSON: {first_line(error)}{lfs_hint(path)}") from error
    if not isinstance(value, dict):
        raise FlapError(f"{path} is not a JSON object")
    return value


def lfs_hint(*paths: Path) -> str:
    """The end of a message where one of these files is what git leaves in the place of a large one, else nothing."""
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                return f"; {path.name} is a Git LFS pointer: fetch the file itself (git lfs pull)"
    return ""
