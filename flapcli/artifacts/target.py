"""A target of parameters or bytes in the place of a ratio, as a plan records it. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.family import families
from flapcli.architecture.shape import MODULES, ModelShape, Module
from flapcli.errors import FlapError
from flapcli.storage.dtypes import CODES, ITEM_SIZE, StoredDtype
from flapcli.storage.safetensors_file import TensorSpec

Kept = Mapping[tuple[int, Module], NDArray[np.int64]]


@dataclass(frozen=True)
class Target:
    """At most `limit` parameters, or bytes of weights where `option` is --target-size, or that `share` of the dense's.

    `dtype` is what the weights will be written in, None the source's; with `biases` those that compensation
    adds are counted too.
    """

    option: str
    limit: int
    dtype: StoredDtype | None
    biases: bool
    share: Fraction | None = None

    @property
    def unit(self) -> str:
        return "parameters" if self.option == "--target-params" else "bytes of weights"

    @property
    def settings(self) -> dict[str, str | int | bool | None]:
        """What the plan records, read back by `of_settings`."""
        found: dict[str, str | int | bool | None] = {self.option[2:].replace("-", "_"): self.limit}
        if self.option == "--target-size":
            found["dtype"] = self.dtype
        return found | {"target_biases": self.biases}

    def size(self, shape: ModelShape, kept: Kept) -> int:
        """Parameters, or bytes, of the model that apply writes when `kept` stays.

        Exact for weights of one type. Never too few: where projections are stored in several types, removed
        parameters count as the narrowest and added biases as the widest; the zeros that a stock folder brings
        count even where transformers refuses its sizes, and norms of a dropped layer count as if they stayed.
        """
        kept = self._written(shape, kept)
        removed = sum(
            (shape.units(*key) - len(units)) * (shape.unit_parameters(key[1]) + shape.unit_biases[key[1]])
            for key, units in kept.items()
        )
        removed += shape.shared_entries * sum(key[1] == "attention" and not len(units) for key, units in kept.items())
        return self._measure(shape, removed, _added(shape, kept, self.biases))

    def _written(self, shape: ModelShape, kept: Kept) -> Kept:
        """The units that files hold: a layer that keeps none is not written unless biases or norms of it act."""
        biased = shape.weights is not None and any(shape.weights.output_biases.values())
        acts = self.biases or biased or families()[shape.family].norms_stream
        there = {layer for (layer, _), units in kept.items() if acts or len(units)}
        return {(i, m): shape.written(i, m, units) if i in there else units for (i, m), units in kept.items()}

    def dense(self, shape: ModelShape) -> int:
        """Parameters, or bytes, before pruning."""
        return self._measure(shape, 0, 0)

    def step(self, shape: ModelShape) -> int:
        """The least by which two plans differ: a unit of the smaller kind."""
        units = [shape.unit_parameters(m) + shape.unit_biases[m] for m in shape.prunable]
        return self.dense(shape) - self._measure(shape, min(units), 0)

    def of(self, shape: ModelShape) -> "Target":
        """The same with the limit that a share of this model comes to."""
        return replace(self, limit=int(self.share * self.dense(shape)), share=None) if self.share else self

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Target | None":
        """The target that a plan's settings tell of; None where they tell of none."""
        for key in ("target_params", "target_size"):
            if key in settings:
                option = f"--{key.replace('_', '-')}"
                return cls(option, int(settings[key]), settings.get("dtype"), bool(settings.get("target_biases")))
        return None

    def overrun(self, specs: Iterable[TensorSpec]) -> str | None:
        """What to tell where a checkpoint of these tensors is larger than the target; None where it is not."""
        specs = list(specs)
        in_bytes = self.option == "--target-size"
        size = sum(spec.nbytes if in_bytes else prod(spec.shape) for spec in specs)
        if size <= self.limit:
            return None
        kinds = ", ".join(sorted({spec.dtype for spec in specs}))
        return (
            f"{size:,} {self.unit} are written ({kinds}), more than the plan's {self.option} {self.limit:,}: it was "
            f"counted {'with' if self.biases else 'without'} added biases, in {self.dtype or 'the type of the source'}"
        )

    def _measure(self, shape: ModelShape, removed: int, added: int) -> int:
        if self.option == "--target-params":
            return shape.parameters - removed + added
        if self.dtype:
            return (shape.parameters - removed + added) * ITEM_SIZE[CODES[self.dtype]]
        if shape.weights is None:
            raise FlapError(
                "these statistics do not say what the weights are stored in (an older flap made them): give --dtype, "
                "or calibrate anew with `flap calibrate --force`"
            )
        narrow, wide = shape.weights.itemsize
        return shape.weights.bytes - removed * narrow + added * wide


def _added(shape: ModelShape, kept: Kept, biases: bool) -> int:
    """Bias entries that the pruned checkpoint has and the source has not (pruning/layout.py, pruning/stock_form.py)."""
    modules: list[Module] = [m for m in shape.modules if m != "experts"]  # which get no biases
    biased = shape.weights.output_biases if shape.weights else dict.fromkeys(modules, 0)
    have = {m: sum(shape.units(i, m) > 0 or modules == [*MODULES] for i in range(shape.num_layers)) for m in modules}
    outputs = sum(have[m] - biased[m] for m in modules) * shape.hidden_size if biases else 0
    gain = [m for m in modules if biases or biased[m]]
    counts = {m: {len(units) for (_, module), units in kept.items() if module == m} for m in modules}
    even = all(len(found) == 1 and 0 not in found for found in counts.values())
    if not even or any(m not in families()[shape.family].bias_options for m in gain):
        return outputs
    zeros = sum((shape.producer_rows(m) - shape.unit_biases[m]) * counts[m].pop() for m in gain)
    return outputs + zeros * shape.num_layers
