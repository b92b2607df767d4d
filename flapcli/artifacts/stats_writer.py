"""Writes a statistics file layer by layer. No torch."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.shape import Module
from flapcli.artifacts import stats
from flapcli.artifacts.stats import GramDtype, Influence, ModuleStats, StatsHeader, Vector
from flapcli.storage.atomic import atomic_file
from flapcli.storage.safetensors_file import StreamWriter, TensorSpec

# Of a layer's number, a module's Gram matrix and Fisher information: the loss at which each unit is eliminated
# (METHOD.md, Elimination).
Eliminate = Callable[[int, Module, NDArray[np.float32], Vector], Vector]


class LayerStats(NamedTuple):
    """What is written of a layer: its block influence and of each module its statistics.

    With Gram matrices those of modules with channels, with Fisher information that of units; else both are empty.
    """

    influence: Influence
    modules: Mapping[Module, ModuleStats]
    grams: Mapping[Module, NDArray[np.float32]]
    fisher: Mapping[Module, Vector] = {}


class StatsWriter:
    """Writes a stats file layer by layer. With `resume`, goes on after the layers that are whole in the file.

    Where the header's settings ask for Fisher information, all layers are followed by theirs, last layer first,
    which is how a backward pass finds it; with Gram matrices, each layer's by what elimination makes of both.
    """

    def __init__(self, path: Path, header: StatsHeader, gram: GramDtype | None, resume: bool = False) -> None:
        shape = header.model
        parts = [stats.layer_tensors(shape, layer, gram) for layer in range(shape.num_layers)]
        if fields := stats.unit_fields(header.settings):
            parts += [stats.unit_tensors(shape, layer, fields) for layer in reversed(range(shape.num_layers))]
        self._parts = parts
        self._specs = {spec.name: spec for specs in parts for spec in specs}
        self._ends = list(accumulate((len(specs) for specs in parts), initial=0))
        self._writer = StreamWriter(path, chain.from_iterable(parts), {"flap": header.model_dump_json()}, resume)

    @property
    def parts(self) -> int:
        """How many layers are whole in the file, and then of how many the Fisher information is."""
        return bisect_right(self._ends, self._writer.written) - 1

    def rewind(self, parts: int) -> None:
        """Go on after the first of the `parts` that are whole."""
        self._writer.rewind(self._ends[parts])

    def write(self, layer: int, found: LayerStats) -> None:
        """Append a layer, but for its Fisher information, and have it on disk.

        Raises ValueError out of order or where something is missing.
        """
        for spec, turned in zip(stats.influence_tensors(layer), found.influence, strict=True):
            self._put(spec, np.array([turned], np.float32))
        for spec in self._parts[layer][len(found.influence) :]:
            _, _, name, field = spec.name.split(".")
            module: Module = name  # type: ignore[assignment]
            self._put(spec, found.grams[module] if field == "gram" else getattr(found.modules[module], field))
        self._writer.sync()

    def write_fisher(self, layer: int, fisher: Mapping[Module, Vector], eliminate: Eliminate) -> None:
        """Append a layer's Fisher information, with Gram matrices its elimination too, and have it on disk.

        `eliminate` sees the Gram matrices as their dtype in the file left them. Raises ValueError out of order.
        """
        for spec in self._parts[-1 - layer]:
            _, _, name, field = spec.name.split(".")
            module: Module = name  # type: ignore[assignment]
            values = fisher[module]
            if field == "elimination":
                values = eliminate(layer, module, self._gram(layer, module), values)
            self._put(spec, values)
        self._writer.sync()

    def _put(self, spec: TensorSpec, values: NDArray[np.float32]) -> None:
        stored = stats.bfloat16_bits(values) if spec.dtype == "BF16" else values
        little = stored.astype(stats.GRAM_STORED[spec.dtype], order="C", copy=False)
        self._writer.write(spec.name, little.reshape(-1).view(np.uint8).data)

    def _gram(self, layer: int, module: Module) -> NDArray[np.float32]:
        """As it is in the file; (0, 0) of a module without channels, which has none."""
        spec = self._specs.get(f"layers.{layer}.{module}.gram")
        if spec is None:
            return np.empty((0, 0), np.float32)
        return stats.read_gram(self._writer.path, spec, self._writer.offsets[spec.name])

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._writer.__exit__(*exception)


def save_stats(
    path: Path,
    header: StatsHeader,
    layers: Iterable[LayerStats],
    gram: GramDtype | None = None,
    eliminate: Eliminate | None = None,
) -> None:
    """Write the artifact atomically, its layers as they come, so that no more than one's Gram matrices are at hand.

    `eliminate` makes elimination of Fisher information and Gram matrices where the header's settings ask for both.
    Raises FlapError where the file system refuses.
    """
    fisher = []
    with atomic_file(path) as scratch, StatsWriter(scratch, header, gram) as writer:
        for layer, found in enumerate(layers):
            writer.write(layer, found)
            fisher.append(found.fisher)
        if eliminate and all(fisher):
            for layer in reversed(range(len(fisher))):
                writer.write_fisher(layer, fisher[layer], eliminate)
