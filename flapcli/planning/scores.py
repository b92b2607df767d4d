"""Importance of channels and units; arrays are float64.

Metrics of channels make unit scores by the structures' rules; metrics of units are unit scores by themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.shape import ModelShape, Module
from flapcli.artifacts.few_tokens import over_experts, shrunk
from flapcli.artifacts.stats import ExpertStats, ModuleStats, Stats
from flapcli.errors import FlapError, UsageError

ELIMINATION_WEIGHT = 3.0  # of a head's elimination beside a neuron's Fisher information (METHOD.md, Elimination)

Scores = NDArray[np.float64]
UnitScores = dict[tuple[int, Module], Scores]

# S_j of a projection's channels (METHOD.md, Metrics; magnitude: METHOD.md, Baselines), (channels,).
METRICS: dict[str, Callable[[ModuleStats], Scores]] = {
    "IFV": lambda stats: stats.variance.astype(np.float64),
    "WIFV": lambda stats: stats.variance.astype(np.float64) * stats.weight_square_sum,
    "WIFN": lambda stats: stats.weight_abs_mean.astype(np.float64) * np.sqrt(stats.square_mean.astype(np.float64)),
    "magnitude": lambda stats: np.sqrt(stats.weight_square_sum.astype(np.float64)),
}


def fisher(stats: Stats) -> UnitScores:
    """S_u = F_u / parameters_u (METHOD.md, Fisher information).

    Raises FlapError where calibration did not keep Fisher information.
    """
    if stats.fisher is None:
        raise FlapError(
            f"{stats.path} has no Fisher information, which --metric FISHER needs: run `flap calibrate --fisher`"
        )
    return _per_parameter(stats, stats.fisher)


def fisher_obs(stats: Stats) -> UnitScores:
    """S_u = 3 E_u / parameters_u in attention, F_u / parameters_u in the MLP (METHOD.md, Elimination).

    Raises FlapError where calibration did not keep both Gram matrices and Fisher information.
    """
    if stats.fisher is None or stats.elimination is None:
        raise FlapError(
            f"{stats.path} has no elimination, which --metric FISHER-OBS needs: run `flap calibrate --gram "
            "--fisher`, or `flap calibrate --preset best`, which keeps all that --preset best reads"
        )
    heads = {key: ELIMINATION_WEIGHT * values for key, values in stats.elimination.items()}
    return _per_parameter(stats, stats.fisher | heads)


def _per_parameter(stats: Stats, losses: Mapping[tuple[int, Module], NDArray[np.floating]]) -> UnitScores:
    return {
        (layer, module): _spread(stats.modules[layer, module], values.astype(np.float64))
        / stats.model.unit_parameters(module)
        for (layer, module), values in losses.items()
    }


def _spread(stats: ModuleStats, losses: NDArray[Any]) -> NDArray[Any]:
    """Losses over all tokens, were experts' tokens spread evenly; those that saw few lean towards their layer's."""
    if not isinstance(stats, ExpertStats) or not len(stats.tokens):
        return losses
    of_each = losses.reshape(len(stats.tokens), -1)
    return shrunk(of_each, over_experts(of_each, stats.tokens).mean(), stats.tokens).ravel()


UNIT_METRICS: dict[str, Callable[[Stats], UnitScores]] = {"FISHER": fisher, "FISHER-OBS": fisher_obs}


def standardise(scores: Scores) -> Scores:
    """z = (S - mean) / std over one layer's channels, std unbiased as in the authors' code; 0 where std is 0."""
    if len(scores) < 2 or (std := scores.std(ddof=1)) == 0:
        return np.zeros_like(scores)
    return (scores - scores.mean()) / std


def unit_scores(stats: Stats, metric: str, exponent: float, adaptive: bool) -> UnitScores:
    """One score per unit of every prunable module.

    A metric of channels is summed over a unit's channels, or where `adaptive` standardised and averaged, attention's
    raised to `exponent` first (METHOD.md, Structures). A metric of units is taken as it is.
    """
    found = (
        UNIT_METRICS[metric](stats)
        if metric in UNIT_METRICS
        else {
            (layer, module): _module_scores(stats.model, module, METRICS[metric](_usual(values)), exponent, adaptive)
            for (layer, module), values in stats.modules.items()
        }
    )
    return {key: values for key, values in found.items() if key[1] in stats.model.prunable}


def _usual(stats: ModuleStats) -> ModuleStats:
    """Statistics as metrics read them: those of experts that saw few tokens lean towards their layer's.

    Nothing makes up for the mean of an expert's channel: its mean square stands for its variance (METHOD.md, Experts).
    """
    if not isinstance(stats, ExpertStats) or not len(stats.tokens):
        return stats
    of_each = stats.square_mean.reshape(len(stats.tokens), -1)
    square = shrunk(of_each, over_experts(of_each, stats.tokens).mean(), stats.tokens).ravel()
    return replace(stats, variance=square, square_mean=square)


def _module_scores(shape: ModelShape, module: Module, scores: Scores, exponent: float, adaptive: bool) -> Scores:
    by_unit = (-1, shape.channels_per_unit(module))
    without_effect = ~scores.reshape(by_unit).any(axis=1)
    if module == "attention":
        with np.errstate(over="ignore"):
            scores = scores**exponent
    if not np.isfinite(scores).all():
        raise UsageError(f"--attention-exponent {exponent}: scores become larger than any number; give a smaller one")
    if not adaptive:
        return scores.reshape(by_unit).sum(axis=1)
    # Standardised, a unit without effect would be average in a layer where all are (as merged models have them).
    return np.where(without_effect, -np.inf, standardise(scores).reshape(by_unit).mean(axis=1))
