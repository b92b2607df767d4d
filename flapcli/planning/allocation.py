"""Structures: from unit scores to which units stay (METHOD.md, Structures)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.shape import EVERY_MODULE, MODULES, ModelShape, Module
from flapcli.errors import UnreachableError, UsageError
from flapcli.planning.scores import UnitScores

Key = tuple[int, Module]
Counts = dict[Key, int]
Kept = dict[Key, NDArray[np.int64]]


@dataclass(frozen=True)
class Request:
    """What to remove. `remove_heads` counts attention units: heads, or KV groups under GQA."""

    structure: str
    ratio: float
    remove_heads: int | None = None
    round_to: int = 1
    heads_multiple_of: int = 1
    allow_empty: bool = False
    tensor_parallel: int = 1


def allocate(shape: ModelShape, scores: UnitScores, request: Request) -> Kept:
    """Indices of the units that stay, ascending, for every module.

    Raises UsageError where the ratio can't be reached with what must stay.
    """
    structure = {"UL-UM": _ul_um, "UL-MM": _ul_mm, "AL-MM": _al_mm, "AL-AM": _al_am}[request.structure]
    removed = _to_multiples(shape, scores, structure(shape, scores, request), request)
    _check_reached(shape, removed, request)
    return {key: np.sort(np.argsort(values, kind="stable")[removed[key] :]) for key, values in scores.items()}


def _ul_um(shape: ModelShape, scores: UnitScores, request: Request) -> Counts:
    """In each layer int(p H) heads and int(p f) neurons."""
    return {key: min(int(request.ratio * len(s)), _removable(len(s), request)) for key, s in scores.items()}


def _ul_mm(shape: ModelShape, scores: UnitScores, request: Request) -> Counts:
    """In each layer remove_heads // L heads, and the neurons that make up the rest of the ratio."""
    heads = (request.remove_heads or 0) // shape.num_layers
    removed: Counts = {}
    for layer in range(shape.num_layers):
        neurons = _neurons(request.ratio * shape.prunable_layer(layer), heads, shape, request)
        for module, count in zip(MODULES, (heads, neurons), strict=True):
            if count > (most := _removable(len(scores[layer, module]), request)):
                raise _unreachable(request, f"layer {layer}, {module}: {count} units to remove, {most} can go")
            removed[layer, module] = count
    return removed


def _al_mm(shape: ModelShape, scores: UnitScores, request: Request) -> Counts:
    """The remove_heads lowest heads of the whole model, and the neurons that make up the rest."""
    heads, per_layer = request.remove_heads or 0, shape.prunable_weights / shape.num_layers
    neurons = _neurons(shape.num_layers * request.ratio * per_layer, heads, shape, request)
    removed: Counts = {}
    for module, count in zip(MODULES, (heads, neurons), strict=True):
        candidates = _ascending(scores, request, (module,))
        if count > len(candidates):
            raise _unreachable(request, f"{count} {module} units to remove, {len(candidates)} can go")
        removed |= Counter(candidates[:count])
    return removed


def _al_am(shape: ModelShape, scores: UnitScores, request: Request) -> Counts:
    """Heads and neurons in one list, each weighing its parameters; the lowest go until the share is gone."""
    candidates = _ascending(scores, request)
    target = request.ratio * shape.prunable_weights
    weights = {key: shape.weights_of_unit(*key) for key in scores}
    gone = np.cumsum([0, *(weights[key] for key in candidates)], dtype=np.int64)
    if gone[-1] < target:
        raise _unreachable(request, f"at most {gone[-1] / target * request.ratio:.4f} can go")
    return Counter(candidates[: int(np.searchsorted(gone, target))])


def _ascending(scores: UnitScores, request: Request, modules: Iterable[Module] = EVERY_MODULE) -> list[Key]:
    """The module of every unit that may go, lowest score first; ties: attention before MLP, then layer, unit."""
    keys = sorted((key for key in scores if key[1] in modules), key=lambda key: (EVERY_MODULE.index(key[1]), key[0]))
    owner = np.repeat(np.arange(len(keys)), [len(scores[key]) for key in keys])
    order = owner[np.argsort(np.concatenate([scores[key] for key in keys]), kind="stable")]
    # The last of each module to come up is its best unit, which stays; so drop each module's last.
    if not request.allow_empty and len(order):
        last = {int(module): place for place, module in enumerate(order.tolist())}
        order = np.delete(order, list(last.values()))
    return [keys[module] for module in order.tolist()]


