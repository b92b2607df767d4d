"""The one decision about an artifact's place: what is there is current, to be replaced, or not ours to replace."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from flapcli.errors import FlapError, problems
from flapcli.storage.json_file import read_json

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How an artifact is found again.

    `load` reads it (FlapError where it can't be read). What it can't read is one of flap's that is broken, and to
    be replaced, where `is_ours` says so; else it is refused by `foreign`, which follows its path.
    """

    load: Callable[[Path], T]
    is_ours: Callable[[Path], bool]
    foreign: str

    def find(self, path: Path) -> T | None:
        """What is at `path`; None where nothing is, or what is to be replaced. Raises FlapError for what is foreign."""
        if not path.exists():
            return None
        try:
            return self.load(path)
        except FlapError as error:
            if self.is_ours(path):
                return None
            raise FlapError(f"{path} {self.foreign}") from error

    def current(self, path: Path, same: Callable[[T], bool], force: bool) -> T | None:
        """What is at `path` where it is what is asked for (`same`); None where it is to be made. Raises as `find`."""
        found = self.find(path)
        return found if found is not None and not force and same(found) else None


def refuse_other(path: Path, begins: tuple[bytes, ...], kind: str) -> None:
    """Raise FlapError where a file at `path` does not begin as its `kind` does, so that only its like is replaced."""
    if path.is_dir() or (path.is_file() and path.stat().st_size and not _start(path).startswith(begins)):
        raise FlapError(f"{path} exists and is no {kind}: move it away or give another name")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64).lstrip().lower()


def load_json(path: Path, model: type[Model], absent: str) -> Model:
    """Read an artifact of one JSON object. Raises FlapError: `absent` where nothing is there, else what is wrong."""
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise FlapError(absent) from error
    except ValidationError as error:
        expected = model.model_fields["format"].default
        raise FlapError(f"{path} is not of format {expected}: {problems(error)}") from error
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error


def says_format(path: Path, start: str) -> bool:
    """Whether a file is a JSON object whose `format` begins so, whatever else is wrong with it."""
    try:
        return str(read_json(path).get("format", "")).startswith(start)
    except FlapError:
        return False
