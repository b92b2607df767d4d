"""What this machine does in a second, tried just now, and what it has left."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from flapcli.execution.device import Runtime
from flapcli.execution.memory import free_memory
from flapcli.execution.settings import Execution

WIDEST = 4096  # rows and columns of the matrices that are timed
MEASURED, WRITTEN = 0.3, 32 * 2**20  # seconds, and bytes, that a rate is measured by
LIBRARIES = 10**8  # what commands load beside torch and transformers (tests/benchmarks/memory.py)


@dataclass(frozen=True)
class Machine:
    """What this machine does in a second, and has left. `multiplies`: multiply-adds by type and rows at once."""

    runtime: Runtime
    free_memory: int
    free_disk: int
    imported: int
    writes: float

    @classmethod
    def here(cls, execution: Execution, dtype: str, folder: Path) -> "Machine":
        """As it is now; `folder`, or what is there above it, is on the disk that is written to."""
        runtime = Runtime.of(execution, dtype)
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        disk, memory = psutil.disk_usage(str(there)).free, free_memory(runtime.device)
        return cls(runtime, memory, disk, psutil.Process().memory_info().rss + LIBRARIES, _writes(there))

    def multiplies(self, dtype: torch.dtype, rows: int, width: int) -> float:
        """Multiply-adds a second of `rows` (at most 4096) with a square matrix."""
        width = min(width, WIDEST)
        left, right = (
            torch.ones(size, width, dtype=dtype, device=self.runtime.device) for size in (min(rows, WIDEST), width)
        )
        float((left @ right).sum())
        began, times = time.monotonic(), 0
        while (took := time.monotonic() - began) < MEASURED or not times:
            float((left @ right)[0, 0])
            times += 1
        return times * left.numel() * width / took


def _writes(folder: Path) -> float:
    """Bytes a second that the disk takes, or a cautious guess where it takes none."""
    scratch = folder / f".flap-estimate-{os.getpid()}"
    began = time.monotonic()
    try:
        with scratch.open("wb") as file:
            file.write(os.urandom(WRITTEN))
            os.fsync(file.fileno())
    except OSError:
        return 1e8
    finally:
        scratch.unlink(missing_ok=True)
    return WRITTEN / (time.monotonic() - began)
