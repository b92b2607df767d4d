"""A place held by one run at a time: a file beside what is written, which says who and is touched while they live.

No lock of the kernel's, which network file systems and containers do not share. The file is whole from its first
moment (a hard link to one that was written before). One of a process of this machine is void as soon as that has
ended; one from elsewhere once it was not touched for `STALE` seconds, by the clock of the file system.
"""

import errno
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from platform import node
from typing import Any, NamedTuple

from flapcli.errors import FlapError
from flapcli.storage.atomic import clear_leftovers, scratch_beside
from flapcli.storage.owner import Owner

BEAT, STALE = 10.0, 90.0  # seconds
_held: set[tuple[int, Path]] = set()  # by which thread, which lock; a process that forks has other threads


@contextmanager
def locked(lock: Path, shown: Path, names: Iterable[str]) -> Iterator[None]:
    """Hold the files and folders `names` beside `lock`; within, the same thread may ask again.

    What killed processes left of them is cleared first. Raises FlapError where another run is at work there, which
    is told of `shown`. Where nothing can be written nothing is held: who answers from what is there may go on,
    and who writes says why not.
    """
    lock = lock.parent.resolve() / lock.name
    key = threading.get_native_id(), lock
    if key in _held:
        yield
        return
    text = None
    with suppress(OSError):
        made = [folder for folder in lock.parents if not folder.exists()]
        lock.parent.mkdir(parents=True, exist_ok=True)
        text = _take(lock, shown)
    if text is None:
        yield
        return
    stop = threading.Event()
    threading.Thread(target=_beat, args=(lock, text, stop), daemon=True).start()
    _held.add(key)
    try:
        for name in names:
            clear_leftovers(lock.with_name(name), held=True)
        yield
    finally:
        _held.remove(key)
        stop.set()
        with suppress(OSError):
            if lock.read_text(encoding="utf-8") == text:
                lock.unlink()
            for folder in made:
                folder.rmdir()  # where nothing came of it


def _beat(lock: Path, text: str, stop: threading.Event) -> None:
    """Touch the lock now and then, while it is ours."""
    with suppress(OSError):
        while not stop.wait(BEAT) and lock.read_text(encoding="utf-8") == text:
            os.utime(lock)


class _Found(NamedTuple):
    """A lock that is there: its text, and seconds since it was touched."""

    text: str
    age: float

    @property
    def said(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.text))
        except (ValueError, TypeError):
            return {}

    @property
    def is_void(self) -> bool:
        owner = Owner.read(str(self.said.get("owner")))
        return owner.has_ended if owner and owner.is_here else self.age > STALE

    def describe(self) -> str:
        said = {"pid": "?", "host": "?", "command": "?", "since": "?"} | self.said
        owner = Owner.read(str(said.get("owner")))
        seen = "" if owner and owner.is_here else (
            f"; its last sign of life was {max(self.age, 0):.0f} s ago, without one for {STALE:.0f} s it counts as gone"
        )  # fmt: skip
        return f"process {said['pid']} on {said['host']}, `{said['command']}`, since {said['since']}{seen}"


def _take(lock: Path, shown: Path) -> str:
    """Make the lock, in the place of one that is void; returns its text. Raises OSError where it can't be written."""
    here, scratch = Owner.here(), scratch_beside(lock)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:150]
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    said = {"owner": str(here), "pid": here.pid, "host": node(), "command": command, "since": since}
    text = json.dumps(said | {"token": scratch.name})
    try:
        for _ in range(10):
            scratch.write_text(text, encoding="utf-8")
            if _link(scratch, lock):
                return text
            found = _read(lock, scratch)
            if found and found.text == text:  # a server that answers twice
                return text
            if found and not found.is_void:
                raise FlapError(
                    f"another run is at work in {shown} ({found.describe()}): wait for it or stop it, or write "
                    "elsewhere"
                )
            if found:
                _remove(lock, found.text)
        raise FlapError(f"other runs begin in {shown} all the time: try again, or write elsewhere")
    finally:
        with suppress(OSError):
            scratch.unlink()


def _link(scratch: Path, lock: Path) -> bool:
    """Give `scratch` the name `lock` too; False where that is there. Raises OSError where it can't be written."""
    try:
        os.link(scratch, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        text = scratch.read_bytes()
        try:
            with lock.open("xb", buffering=0) as file:
                if file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except FileExistsError:
            return False
        except OSError:
            lock.unlink(missing_ok=True)
            raise
    return True


def _read(lock: Path, scratch: Path) -> _Found | None:
    """The lock that is there; None where it has just gone. Opened, for network file systems to ask their server."""
    try:
        with lock.open(encoding="utf-8", errors="replace") as file:
            return _Found(file.read(), scratch.stat().st_mtime - os.fstat(file.fileno()).st_mtime)
    except FileNotFoundError:
        return None


def _remove(lock: Path, text: str) -> None:
    """Remove a lock that is void; one that another run has put in its place meanwhile is put back."""
    aside = scratch_beside(lock)
    with suppress(FileNotFoundError):
        os.rename(lock, aside)
        if aside.read_text(encoding="utf-8", errors="replace") != text:
            with suppress(OSError):
                os.link(aside, lock)
        aside.unlink()
