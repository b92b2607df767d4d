"""Hashes of files, by which artifacts know what they were made from."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

LARGE = 1 << 26  # bytes of a file whose hash this process remembers: it takes longer than a file's time is exact to


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. `flap run` asks twice for that of statistics, which takes a second a GB."""
    stat = path.stat()
    known = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return _remembered(path, known) if stat.st_size >= LARGE else _read(path)


@lru_cache(maxsize=8)
def _remembered(path: Path, _known: tuple[int, ...]) -> str:
    return _read(path)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path, ignored: tuple[str, ...] = ("__pycache__",)) -> dict[str, Path]:
    """Every file below a folder by its relative name, but those in folders of the `ignored` names."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in paths.items() if not set(ignored) & set(name.parts)}


def files_sha256(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 of names and contents of these files of a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
