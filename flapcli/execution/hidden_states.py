"""Hidden states of all windows between two layers, or their gradient: in memory or in files, saved layer by layer."""

import math
import os
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoints import Checkpoint
from flapcli.checkpoints.shards import raw_bytes
from flapcli.execution.device import Runtime
from flapcli.execution.memory import stay_in_memory
from flapcli.storage.atomic import atomic_file, require_space
from flapcli.storage.resume import Resume
from flapcli.storage.safetensors_file import read_into


class HiddenStates:
    """(windows, tokens, hidden size) of one dtype, where layers on `device` read their input and write their output.

    `in_memory`: one tensor on the host, overwritten batch by batch; pinned for a GPU, which then copies while the host
    goes on. Else a file is read while the next one is written, each mapped only slice by slice, so that neither counts
    as this process's memory. In both cases a file of a layer's input that bears its final name, `name` and the layer's
    index, is whole.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        in_memory: bool,
        resume: Resume,
        name: str,
        device: torch.device,
    ) -> None:
        self.shape, self.dtype, self.resume, self.name, self.device = shape, dtype, resume, name, device
        self.window_bytes = shape[1] * shape[2] * dtype.itemsize
        self._pinned = in_memory and device.type == "cuda"
        # Pinned memory is a power of two: at most twice as much, of which `stay_in_memory` leaves half.
        self._states = torch.empty(shape, dtype=dtype, pin_memory=self._pinned) if in_memory else None
        self._source = Path()
        self._target: BinaryIO | None = None

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.window_bytes

    def saved(self) -> list[int]:
        """Layers whose input is on disk from an earlier run."""
        if not self.resume.found:
            return []
        files = self.resume.folder.glob(f"{self.name}-*.bin")
        return sorted(int(path.stem.partition("-")[2]) for path in files if path.stat().st_size == self.nbytes)

    def restore(self, layer: int) -> None:
        """Go on with the saved input of a layer."""
        self._source = self._path(layer)
        self._wait()
        if self._states is not None and self.nbytes:
            read_into(self._source, 0, raw_bytes(self._states))

    def read(self, windows: slice) -> torch.Tensor:
        """A batch of the current layer's input, on the device; on the CPU the memory it is kept in."""
        if self._states is not None:
            return self._states[windows].to(self.device, non_blocking=self._pinned)
        count = windows.stop - windows.start
        start, size = windows.start * self.window_bytes, count * self.window_bytes
        mapped = np.memmap(self._source, np.uint8, "c", start, (size,))
        return torch.from_numpy(mapped).view(self.dtype).reshape(count, *self.shape[1:]).to(self.device)

    def write(self, windows: slice, states: torch.Tensor) -> None:
        """Keep a batch of the output."""
        if self._states is not None:
            self._states[windows].copy_(states.to(self.dtype), non_blocking=self._pinned)
            return
        target = self._target_file()
        target.seek(windows.start * self.window_bytes)
        target.write(raw_bytes(states.to(self.dtype)))

    def _wait(self) -> None:
        """Until the GPU has made its copies: before the host itself reads or writes what they lie in."""
        if self._pinned:
            torch.cuda.synchronize(self.device)

    def _target_file(self) -> BinaryIO:
        # Written and not mapped: on a full disk a write says so, a mapping kills the process.
        if self._target is None:
            self._target = (self.resume.ready() / f"{self.name}.part").open("wb")
        return self._target

    def save(self, layer: int) -> None:
        """The output is whole: have it on disk as the input of `layer`."""
        if self._states is None:
            self.turn(layer)
            return
        self.resume.ready()
        self._wait()
        with atomic_file(self._path(layer)) as scratch, scratch.open("wb") as file:
            file.write(raw_bytes(self._states))
            file.flush()
            os.fsync(file.fileno())

    def turn(self, layer: int) -> None:
        """The output is whole: read it as the input of `layer`."""
        if self._states is not None:
            return
        with self._target_file() as target:
            target.flush()
            os.fsync(target.fileno())
        self._target = None
        self._source = self._path(layer)
        os.replace(self.resume.folder / f"{self.name}.part", self._source)

    def pass_on(self, layer: int) -> None:
        """The input of `layer` is also that of the next, on disk as in memory."""
        os.replace(self._path(layer), self._path(layer + 1))
        self._source = self._path(layer + 1)

    def forget(self, layer: int) -> None:
        """The input of `layer` is needed no more."""
        self._path(layer).unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self.resume.folder / f"{self.name}-{layer}.bin"


class ResidualStream:
    """A model's residual stream before the layer at hand, read and written batch by batch."""

    def __init__(self, hidden: HiddenStates) -> None:
        self.hidden, self._turns = hidden, 0

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        windows: NDArray[np.int64],
        runtime: Runtime,
        files: Resume,
        name: str = "hidden",
        at_once: int = 2,
    ) -> Self:
        """Of `windows` (n, seqlen): in RAM or, where that is short, in files, of which there are so many `at_once`.

        Raises FlapError where the disk has no room for these.
        """
        size = (*windows.shape, checkpoint.shape.hidden_size)
        nbytes = math.prod(size) * runtime.dtype.itemsize
        in_memory = stay_in_memory(nbytes)
        require_space(files.parent.parent, 0 if in_memory else at_once * nbytes)
        return cls(HiddenStates(size, runtime.dtype, in_memory, files, name, runtime.device))

    def read(self, part: slice) -> torch.Tensor:
        return self.hidden.read(part)

    def write(self, part: slice, states: torch.Tensor) -> None:
        self.hidden.write(part, states)

    def turn(self) -> None:
        """All was written: from now on that is read."""
        self._turns += 1
        self.hidden.turn(self._turns)
        self.hidden.forget(self._turns - 1)
