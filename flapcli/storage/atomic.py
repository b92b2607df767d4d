"""Files and folders that are written whole or not at all, and what the file system says where they can't be."""

import errno
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flapcli.errors import FlapError
from flapcli.storage.owner import Owner

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
KINDS = ("tmp", "old", "gone")  # of scratch names
LONG = 7 * 24 * 3600  # seconds since a scratch was written to, after which nobody is at it, wherever they ran


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; it takes the target's place, flushed to disk, only on success.

    Raises FlapError where the file system refuses (full disk, no permission); the old file stays. A link stays too,
    and what it points to is replaced.
    """
    target = target.resolve() if target.is_symlink() else target
    scratch = scratch_beside(target)
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
    scratch = scratch_beside(target)
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
    scratch = scratch_beside(target)
    try:
        scratch.touch()
        scratch.unlink()
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
    old = kept or scratch_beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old, target)
        raise
    if old != kept:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Delete a folder that is there; renamed first, so that it is never half there."""
    old = scratch_beside(target, "gone")
    try:
        os.rename(target, old)
    except OSError as error:
        raise explain(error, target) from error
    shutil.rmtree(old, ignore_errors=True)


def scratch_beside(target: Path, kind: str = "tmp") -> Path:
    """A new hidden sibling of `target`, named after this process wherever it runs; leftovers of dead ones are removed.

    Raises FlapError where the folder can't be made.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, target) from error
    clear_leftovers(target)
    return target.parent / f".{target.name}.{kind}-{Owner.here()}-{secrets.token_hex(4)}"


def clear_leftovers(target: Path, held: bool = False) -> None:
    """Remove hidden siblings of `target` that processes left which have ended; those from elsewhere too where `held`.

    Put back what one that was killed between both renames of `_swap` left aside.
    """
    begin = f".{target.name}."
    with suppress(OSError):  # a folder that can't be listed, or somebody else clears it
        for left in [path for path in target.parent.iterdir() if path.name.startswith(begin)]:
            kind, _, rest = left.name.removeprefix(begin).partition("-")
            owner = Owner.read(rest.rpartition("-")[0])
            if kind in KINDS and owner and (owner.has_ended or _is_abandoned(left, owner, held)):
                _clear(left, target, kind)


def _is_abandoned(left: Path, owner: Owner, held: bool) -> bool:
    return not owner.is_here and (held or time.time() - left.stat().st_mtime > LONG)


def _clear(left: Path, target: Path, kind: str) -> None:
    if kind == "old" and not target.exists():
        os.rename(left, target)
    elif left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink()


def require_space(folder: Path, needed: int) -> None:
    """Raise FlapError unless the file system of `folder` has `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FlapError(
            f"not enough disk space at {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free some or write elsewhere"
        )


def explain(error: OSError, target: Path) -> FlapError:
    """The error of one line for what the file system said of `target`."""
    cut_short = error.errno is None and str(error).endswith(" written")  # numpy's: "9 requested and 4 written"
    if error.errno in NO_SPACE or cut_short:
        return FlapError(f"no space left while writing {target}: free some disk space or write elsewhere")
    return FlapError(f"cannot write {target}: {error.strerror or error}")
