"""Which device, dtype and batch size to run with, and batches that shrink when memory runs out."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.errors import FlapError, UsageError
from flapcli.progress import Advance, Progress

CPU_TOKENS, GPU_TOKENS = 1024, 16384  # a batch's tokens: past these, larger batches gain nothing
BACKWARD = 4  # the share of them that passes with a gradient take, which hold all layers' activations
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises UsageError where this machine has none of that kind."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present.get(name.partition(":")[0], False):
        raise UsageError(
            f"--device {name}: this machine has none; use one of: {', '.join(k for k in present if present[k])}"
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no device; give cpu, cuda, cuda:0 or mps") from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype`: by itself bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        native = device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())
        return torch.bfloat16 if native else torch.float32
    return DTYPES[name]


def pick_eval_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype` where models are measured: by itself float32 on a CPU, so that figures are exact."""
    return torch.float32 if name == "auto" and device.type == "cpu" else pick_dtype(name, device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); emulated it is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def for_batches(
    windows: NDArray[np.int64],
    step: Callable[[torch.Tensor], None],
    device: torch.device,
    batch_size: int | None,
    progress: Progress,
    description: str,
) -> None:
    """Call `step` on (batch, seqlen) token tensors, in order; None as batch size chooses and adapts one.

    `step` must take effect only when it returns: a batch that ran out of memory is cut in halves and tried
    again. Raises FlapError where the batch size was the user's, or one window is too much.
    """
    batches = Batches(windows.shape[1], device, batch_size, progress)

    def on_tokens(part: slice) -> None:
        step(torch.from_numpy(windows[part]).to(device))

    with progress.task(description, windows.size, "tokens") as advance:
        batches.run(len(windows), on_tokens, advance)


class Batches:
    """Cuts windows into batches, smaller ones from where memory ran out on."""

    def __init__(
        self, seqlen: int, device: torch.device, batch_size: int | None, progress: Progress, backward: bool = False
    ) -> None:
        self.seqlen, self.device, self.progress = seqlen, device, progress
        self.fixed = batch_size is not None
        tokens = (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // (BACKWARD if backward else 1)
        self.size = batch_size or max(1, tokens // seqlen)

    def run(self, count: int, step: Callable[[slice], None], advance: Advance, done: int = 0) -> None:
        """Call `step` on the slices of `count` windows, in order, from window `done` on; see `for_batches`."""
        while done < count:
            part = slice(done, min(done + self.size, count))
            try:
                step(part)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                self._shrink(error)
                continue
            done = part.stop
            advance((part.stop - part.start) * self.seqlen)

    def _shrink(self, error: BaseException) -> None:
        if self.fixed or self.size == 1:
            hint = "lower --batch-size" if self.size > 1 else "use a smaller --seqlen or another --device"
            raise FlapError(f"out of memory on {self.device} with batches of {self.size} windows: {hint}") from error
        self.size //= 2
        self.progress.note(f"out of memory on {self.device}: going on with batches of {self.size} windows")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory"))
