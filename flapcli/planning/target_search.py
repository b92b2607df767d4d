"""A target of parameters or bytes instead of a ratio, and the search for the ratio that meets it. No torch."""

from collections.abc import Callable

from flapcli.architecture.shape import ModelShape
from flapcli.artifacts.target import Kept, Target
from flapcli.errors import UnreachableError, UsageError
from flapcli.storage.dtypes import StoredDtype
from flapcli.storage.sizes import parse_count, parse_share, parse_size

STEPS = 10**9  # ratios are searched in billionths, less than a neuron of any model


def target_of(
    ratio: float | None,
    params: str | None,
    size: str | None,
    dtype: StoredDtype | None,
    biases: bool | None,
    method: str,
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
    if params is not None and dtype:
        raise UsageError(f"--dtype {dtype} is for --target-size; `flap apply` takes it here")
    option, given, parse = (
        ("--target-params", params, parse_count) if params is not None else ("--target-size", str(size), parse_size)
    )
    share = parse_share(given, option)
    target = Target(option, 0 if share else parse(given, option), dtype, counted, share)
    if ratio is not None:
        raise UsageError(f"{target.option} finds the ratio itself: leave out --ratio {ratio}")
    return target


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
        prunable = {key: units for key, units in kept.items() if key[1] in shape.prunable}
        stay = sum(len(units) * shape.unit_parameters(module) for (_, module), units in prunable.items())
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
