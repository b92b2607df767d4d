"""A device without float64, as Apple's GPUs are, emulated: its tensors wrap those of the CPU and refuse what it lacks.

    python -m support.small_device < LINES

Runs each line of standard input as arguments of flap, on that device wherever a device is chosen. Ends with the first
code that is not 0. In a process of its own, since torch takes such a backend once and for all.
"""

import shlex
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import flapcli.execution.device as flap_device
from flapcli.cli.app import app

SMALL = "small"


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device, and the CPU's that does its work."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=f"{SMALL}:0",
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):  # which torch leaves to the classes of tensors
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Catches what makes tensors on the device out of none that are there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """An operation by the CPU; its results are on the device that it names, else on that of its tensors."""
    leaves = tree_leaves((args, kwargs))
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    on = devices[0].type == SMALL if devices else any(isinstance(leaf, OnDevice) for leaf in leaves)
    out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if func._schema.is_mutable and func._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(wrapped, out) if on else out


def bare(value):
    if isinstance(value, OnDevice):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == SMALL else value


def wrapped(value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("this device has no float64")
    with torch.inference_mode(False):  # in which torch would not take views of what was made outside
        return OnDevice(value)


def copy(source, target, *_):
    target.inner.copy_(source)
    return target


def install() -> torch.library.Library:
    """Have torch know the device, and flap choose it; the operations are there as long as what is returned."""
    _setup_privateuseone_for_python_backend(SMALL)
    made = torch.library.Library("aten", "IMPL")
    for name, like in (("empty_strided", torch.empty_strided), ("empty.memory_format", torch.empty)):
        made.impl(name, lambda *size, dtype=None, like=like, **_: wrapped(like(*size, dtype=dtype)), "PrivateUse1")
    made.impl("_copy_from", copy, "PrivateUse1")
    flap_device.NO_FLOAT64.add(SMALL)
    flap_device.pick_device = lambda _name: torch.device(SMALL, 0)
    return made


if __name__ == "__main__":
    kept = install()
    for line in sys.stdin:
        with Mode():
            try:
                app(shlex.split(line))
            except SystemExit as end:
                if end.code:
                    sys.exit(f"{line.strip()}: exit {end.code}")
