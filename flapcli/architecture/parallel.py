"""Tensor parallelism: over how many devices the layers of a model can be split, each getting whole heads.

The rule is vLLM's and transformers': query heads and widths divide by the devices, and so do key/value heads, or the
devices by them, where several devices each get a copy of one.
"""

from collections.abc import Iterable
from math import gcd

from flapcli.architecture.shape import LayerShape


def splits(layer: LayerShape, devices: int) -> bool:
    """Whether every device gets the same share of this layer's modules; one that has none is no hindrance."""
    keys = layer.num_key_value_heads
    whole = keys % devices == 0 or devices % keys == 0
    return whole and _common([layer]) % devices == 0


def device_counts(layers: Iterable[LayerShape]) -> list[int]:
    """All numbers of devices, ascending, over which every layer splits; of layers without any module just 1."""
    layers = list(layers)
    common = _common(layers)
    return [n for n in range(1, common + 1) if common % n == 0 and all(splits(layer, n) for layer in layers)] or [1]


def _common(layers: Iterable[LayerShape]) -> int:
    """The greatest common divisor of all query heads and widths; experts are whole or split like an MLP."""
    return gcd(*(
        size for layer in layers for name, size in layer._asdict().items()
        if name not in ("num_key_value_heads", "num_experts")
    ))  # fmt: skip
