"""Whole experts: in every layer those of least saliency go (METHOD.md, Experts). Needs no weights, no torch."""

from math import ceil

import numpy as np

from flapcli.artifacts.few_tokens import over_experts, shrunk
from flapcli.artifacts.stats import ExpertStats, Stats
from flapcli.errors import UnreachableError, UsageError
from flapcli.planning.allocation import Kept


def drop_experts(stats: Stats, ratio: float) -> Kept:
    """Units that stay: none of the experts of lowest saliency, in every layer as many, the fewest that reach the ratio.

    Ties go by index. Raises UsageError for a model whose experts can't go, UnreachableError where none would stay.
    """
    shape = stats.model
    experts = {i: layer.num_experts for i, layer in enumerate(shape.layers) if layer.num_experts}
    if not experts or shape.every_expert:
        raise UsageError(f"--method experts: {shape.name} has {_why(shape.every_expert)}")
    of_one = sum(shape.layers[i].expert_size * shape.unit_parameters("experts") for i in experts)
    count = ceil(ratio * shape.prunable_weights / of_one - 1e-9)
    if count >= min(experts.values()):
        raise UnreachableError(f"--ratio {ratio}: it takes all experts of a layer to reach it, and one must stay")
    kept = {(i, m): np.arange(shape.units(i, m)) for i in range(shape.num_layers) for m in shape.modules}
    for layer, number in experts.items():
        stays = np.ones((number, shape.layers[layer].expert_size), dtype=bool)
        stays[np.argsort(_saliency(stats, layer), kind="stable")[:count]] = False
        kept[layer, "experts"] = np.flatnonzero(stays)
    return kept


def _why(every_expert: str | None) -> str:
    return f"experts that can't go whole: {every_expert}" if every_expert else "no experts; take another method"


def _saliency(stats: Stats, layer: int) -> np.ndarray:
    """Of each expert, that of few tokens leaning towards what is usual in the layer."""
    found = stats.modules[layer, "experts"]
    if not isinstance(found, ExpertStats):
        raise TypeError("experts without their counts of tokens")
    return shrunk(found.saliency, over_experts(found.saliency, found.tokens), found.tokens)
