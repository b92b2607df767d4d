"""Importance of channels and units; arrays are float64.

Metrics of channels are as METHOD.md writes them (An et al., AAAI 2024) and make unit scores by the structures'
rules; metrics of units are unit scores by themselves.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from flapcli.errors import FlapError
from flapcli.shape import ModelShape, Module
from flapcli.stats import ModuleStats, Stats

ELIMINATION_WEIGHT = 2.0  # of a head's elimination beside a neuron's Fisher information

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


def fisher(stats: Stats) -> UnitScores:
    """S_u = F_u / parameters_u, F_u = mean_t (sum_j x_tj dL/dx_tj)^2 over the unit's channels j (fisher.py).

    Kwon et al. 2022 (arXiv 2204.09656), whose masks the empirical Fisher information of their gates chooses. F_u
    is in units of loss, the same over layers and modules, so nothing is standardised; per parameter, the lowest
    that go until a share of the weights is gone are the greedy knapsack. A module's units are all of one size, so
    that structures which take heads and neurons apart see the order of F_u itself.
    Raises FlapError where calibration did not keep Fisher information.
    """
    if stats.fisher is None:
        raise FlapError(
            f"{stats.path} has no Fisher information, which --metric FISHER needs: run `flap calibrate --fisher`"
        )
    return _per_parameter(stats, stats.fisher)


def fisher_obs(stats: Stats) -> UnitScores:
    """S_u = 2 E_u / parameters_u in attention, F_u / parameters_u in the MLP.

    E_u is the loss that a head or KV group goes at with the others standing in for it: Optimal Brain Surgeon
    (Hassibi and Stork 1993) within a projection, on FISHER's scale (elimination.py). Neurons go by FISHER itself, so
    that their elimination, which takes time with the cube of their number, is spared. The weight is measured
    (README): what stands in for a head does so less well on other text than on the calibration text.
    Raises FlapError where calibration did not keep both Gram matrices and Fisher information.
    """
    if stats.fisher is None or stats.elimination is None:
        raise FlapError(
            f"{stats.path} has no elimination, which --metric FISHER-OBS needs: run `flap calibrate --gram --fisher`"
        )
    heads = {key: ELIMINATION_WEIGHT * values for key, values in stats.elimination.items()}
    return _per_parameter(stats, {**stats.fisher, **heads})


def _per_parameter(stats: Stats, losses: Mapping[tuple[int, Module], NDArray[np.floating]]) -> UnitScores:
    return {
        (layer, module): values.astype(np.float64) / stats.model.unit_parameters(module)
        for (layer, module), values in losses.items()
    }


UNIT_METRICS: dict[str, Callable[[Stats], UnitScores]] = {"FISHER": fisher, "FISHER-OBS": fisher_obs}


def standardise(scores: Scores) -> Scores:
    """z = (S - mean) / std over one layer's channels, std unbiased as in the authors' code; 0 where std is 0."""
    if len(scores) < 2 or (std := scores.std(ddof=1)) == 0:
        return np.zeros_like(scores)
    return (scores - scores.mean()) / std


def unit_scores(stats: Stats, metric: str, exponent: float, adaptive: bool) -> UnitScores:
    """One score per unit of every module.

    Channels of attention are raised to `exponent` first (2 in the authors' code). A head's or KV group's
    score is the sum over its channels, or where `adaptive`, the mean of their standardised scores
    (METHOD.md, Structures). Neither holds for a metric of units, which is taken as it is.
    """
    if metric in UNIT_METRICS:
        return UNIT_METRICS[metric](stats)
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
