"""A target of parameters or bytes instead of a ratio, and the search for the ratio that meets it. No torch."""

import re
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from flapcli.checkpoint.write import parse_size
from flapcli.errors import FlapError, UnreachableError, UsageError
from flapcli.families import families
from flapcli.safetensors_io import DTYPE_CODES, ITEM_SIZE, TensorSpec
from flapcli.shape import MODULES, ModelShape, Module

SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
STEPS = 10**9  # ratios are searched in billionths, less than a neuron of any model

Kept = Mapping[tuple[int, Module], Sized]


@dataclass(frozen=True)
class Target:
    """At most `limit` parameters, or bytes of weights where `option` is --target-size.

    `dtype` is what the weights will be written in, None the source's; with `biases` those that compensation
    adds are counted too.
    """

    option: str
    limit: int
    dtype: str | None
    biases: bool

    @property
    def unit(self) -> str:
        return "parameters" if self.option == "--target-params" else "bytes of weights"

    @property
    def settings(self) -> dict[str, str | int | bool | None]:
        """What the plan records, read back by `recorded`."""
        found: dict[str, str | int | bool | None] = {self.option[2:].replace("-", "_"): self.limit}
        if self.option == "--target-size":
            found["dtype"] = self.dtype
        return found | {"target_biases": self.biases}

    def size(self, shape: ModelShape, kept: Kept) -> int:
        """Parameters, or bytes, of the model that apply writes when `kept` stays.

        Exact for weights of one type. Never too few: where projections are stored in several types, removed
        parameters count as the narrowest and added biases as the widest; the zeros that a stock folder brings
        count even where transformers refuses its sizes, and norms of an emptied module count as if they stayed.
        """
        removed = sum(
            (shape.units(*key) - len(units)) * (shape.unit_parameters(key[1]) + shape.unit_biases[key[1]])
            for key, units in kept.items()
        )
        return self._measure(shape, removed, _added(shape, kept, self.biases))

    def dense(self, shape: ModelShape) -> int:
        """Parameters, or bytes, before pruning."""
        return self._measure(shape, 0, 0)

    def step(self, shape: ModelShape) -> int:
        """The least by which two plans differ: a unit of the smaller kind."""
        units = [shape.unit_parameters(m) + shape.unit_biases[m] for m in MODULES]
        return self._measure(shape, 0, 0) - self._measure(shape, min(units), 0)

    def _measure(self, shape: ModelShape, removed: int, added: int) -> int:
        if self.option == "--target-params":
            return shape.parameters - removed + added
        if self.dtype:
            return (shape.parameters - removed + added) * ITEM_SIZE[DTYPE_CODES[self.dtype]]
        if shape.weights is None:
            raise FlapError(
                "these statistics do not say what the weights are stored in (an older flap made them): give --dtype, "
                "or calibrate anew with `flap calibrate --force`"
            )
        narrow, wide = shape.weights.itemsize
        return shape.weights.bytes - removed * narrow + added * wide


def target_of(
    ratio: float | None, params: str | None, size: str | None, dtype: str | None, biases: bool | None, method: str
) -> Target | None:
    """The target of the command line, None without one; `biases` None: as apply adds them by default.

    Raises UsageError for options that contradict each other.
    """
    if params is None and size is None:
        if biases is not None:
            raise UsageError("--target-biases is for --target-params and --target-size")
        if dtype:
            raise UsageError(f"--dtype {dtype} is for --target-size; else `flap apply` takes it")
        return None
    if params is not None and size is not None:
        raise UsageError("--target-params and --target-size exclude each other: give one")
    counted = method == "flap" if biases is None else biases
    if params is not None:
        if dtype:
            raise UsageError(f"--dtype {dtype} is for --target-size; `flap apply` takes it here")
        target = Target("--target-params", parse_count(params, "--target-params"), None, counted)
    else:
        target = Target("--target-size", parse_size(str(size), "--target-size"), dtype, counted)
    if ratio is not None:
        raise UsageError(f"{target.option} finds the ratio itself: leave out --ratio {ratio}")
    return target


def recorded(settings: Mapping[str, Any]) -> Target | None:
    """The target that a plan's settings tell of."""
    for key in ("target_params", "target_size"):
        if key in settings:
            option = f"--{key.replace('_', '-')}"
            return Target(option, int(settings[key]), settings.get("dtype"), bool(settings.get("target_biases")))
    return None


