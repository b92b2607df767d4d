"""Importance of channels and units, each as METHOD.md writes it (An et al., AAAI 2024). Arrays are float64."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flapcli.shape import ModelShape, Module
from flapcli.stats import ModuleStats, Stats

Scores = NDArray[np.float64]
UnitScores = dict[tuple[int, Module], Scores]


def ifv(stats: ModuleStats) -> Scores:
    """S_j = var_j (METHOD.md, Metrics)."""
    return stats.variance.astype(np.float64)


def wifv(stats: ModuleStats) -> Scores:
    """S_j = var_j * sum_r W_rj^2 (METHOD.md, Metrics)."""
    return stats.variance.astype(np.float64) * stats.weight_square_sum


def wifn(stats: ModuleStats) -> Scores:
    """S_j = mean_r |W_rj| * sqrt(q_j) (METHOD.md, Metrics); Wanda-sp's score but for a constant factor."""
    return stats.weight_abs_mean.astype(np.float64) * np.sqrt(stats.square_mean.astype(np.float64))


def magnitude(stats: ModuleStats) -> Scores:
    """S_j = ||W_:j||_2 (METHOD.md, Baselines, Mag-sp)."""
    return np.sqrt(stats.weight_square_sum.astype(np.float64))


METRICS: dict[str, Callable[[ModuleStats], Scores]] = {
    "IFV": ifv,
    "WIFV": wifv,
    "WIFN": wifn,
    "magnitude": magnitude,
}


def standardise(scores: Scores) -> Scores:
    """z = (S - mean) / std over one layer's channels, std unbiased as in the authors' code; 0 where std is 0."""
    if len(scores) < 2 or (std := scores.std(ddof=1)) == 0:
        return np.zeros_like(scores)
    return (scores - scores.mean()) / std


def unit_scores(stats: Stats, metric: str, exponent: float, adaptive: bool) -> UnitScores:
    """One score per unit of every module.

    Channels of attention are raised to `exponent` first (2 in the authors' code). A head's or KV group's
    score is the sum over its channels, or where `adaptive`, the mean of their standardised scores
    (METHOD.md, Structures).
    """
    return {
        (layer, module): _module_scores(stats.model, module, METRICS[metric](values), exponent, adaptive)
        for (layer, module), values in stats.modules.items()
    }


def _module_scores(shape: ModelShape, module: Module, scores: Scores, exponent: float, adaptive: bool) -> Scores:
    if module == "attention":
        scores = scores**exponent
    if adaptive:
        scores = standardise(scores)
    per_unit = scores.reshape(-1, shape.channels_per_unit(module))
    return per_unit.mean(axis=1) if adaptive else per_unit.sum(axis=1)
