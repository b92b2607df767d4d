"""Multiples of heads and neurons that let every layer be split over several devices. No torch."""

from dataclasses import replace
from math import lcm

import numpy as np

from flapcli.architecture.parallel import splits
from flapcli.architecture.shape import OWN_SIZES, LayerShape, ModelShape, Module
from flapcli.errors import UsageError
from flapcli.planning.allocation import Request

ALIGNED = 16  # neurons that a device gets come in multiples of it, which matrix units and 8-bit kernels want


def over_devices(shape: ModelShape, request: Request) -> Request:
    """The request in multiples that split over its devices, the multiples that it asks for included.

    Raises UsageError where the model has no such sizes.
    """
    devices = request.tensor_parallel
    if devices == 1:
        return request
    for module in shape.whole or {}:
        _check_whole(shape, module, devices)
    width = lcm(request.round_to, ALIGNED * devices)
    for module in shape.prunable:
        for layer in range(shape.num_layers):
            if module != "attention" and 0 < (neurons := _slices(shape, layer, module)) < width:
                beside = f" with --round-to {request.round_to}" if request.round_to > 1 else ""
                raise UsageError(
                    f"--tensor-parallel {devices}{beside} keeps neurons in multiples of {width}, and layer {layer}, "
                    f"{module} of {shape.name} has only {neurons}"
                )
    heads = _heads(shape, request) if "attention" in shape.prunable else request.heads_multiple_of
    return replace(request, round_to=width, heads_multiple_of=heads)


def _heads(shape: ModelShape, request: Request) -> int:
    """The least multiple of --heads-multiple-of all of whose multiples, as many as layers have, split."""
    devices, step = request.tensor_parallel, request.heads_multiple_of
    layers = [layer for layer in range(shape.num_layers) if _slices(shape, layer, "attention")]
    fewest = min((_slices(shape, layer, "attention") for layer in layers), default=0)
    for multiple in range(step, fewest + 1, step):
        counts = ((i, n) for i in layers for n in range(multiple, _slices(shape, i, "attention") + 1, multiple))
        if all(splits(_alone(shape, layer, "attention", count), devices) for layer, count in counts):
            return multiple
    beside = f" in multiples of --heads-multiple-of {step}" if step > 1 else ""
    raise UsageError(
        f"--tensor-parallel {devices}: no number of {shape.name}'s attention heads{beside} splits over them: "
        f"layers have {shape.num_attention_heads} heads, {shape.num_key_value_heads} key/value heads, and each "
        "device gets equally many query heads, and whole key/value heads or a copy of one that others have too"
    )


def _check_whole(shape: ModelShape, module: Module, devices: int) -> None:
    """Raise UsageError where a module that can't be cut does not split as it is."""
    if not all(splits(_alone(shape, i, module, _slices(shape, i, module)), devices) for i in range(shape.num_layers)):
        raise UsageError(
            f"--tensor-parallel {devices}: {module} of {shape.name} can't be cut, and does not split over {devices} "
            "devices as it is"
        )


def _slices(shape: ModelShape, layer: int, module: Module) -> int:
    """How many units of a layer's module are counted for multiples: those of one part where one of each goes."""
    return shape.units(layer, module) // shape.groups(layer, module)


def _alone(shape: ModelShape, layer: int, module: Module, count: int) -> LayerShape:
    """A layer of one module, in which so many of its units, or slices of them, stay."""
    units = np.arange(count * shape.groups(layer, module))
    return LayerShape(**dict.fromkeys(OWN_SIZES, 0) | shape.sizes_of(layer, module, units))
