"""Files and folders that are written whole or not at all, and what the file system says where they can't be."""

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flapcli.errors import FlapError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; it takes the target's place, flushed to disk, only on success.

    Raises FlapError where the file system refuses (full disk, no permission); the old file stays. A link stays too,
    and what it points to is replaced.
    """
    target = target.resolve() if target.is_symlink() else target
    scratch = _scratch(target)
    try:
        yield scratch
        _flush(scratch)
        os.replace(scratch, target)
    except OSError as error:
        raise explain(error, target) from error
    finally:
        with suppress(OSError):  # where even that is refused, the error above says why
            scratch.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, keep_old: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder; it takes the target's place, flushed to disk, only on success.

    The old folder is deleted then, or stays by the name of `free_name` with `keep_old`. Raises FlapError where the file
    system refuses (full disk, no permission); the old folder stays. A link stays too, and what it points to is
    replaced.
    """
    target = target.resolve() if target.is_symlink() else target
    _recover(target)
    scratch = _scratch(target)
    try:
        scratch.mkdir()
        yield scratch
        for path in scratch.rglob("*"):
            _flush(path)
        _swap(scratch, target, free_name(target) if keep_old else None)
    except OSError as error:
        raise explain(error, target) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_writable(target: Path) -> None:
    """Raise FlapError where no file can be made beside `target`: before the work whose result it is for."""
    there = next(folder for folder in target.absolute().parents if folder.exists())
    scratch = _scratch(target).absolute()
    try:
        scratch.touch()
        scratch.unlink()
        for folder in scratch.parents:  # those that were made for this alone
            if folder == there:
                break
            folder.rmdir()
    except OSError as error:
        raise explain(error, target) from error


def move_file(source: Path, target: Path) -> None:
    """Give a whole file the name `target`; where that is a link, what it points to is replaced, on its own disk."""
    target = target.resolve() if target.is_symlink() else target
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_file(target) as scratch:
            shutil.copyfile(source, scratch)


def _flush(path: Path) -> None:
    """Have a file's bytes on disk before it gets its name, so that a power cut leaves no empty file in its place."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def free_name(target: Path) -> Path:
    """Where a folder is moved to that is not to be lost: `target.old`, or the first of `.old-2`, ... that is free."""
    target = target.resolve() if target.is_symlink() else target
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (target.with_name(f"{target.name}.old{number}") for number in numbers)
    return next(name for name in names if not name.exists())


def _swap(scratch: Path, target: Path, kept: Path | None) -> None:
    """Rename `scratch` to `target`; what stood there is removed only after that, or `kept` by that name."""
    if not target.exists():
        os.rename(scratch, target)
        return
    old = kept or _scratch(target, "old")
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old, target)
        raise
    if old != kept:
        shutil.rmtree(old, ignore_errors=True)


def _recover(target: Path) -> None:
    """Put back what a process that was killed between both renames of `_swap` left aside."""
    if not target.exists():
        for old in _leftovers(target, "old"):
            with suppress(OSError):
                os.rename(old, target)
                return


def remove_folder(target: Path) -> None:
    """Delete a folder that is there; renamed first, so that it is never half there."""
    old = _scratch(target, "gone")
    try:
        os.rename(target, old)
    except OSError as error:
        raise explain(error, target) from error
    shutil.rmtree(old, ignore_errors=True)


def _scratch(target: Path, kind: str = "tmp") -> Path:
    """A hidden sibling of `target` named after this process; leftovers of dead ones are removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, target) from error
    for left in _leftovers(target, kind):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return target.parent / f".{target.name}.{kind}-{os.getpid()}"


def _leftovers(target: Path, kind: str) -> Iterator[Path]:
    """Hidden siblings of `target` that dead processes left, or this one."""
    for left in list(target.parent.glob(f".{target.name}.{kind}-*")):
        pid = left.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not (pid.isdigit() and _alive(int(pid))):
            yield left


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's process
    return True


def require_space(folder: Path, needed: int) -> None:
    """Raise FlapError unless the file system of `folder` has `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FlapError(
            f"not enough disk space at {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free some or write elsewhere with --out"
        )


def explain(error: OSError, target: Path) -> FlapError:
    """The error of one line for what the file system said of `target`."""
    if error.errno in NO_SPACE:
        return FlapError(f"no space left while writing {target}: free some disk space or use --out elsewhere")
    return FlapError(f"cannot write {target}: {error.strerror or error}")
