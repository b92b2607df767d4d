"""What a killed calibration leaves behind so that the next one goes on: a hidden folder beside the artifact."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

from flapcli.errors import FlapError
from flapcli.storage.atomic import atomic_file


def key_of(facts: dict[str, Any], windows: bytes) -> str:
    """Hash of all that a checkpoint of a calibration depends on: facts as JSON, and the token windows."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + hashlib.sha256(windows).digest()).hexdigest()


class Resume:
    """The folder `.NAME.resume/rank-R-of-N` beside the artifact NAME, for one process of one calibration.

    One of another key (other model, text, settings) is discarded. Made only when something is written.
    Use as a context: raises FlapError where another living process works in the same folder.
    """

    def __init__(self, out: Path, key: str, rank: int = 0, ranks: int = 1) -> None:
        self.parent = out.parent / f".{out.name}.resume"
        self.folder = self.parent / f"rank-{rank}-of-{ranks}"
        self.key = key
        self._out, self._lock = out, -1

    def __enter__(self) -> Self:
        if self.folder.exists():
            self._take()
            if not self.found:
                self._clear()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)  # and unlocked with that
            self._lock = -1

    def ready(self) -> Path:
        """The folder, made and marked with the key."""
        try:
            if not self.folder.exists():
                self.__exit__()  # the lock of one that was discarded
                self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock < 0:  # another process may have made the folder meanwhile
                self._take()
            if not self.found:
                self._clear()
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

    def _take(self) -> None:
        """Lock the folder; the kernel unlocks it when this process ends, however that happens."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FlapError(
                f"another process is calibrating into {self._out} right now: wait for it, or give another --out"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _clear(self) -> None:
        (self.folder / "key").unlink(missing_ok=True)  # first: without it the rest is nobody's
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def discard(self) -> None:
        """Remove the folder: the work is done, or can't be."""
        if self.folder.exists():
            self._clear()
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.parent.rmdir()  # unless other processes' folders are in it
            self._out.parent.rmdir()  # where this calibration made it and wrote nothing
        except OSError:
            pass


def discard_all(out: Path) -> None:
    """Remove what calibrations into `out` left, those of any number of processes."""
    shutil.rmtree(out.parent / f".{out.name}.resume", ignore_errors=True)
