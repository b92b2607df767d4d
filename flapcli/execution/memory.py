"""How much memory a device has free, and whether a model fits."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flapcli.artifacts.stats import gram_bytes
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.batches import Batches
from flapcli.execution.device import Runtime
from flapcli.progress import Progress, Silent
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


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the host's memory; a GPU's pinned, which torch keeps: fresh pages take ten times as long."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


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


@dataclass(frozen=True)
class Demand:
    """What a model in memory is asked for: batches of windows of `seqlen` tokens.

    `gram`: Gram sums of all layers; `backward`: a pass back through the activations; `logits` of a whole batch.
    """

    seqlen: int
    gram: bool = False
    backward: bool = False
    logits: bool = False


def in_memory_bytes(checkpoint: Checkpoint, runtime: Runtime, demand: Demand) -> int:
    """Bytes that the model, its sums and one batch take: what is held when everything is done in memory.

    Of the activations the largest alone are counted: those of one layer and float32 copies of what is recorded, for a
    backward pass those of one layer's graph and what all layers were given.
    """
    shape, size = checkpoint.shape, runtime.dtype.itemsize
    sizes = [Batches(demand.seqlen, runtime.device, runtime.batch_size, Silent(), back).size for back in (False, True)]
    layer = 3 * shape.hidden_size + 4 * shape.intermediate_size
    activations = layer * size + 8 * shape.intermediate_size
    back = 2 * activations + shape.hidden_size * (shape.num_layers * size + 5 * (size + 4)) if demand.backward else 0
    if demand.logits:
        activations += checkpoint.vocabulary * size
    grams = sum(gram_bytes(shape, layer) for layer in range(shape.num_layers)) if demand.gram else 0
    return shape.parameters * size + grams + max(activations * sizes[0], back * sizes[1]) * demand.seqlen


def should_stream(
    checkpoint: Checkpoint, runtime: Runtime, demand: Demand, wish: bool | None, progress: Progress
) -> bool:
    """Whether to go layer by layer: as wished, else where all that is held at once exceeds the memory."""
    if wish is not None:
        return wish
    device, needed = runtime.device, in_memory_bytes(checkpoint, runtime, demand)
    # Processes that torchrun started on this machine share its memory, but not their GPUs.
    free = free_memory(device) // (1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if needed <= free:
        return False
    progress.note(f"{_described(demand, runtime, needed)}, {device} has {free / 1e9:.1f} GB free: going layer by layer "
                  "(--stream)")  # fmt: skip
    return True


def refuse_map(checkpoint: Checkpoint, runtime: Runtime, demand: Demand) -> None:
    """Raise FlapError where not even all devices that `--device-map` spreads a model over hold what it is asked for."""
    needed, gpus = in_memory_bytes(checkpoint, runtime, demand), range(torch.cuda.device_count())
    free = sum(free_memory(torch.device(name)) for name in ("cpu", *(f"cuda:{gpu}" for gpu in gpus)))
    if needed > free:
        raise FlapError(
            f"--device-map: {_described(demand, runtime, needed)}, all devices together have {free / 1e9:.1f} GB free: "
            "use --stream in its place"
        )


def _described(demand: Demand, runtime: Runtime, needed: int) -> str:
    sums = " and Gram sums" if demand.gram else ""
    return f"weights{sums} in {dtype_name(runtime.dtype)} and a batch take {needed / 1e9:.1f} GB"


def stay_in_memory(nbytes: int, most: int | None = None) -> bool:
    """Whether so many bytes of hidden states stay in RAM: up to `most`, and never more than half of what is free."""
    return nbytes <= min(free_memory(torch.device("cpu")) // 2, nbytes if most is None else most)