def parse_count(text: str, option: str) -> int:
    """Parameters of a count such as `100M`, `1.5B` or `250000`. Raises UsageError naming the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper(), re.ASCII)
    count = int(Fraction(match[1]) * SCALES[match[2]]) if match else 0
    if count < 1:
        raise UsageError(f"{option} {text}: give a number of parameters such as 100M, 1.5B or 250000")
    return count


def find_ratio(target: Target, shape: ModelShape, kept_at: Callable[[float], Kept]) -> float:
    """A ratio, in billionths, whose plan is the largest that meets the target.

    `kept_at` says what stays at a ratio: ever less, in steps. Past what can be removed it raises
    UnreachableError; below what its options remove in any case, UsageError. Raises UsageError where the
    target is above the dense model or below what can be reached.
    """
    if target.limit > (dense := target.dense(shape)):
        raise UsageError(f"{target.option} {target.limit:,}: the dense model has only {dense:,} {target.unit}")
    sizes: dict[int, int] = {}

    def meets(place: int) -> bool:
        try:
            sizes[place] = target.size(shape, kept_at(place / STEPS))
        except UnreachableError:
            return True
        except UsageError:
            return False
        return sizes[place] <= target.limit

    step = target.step(shape)
    low, high = -1, STEPS
    while high - low > 1:
        if low in sizes and high in sizes and sizes[low] - sizes[high] <= step:
            break  # no plan lies between
        middle = _probe(low, high, sizes, target.limit, step)
        low, high = (low, middle) if meets(middle) else (middle, high)
    if high not in sizes:
        kept = kept_at(max(low, 0) / STEPS)
        stay = sum(len(units) * shape.unit_parameters(module) for (_, module), units in kept.items())
        share = 1 - stay / shape.prunable_weights
        raise UsageError(
            f"{target.option} {target.limit:,} can't be reached: these options remove at most {share:.4f} of the "
            f"prunable weights, which leaves {target.size(shape, kept):,} {target.unit}"
        )
    return high / STEPS


def _probe(low: int, high: int, sizes: dict[int, int], limit: int, step: int) -> int:
    """Where to look between both ends: near the limit, as sizes fall almost evenly; halfway once that was tried.

    In turns a little below and above, so that both ends close in.
    """
    if low not in sizes or high not in sizes or len(sizes) > 8:
        return (low + high) // 2
    slope = (sizes[low] - sizes[high]) / (high - low)
    aside = 2 * step / slope * (-1) ** len(sizes)
    return min(max(round(low + (sizes[low] - limit) / slope + aside), low + 1), high - 1)


def exceeded(settings: Mapping[str, Any], specs: Iterable[TensorSpec]) -> str | None:
    """What to tell where a checkpoint of these tensors is larger than the plan's target; None where it is not."""
    target = recorded(settings)
    if target is None:
        return None
    specs = list(specs)
    in_bytes = target.option == "--target-size"
    size = sum(spec.nbytes if in_bytes else prod(spec.shape) for spec in specs)
    if size <= target.limit:
        return None
    kinds = ", ".join(sorted({spec.dtype for spec in specs}))
    return (
        f"{size:,} {target.unit} are written ({kinds}), more than the plan's {target.option} {target.limit:,}: it was "
        f"counted {'with' if target.biases else 'without'} added biases, in {target.dtype or 'the type of the source'}"
    )


def _added(shape: ModelShape, kept: Kept, biases: bool) -> int:
    """Bias entries that the pruned checkpoint has and the source has not (`apply`, `stock`)."""
    biased = shape.weights.output_biases if shape.weights else dict.fromkeys(MODULES, 0)
    outputs = sum(shape.num_layers - biased[m] for m in MODULES) * shape.hidden_size if biases else 0
    gain = [m for m in MODULES if biases or biased[m]]
    counts = {m: {len(units) for (_, module), units in kept.items() if module == m} for m in MODULES}
    even = all(len(found) == 1 and 0 not in found for found in counts.values())
    if not even or any(m not in families()[shape.family].bias_options for m in gain):
        return outputs
    zeros = sum((shape.producer_rows(m) - shape.unit_biases[m]) * counts[m].pop() for m in gain)
    return outputs + zeros * shape.num_layers
