"""Which device and dtype a model runs in. The only place that knows what a device can do."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from flapcli.errors import UsageError
from flapcli.execution.processes import several_processes
from flapcli.execution.settings import Execution
from flapcli.storage.dtypes import torch_dtype


@dataclass(frozen=True)
class Runtime:
    """Where a model runs, in what, and in batches of how many windows; None chooses and adapts a size.

    Hidden states that exceed memory go into files beside `scratch`.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int | None = None
    scratch: Path = Path("flap")

    @classmethod
    def of(cls, execution: Execution, dtype: str) -> "Runtime":
        """As asked for. Raises UsageError where this machine has no such device."""
        torch.set_float32_matmul_precision("highest")  # float32 is float32, whatever an image says of TF32
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length: 6 s for a window of 128 tokens
        device = pick_device(execution.device)
        return cls(device, pick_dtype(dtype, device), execution.batch_size)

    @classmethod
    def of_eval(cls, execution: Execution, dtype: str) -> "Runtime":
        """As `of`, where models are measured: on as many threads as asked for."""
        if execution.threads:
            torch.set_num_threads(execution.threads)
        return cls.of(execution, dtype)


def pick_device(name: str) -> torch.device:
    """The torch device of `--device`. Raises UsageError where this machine has none of that kind."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    if not present.get(name.partition(":")[0], False):
        usable = ", ".join(kind for kind in present if present[kind])
        raise UsageError(f"--device {name}: this machine has none; use one of: {usable}")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no device; give cpu, cuda, cuda:0 or mps") from error


def own_gpu(device: torch.device) -> torch.device:
    """Of several processes on one machine each takes its own GPU."""
    if several_processes() and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype`: by itself bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        native = BFLOAT16[device.type](device) if device.type in BFLOAT16 else False
        return torch.bfloat16 if native else torch.float32
    return torch_dtype(name)


def sums_dtype(device: torch.device) -> torch.dtype:
    """What long sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def float64_device(device: torch.device) -> torch.device:
    """The device, or the CPU where that has no float64, which float32 solves are checked by and draws summed in."""
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def _cpu_has_bfloat16(_device: torch.device) -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); emulated it is slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def _gpu_has_bfloat16(device: torch.device) -> bool:
    """From Ampere on; those before (V100, T4) emulate it."""
    return torch.cuda.get_device_capability(device)[0] >= 8


BFLOAT16 = {"cpu": _cpu_has_bfloat16, "cuda": _gpu_has_bfloat16}  # which multiply it themselves, by kind
NO_FLOAT64 = {"mps"}
