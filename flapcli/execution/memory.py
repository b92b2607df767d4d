"""How much memory a device has free, and whether a model fits."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from flapcli.artifacts.stats import gram_bytes
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.execution.device import Runtime
from flapcli.progress import Progress
from flapcli.storage.dtypes import dtype_name

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device; a container's limit counts, caches that yield do not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = [psutil.virtual_memory().available, *_cgroup_free(CGROUP)]
    if device.type == "mps":
        free.append(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return max(0, min(free))


def _cgroup_free(folder: Path) -> Iterable[int]:
    """What a container's limit (cgroup 2) leaves, where there is one; cached files are given up first."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if limit != "max":
        yield int(limit) - used + int(entries.get("inactive_file", 0))


def give_back() -> None:
    """Return freed memory to the system, where the C library or a GPU's allocator would keep it.

    What torch keeps of a GPU counts as taken when the next model is weighed against what is free. And glibc before
    2.38 hardly reuses freed aligned blocks, which tensors are: memory would grow by half of every layer that is read
    and dropped.
    """
    import ctypes

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def should_stream(checkpoint: Checkpoint, runtime: Runtime, gram: bool, wish: bool | None, progress: Progress) -> bool:
    """Whether to go layer by layer: as wished, else where the model (and Gram sums) exceed the memory."""
    if wish is not None:
        return wish
    device, dtype, shape = runtime.device, runtime.dtype, checkpoint.shape
    needed = shape.parameters * dtype.itemsize
    if gram:
        needed += sum(gram_bytes(shape, layer) for layer in range(shape.num_layers))
    # Processes that torchrun started on this machine share its memory, but not their GPUs.
    free = free_memory(device) // (1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if needed <= free:
        return False
    what = f"weights{' and Gram sums' if gram else ''} in {dtype_name(dtype)}"
    progress.note(
        f"{what} take {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free: going layer by layer (--stream)"
    )
    return True
