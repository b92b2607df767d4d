"""What a killed run of a stage leaves so that the next one goes on: a hidden folder beside the artifact."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flapcli.errors import FlapError
from flapcli.storage.atomic import atomic_file

# A checkpoint is taken no sooner after the last one than this, and than 20 times what that one took.
SECONDS_BETWEEN, TIMES_ITS_COST = 10.0, 20


class Pauses:
    """When the next checkpoint is due."""

    def __init__(self) -> None:
        self._next = time.monotonic() + SECONDS_BETWEEN

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, one is taken."""
        start = time.monotonic()
        yield
        now = time.monotonic()
        self._next = now + max(SECONDS_BETWEEN, TIMES_ITS_COST * (now - start))


def key_of(facts: dict[str, Any], windows: bytes) -> str:
    """Hash of all that a checkpoint of a calibration depends on: facts as JSON, and the token windows."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + hashlib.sha256(windows).digest()).hexdigest()


class Resume:
    """The folder `.NAME.resume/rank-R-of-N` beside the artifact NAME, for one process; or one for all, by its own name.

    One of another key (other model, text, settings) is discarded. Made only when something is written, by who holds
    the place of the artifact.
    """

    def __init__(self, out: Path, key: str, rank: int = 0, ranks: int = 1, folder: str | None = None) -> None:
        self.parent = out.parent / f".{out.name}.resume"
        self.folder = self.parent / (folder or f"rank-{rank}-of-{ranks}")
        self.key = key
        if self.folder.exists() and not self.found:
            self._clear()

    def ready(self) -> Path:
        """The folder, made and marked with the key."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.found:
                with atomic_file(self.folder / "key") as scratch:
                    scratch.write_text(self.key)
        except OSError as error:
            raise FlapError(f"cannot write {self.folder}: {error.strerror}") from error
        return self.folder

    @property
    def found(self) -> bool:
        """Whether there is something of this very calibration to go on with."""
        try:
            return (self.folder / "key").read_text() == self.key
        except OSError:
            return False

    @property
    def nbytes(self) -> int:
        """Bytes that lie here already, of this very calibration."""
        return sum(path.stat().st_size for path in self.folder.iterdir()) if self.found else 0

    def _clear(self) -> None:
        (self.folder / "key").unlink(missing_ok=True)  # first: without it the rest is nobody's
        for path in self.folder.iterdir():
            path.unlink()

    def discard(self) -> None:
        """Remove the folder: the work is done, or can't be."""
        if self.folder.exists():
            self._clear()
            shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.parent.rmdir()  # unless other processes' folders are in it


def discard_all(out: Path) -> None:
    """Remove what calibrations into `out` left, those of any number of processes."""
    shutil.rmtree(out.parent / f".{out.name}.resume", ignore_errors=True)
