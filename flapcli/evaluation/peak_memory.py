"""Peak memory of generating with a model, in a process of its own, so that no other model's memory counts."""

import contextlib
import gc
import multiprocessing
import multiprocessing.context
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from flapcli.checkpoints import Checkpoint, Hub, open_checkpoint
from flapcli.errors import FlapError
from flapcli.evaluation.speed import time_round
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model
from flapcli.execution.settings import SpeedOptions


def peak_memory(checkpoint: Checkpoint, options: SpeedOptions, runtime: Runtime) -> int:
    """Bytes at the peak of the largest case's prefill and decode: of the device, else resident in RAM.

    Resident memory counts the whole process: weights, cache, activations and also Python and torch themselves.
    On Linux the peak of loading is left out; elsewhere the system only knows the peak of both.
    Raises FlapError where the process is killed, as by want of memory.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=_context()) as pool:
            return pool.submit(_measure, checkpoint.name, checkpoint.hub, options, runtime).result()
    except BrokenProcessPool as error:
        raise FlapError(f"measuring the memory of {checkpoint.name} was killed: too little of it?") from error


def _context() -> multiprocessing.context.BaseContext:
    """A server whose forks have imported what runs models already, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _measure(name: str, hub: Hub, options: SpeedOptions, runtime: Runtime) -> int:
    """Runs in the process of its own."""
    device = runtime.device
    model = load_model(open_checkpoint(name, hub), runtime.dtype, device)
    gc.collect()
    with contextlib.suppress(OSError):  # on Linux: sets the peak back to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    case = max(options.cases, key=lambda case: case[0] * (case[1] + options.new_tokens))
    with torch.inference_mode():
        time_round(model, torch.zeros(case, dtype=torch.long, device=device), options.new_tokens)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


def _peak_resident() -> int:
    """Bytes. Linux's VmHWM, because ru_maxrss there starts from the parent's at its fork."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
