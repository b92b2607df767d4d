"""Which rows of a tensor belong to which head or neuron: one map, from which cuts, shapes and counts follow.

A description gives a tensor as blocks that lie one after the other, each a list of symbols that take turns head by
head or neuron by neuron: `[["q", "k", "v"]]` is interleaved, `[["q"], ["k"], ["v"]]` is concatenated. `q` stands for a
query head's rows (in a KV group those of all its query heads), `k` and `v` for those of a key/value head, `n` for a
neuron's of the MLP, `s` of a shared expert, `x` of an expert (its rows alone), `e` for an expert's of its router; their
number is head_dim, one for all but heads, or what stands behind a colon, such as `q:2*head_dim`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.shape import LayerShape, Size

Symbols = list[list[str]]
SIZE_OF: dict[str, Size] = {
    "q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads", "n": "intermediate_size",
    "s": "shared_expert_size", "e": "num_experts", "x": "expert_size",
}  # fmt: skip
Kept = Mapping[Size, NDArray[np.bool_]]  # which of the heads, or neurons, of a layer stay


class Part(NamedTuple):
    """Rows for one of what `size` counts."""

    size: Size
    rows: int


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """A sum of products of numbers and names, such as `2*head_dim`, or the least of several: `a,b`.

    Raises KeyError for an unknown name.
    """
    if "," in expression:
        return min(evaluate(part, values) for part in expression.split(","))
    total = 0
    for term in expression.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdigit() else values[factor]
        total += product
    return total


@dataclass(frozen=True)
class RowMap:
    """A tensor's rows (its first axis, or the last of transposed weights), in blocks of parts that take turns."""

    blocks: tuple[tuple[Part, ...], ...]

    @classmethod
    def of(cls, symbols: Symbols, values: Mapping[str, int]) -> "RowMap":
        """From a description's symbols; `values` are the sizes that their expressions name."""

        def part(symbol: str) -> Part:
            letter, _, rows = symbol.partition(":")
            return Part(SIZE_OF[letter], evaluate(rows or ("head_dim" if letter in "qkv" else "1"), values))

        return cls(tuple(tuple(part(symbol) for symbol in block) for block in symbols))

    @property
    def per(self) -> dict[Size, int]:
        """Rows for one of what each size counts."""
        found: dict[Size, int] = {}
        for block in self.blocks:
            for size, rows in block:
                found[size] = found.get(size, 0) + rows
        return found

    def count(self, layer: LayerShape) -> int:
        """Rows in a layer of these sizes."""
        return sum(getattr(layer, size) * rows for size, rows in self.per.items())

    def split(self, sizes: Mapping[str, int]) -> list[NDArray[np.int64]]:
        """The rows of every symbol in turn, of a tensor of a layer or a model of these sizes."""
        owners, count = [], 0
        for block in self.blocks:
            turns = max(1, sizes["num_key_value_heads" if block[0].size == "num_attention_heads" else block[0].size])
            each = [sizes[size] // turns * rows for size, rows in block]
            owners.append(np.tile(np.repeat(np.arange(count, count + len(block)), each), turns))
            count += len(block)
        whole = np.concatenate(owners)
        return [np.flatnonzero(whole == symbol) for symbol in range(count)]

    def indices(self, kept: Kept) -> NDArray[np.int64]:
        """Rows of what stays, ascending; `kept` is of a module that has units."""
        named = [size for block in self.blocks for size, _ in block]
        turns = len(kept["num_key_value_heads" if "num_key_value_heads" in kept else named[0]])
        rows = [
            np.concatenate([np.repeat(kept[s].reshape(turns, -1), n, axis=1) for s, n in block], axis=1).ravel()
            for block in self.blocks
        ]
        return np.flatnonzero(np.concatenate(rows))
