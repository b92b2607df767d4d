"""The header of a GGUF file: metadata and where each tensor lies, read in one pass.

gguf's own reader makes an object of every token, which takes seconds where a fingerprint or a size is asked
for; here arrays are skipped and only their lengths kept.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from flapcli.errors import FlapError
from flapcli.storage.json_file import lfs_hint

FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
CHUNK = 1 << 22


@dataclass(frozen=True)
class ArrayLength:
    """Stands for an array in the metadata: how many items it has."""

    items: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's shape (rows last to first as torch has them), ggml type number and place in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    raw: bytes


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises FlapError where the file is missing, no GGUF, corrupt or truncated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(file, size).header(path, size)
    except (struct.error, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise FlapError(f"{path} is truncated or corrupt: its GGUF header can't be read") from error
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    """A cursor over a file's beginning, read on as it is needed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.data, self.at = file, size, b"", 0

    def header(self, path: Path, size: int) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise FlapError(f"{path} is not a GGUF file{lfs_hint(path)}")
        version, tensors, pairs = self.scalar("<I"), self.scalar("<Q"), self.scalar("<Q")
        if version not in (2, 3):
            raise FlapError(f"{path}: GGUF version {version} is not supported, only 2 and 3")
        metadata = {self.string(): self.value(self.scalar("<I")) for _ in range(pairs)}
        infos = [self.tensor() for _ in range(tensors)]
        raw = self.data[: self.at]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("an alignment that is none")
        begin = -(-self.at // alignment) * alignment
        found = [GgufTensor(name, shape, kind, begin + at, _nbytes(shape, kind)) for name, shape, kind, at in infos]
        end = max((t.start + t.nbytes for t in found), default=begin)
        if end > size:
            raise FlapError(f"{path} is truncated: {size:,} bytes, its header asks for {end:,}")
        return GgufHeader(metadata, found, raw)

    def take(self, count: int) -> bytes:
        if self.at + count > self.size:  # before anything is read for it
            raise struct.error("end of file")
        while self.at + count > len(self.data):
            chunk = self.file.read(max(CHUNK, min(count, 1 << 26)))
            if not chunk:
                raise struct.error("end of file")
            self.data += chunk
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(FORMATS[kind])
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner == ARRAY:
            raise ValueError("an array of arrays, which nothing writes")
        if inner != STRING:
            self.take(struct.calcsize(FORMATS[inner]) * count)
        else:
            for _ in range(count):
                self.take(self.scalar("<Q"))
        return ArrayLength(count)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.string(), self.scalar("<I")
        shape = tuple(self.scalar("<Q") for _ in range(dims))
        return name, shape[::-1], self.scalar("<I"), self.scalar("<Q")


def _nbytes(shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return prod(shape) // block * size
