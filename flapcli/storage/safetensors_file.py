"""Safetensors files read by their header and written as a stream, without torch.

The library reads and writes whole files; planning, fingerprints and the largest checkpoints need the
header alone, and a writer that holds one tensor at a time.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

from flapcli.errors import FlapError
from flapcli.storage.dtypes import ITEM_SIZE
from flapcli.storage.json_file import lfs_hint

MAX_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and safetensors dtype code of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors, its metadata, and the header's raw bytes."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    raw: bytes
    offsets: dict[str, int]  # of each tensor's first byte in the file


def read_header(path: Path) -> Header:
    """Read and check a file's header. Raises FlapError where the file is missing, corrupt or truncated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            raw = file.read(length) if length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = dict(entries.pop("__metadata__", {}))
        unknown = [(n, e["dtype"]) for n, e in entries.items() if e["dtype"] not in ITEM_SIZE]
        if unknown:
            raise FlapError(f"{path}: tensor {unknown[0][0]:.80} is {unknown[0][1]:.80}, which flap can't read")
        tensors = {n: TensorSpec(n, _numbers(e["shape"]), e["dtype"]) for n, e in entries.items()}
        places = {n: _numbers(e["data_offsets"]) for n, e in entries.items()}
        end = max((stop for _, stop in places.values()), default=0)
        bad = [n for n, (start, stop) in places.items() if tensors[n].nbytes != stop - start]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FlapError(
            f"{path} is not a safetensors file or is corrupt: its header can't be read{lfs_hint(path)}"
        ) from error
    if bad:
        raise FlapError(f"{path} is corrupt: the size of {bad[0]} does not fit its shape")
    if size != 8 + length + end:
        raise FlapError(f"{path} is truncated or corrupt: {size:,} bytes, its header asks for {8 + length + end:,}")
    return Header(tensors, metadata, raw, {n: 8 + length + start for n, (start, _) in places.items()})


def _numbers(found: Any) -> tuple[int, ...]:
    """A list of sizes or offsets. Raises ValueError for anything else."""
    if not isinstance(found, list) or not all(type(each) is int and 0 <= each < 2**63 for each in found):
        raise ValueError("no list of whole numbers")
    return tuple(found)


def read_into(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from the file. Raises FlapError where it can't be read or is too short.

    Read and not mapped: pages of a mapping count as this process's memory until it is closed.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < buffer.nbytes:
                count = file.readinto(buffer[done:])  # the kernel gives at most 2 GiB a call
                if not count:
                    raise FlapError(f"{path} is truncated: {buffer.nbytes - done:,} bytes are missing")
                done += count
    except OSError as error:
        raise FlapError(f"cannot read {path}: {error.strerror}") from error


class StreamWriter:
    """Writes one safetensors file tensor by tensor, in the order announced.

    The file is flushed to disk on a clean exit; after an exception it is left for the caller's
    scratch folder to discard. With `resume`, goes on after the tensors that are whole in a file that was
    begun with the same announcement; `written` says how many those are. `offsets` are as in `Header`.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str], resume: bool = False) -> None:
        specs = list(specs)
        header: dict[str, Any] = {"__metadata__": metadata}
        ends = [0]
        for spec in specs:
            ends.append(ends[-1] + spec.nbytes)
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": ends[-2:]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        start = struct.pack("<Q", len(raw)) + raw
        self._specs, self._ends = specs, [len(start) + end for end in ends]
        self.path, self.offsets = path, {spec.name: end for spec, end in zip(specs, self._ends[:-1], strict=True)}
        self.written = self._whole(path, start) if resume else 0
        self._file: BinaryIO = path.open("r+b" if self.written else "wb")
        if not self.written:
            self._file.write(start)
        self.rewind(self.written)

    def _whole(self, path: Path, start: bytes) -> int:
        """How many tensors are complete in the file, 0 where it is none of ours."""
        if not path.exists():
            return 0
        with path.open("rb") as file:
            same = file.read(len(start)) == start
        size = path.stat().st_size
        return sum(end <= size for end in self._ends[1:]) if same else 0

    def rewind(self, written: int) -> None:
        """Go on after the first `written` tensors, of those that were written."""
        self.written = written
        self._file.seek(self._ends[written])
        self._file.truncate()

    def write(self, name: str, data: memoryview) -> None:
        """Append one tensor's bytes (little-endian, row-major). Raises ValueError out of order."""
        spec = self._specs[self.written]
        if (name, data.nbytes) != (spec.name, spec.nbytes):
            raise ValueError(f"expected {spec}, got {name} with {data.nbytes} bytes")
        self._file.write(data)
        self.written += 1

    def sync(self) -> None:
        """Have what was written so far on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                if self.written < len(self._specs):
                    raise ValueError(f"{self._specs[self.written].name} was announced and not written")
                self.sync()
