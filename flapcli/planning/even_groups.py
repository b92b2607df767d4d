"""Units that go in slices: query heads of the groups that share keys and values, neurons of a layer's experts.

Runtimes take the heads of a group by their number, and all experts of a layer for one tensor, so one unit of every
group, or expert, goes at once: the lowest of each, then the next. For allocation such a slice is the unit. No torch.
"""

import numpy as np
from numpy.typing import NDArray

from flapcli.architecture.shape import ModelShape, Module
from flapcli.planning.allocation import Kept, Request, allocate
from flapcli.planning.scores import UnitScores


def allocate_evenly(shape: ModelShape, scores: UnitScores, request: Request) -> Kept:
    """As `allocate`, and where units go in slices the same number of each group's, or expert's, stay."""
    ranked = {
        key: np.argsort(values.reshape(count, -1), axis=1, kind="stable")  # of each group, lowest first
        for key, values in scores.items()
        if (count := shape.groups(*key)) > 1 and len(values)
    }
    if not ranked:
        return allocate(shape, scores, request)
    in_slices = dict(scores)
    for key, order in ranked.items():
        in_slices[key] = _means(np.take_along_axis(scores[key].reshape(len(order), -1), order, axis=1))
    kept = allocate(Slices.model_validate(shape.model_dump()), in_slices, request)
    for key, order in ranked.items():
        units = order[:, kept[key]] + order.shape[1] * np.arange(len(order))[:, None]
        kept[key] = np.sort(units.ravel())
    return kept


class Slices(ModelShape):
    """The model as if a slice were a unit."""

    def units(self, layer: int, module: Module) -> int:
        return super().units(layer, module) // self.groups(layer, module)

    def weights_of_unit(self, layer: int, module: Module) -> int:
        return super().weights_of_unit(layer, module) * self.groups(layer, module)


def _means(ranked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each slice, (slices,): units without effect (-inf) stand behind all others of their layer, not before them."""
    finite = ranked[np.isfinite(ranked)]
    lowest = finite.min() if len(finite) else 0.0
    means = np.where(np.isfinite(ranked), ranked, lowest).mean(axis=0)
    return np.where(np.isfinite(ranked).any(axis=0), means, -np.inf)