def _neurons(budget: float, heads: int, shape: ModelShape, request: Request) -> int:
    """How many neurons go beside `heads` until `budget` parameters are gone."""
    rest = budget - _weights(shape, "attention") * heads
    if rest < 0:
        raise UsageError(
            f"--remove-heads {request.remove_heads} alone removes more than --ratio {request.ratio}: "
            "lower the one or raise the other"
        )
    return int(rest / shape.unit_parameters("mlp"))


def _weights(shape: ModelShape, module: Module) -> int:
    """Weights of one of a module's units, in whichever layers have some."""
    return max(shape.weights_of_unit(i, module) for i in range(shape.num_layers))


def _removable(units: int, request: Request) -> int:
    return units if request.allow_empty else max(units - 1, 0)


def _unreachable(request: Request, why: str) -> UnreachableError:
    hint = "" if request.allow_empty else ", since every module keeps a unit without --allow-empty"
    return UnreachableError(f"--ratio {request.ratio} can't be reached: {why}{hint}")


def _check_reached(shape: ModelShape, removed: Counts, request: Request) -> None:
    """Raise UnreachableError where multiples keep a structure of the whole model more than a block from the ratio."""
    blocks = {m: request.heads_multiple_of if m == "attention" else request.round_to for m in shape.modules}
    if request.structure.startswith("UL") or max(blocks.values()) == 1:
        return
    gone = sum(count * shape.weights_of_unit(*key) for key, count in removed.items())
    largest = max(_weights(shape, module) * block for module, block in blocks.items())
    if request.ratio * shape.prunable_weights - gone > largest:
        raise _unreachable(request, f"in these multiples at most {gone / shape.prunable_weights:.4f} can go")


def _to_multiples(shape: ModelShape, scores: UnitScores, removed: Counts, request: Request) -> Counts:
    """Round what each layer keeps to the multiples asked for; over all layers (AL) the total stays near the ratio.

    Returns how many units each module loses; modules that `removed` does not name lose none so far.
    """
    kept = {key: shape.units(*key) - removed.get(key, 0) for key in scores}
    if request.heads_multiple_of > 1:
        kept |= _apportion(kept, "attention", shape, request.heads_multiple_of, request)
        if request.structure.startswith("AL"):  # the neurons make up for what rounding the heads moved
            gone = sum(shape.units(*key) - count for key, count in kept.items() if key[1] == "attention")
            total = request.ratio * shape.prunable_weights
            rest = max(total - gone * _weights(shape, "attention"), 0.0)
            neurons = Counter(_up_to(rest, _ascending(scores, request, EVERY_MODULE[1:]), shape))
            kept |= {key: shape.units(*key) - neurons[key] for key in kept if key[1] != "attention"}
    for module in EVERY_MODULE[1:] if request.round_to > 1 else ():
        kept |= _apportion(kept, module, shape, request.round_to, request)
    return {key: shape.units(*key) - count for key, count in kept.items()}


def _up_to(budget: float, candidates: list[Key], shape: ModelShape) -> list[Key]:
    """The first of the candidates, as many as come nearest to so many weights."""
    weights = [shape.weights_of_unit(*key) for key in candidates]
    if len({*weights}) < 2:
        return candidates[: round(budget / weights[0])] if weights else []
    return candidates[: int(np.searchsorted(np.cumsum(weights), budget))]


def _apportion(counts: Counts, module: Module, shape: ModelShape, multiple: int, request: Request) -> Counts:
    """Multiples by largest remainder: round all down, then give blocks back to those that lost most.

    Where layers are alike (UL) they stay so: each goes to its nearest multiple, the smaller of two.
    """
    kept = {key: count for key, count in counts.items() if key[1] == module}
    most = {key: shape.units(*key) // multiple * multiple for key in kept}
    least = 0 if request.allow_empty else multiple
    for layer, _ in kept:
        if 0 < (units := shape.units(layer, module)) < multiple and not request.allow_empty:
            option = "--heads-multiple-of" if module == "attention" else "--round-to"
            raise UsageError(f"{option} {multiple}: layer {layer}, {module} has only {units} units")
    low = {key: min(max(count // multiple * multiple, least), most[key]) for key, count in kept.items()}
    if request.structure.startswith("UL"):
        return {k: low[k] + multiple * (low[k] < most[k] and 2 * (kept[k] - low[k]) > multiple) for k in kept}
    blocks = round((sum(kept.values()) - sum(low.values())) / multiple)
    by_loss = sorted((key for key in kept if low[key] < most[key]), key=lambda key: low[key] - kept[key])
    for key in by_loss[: max(blocks, 0)]:
        low[key] += multiple
    return low
