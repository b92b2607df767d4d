"""Single query heads as units where several groups share keys and values: each group loses equally many.

Runtimes take the heads of a group by their number, so one of every group goes at once: the lowest of each, then the
next. For allocation such a slice through the groups is the unit. No torch.
"""

import numpy as np

from flapcli.architecture.shape import MODULES, LayerShape, ModelShape
from flapcli.planning.allocation import Kept, Request, allocate
from flapcli.planning.scores import UnitScores


def allocate_evenly(shape: ModelShape, scores: UnitScores, request: Request) -> Kept:
    """As `allocate`, and where query heads share keys and values the same number of each group's stay."""
    groups = max(layer.num_key_value_heads for layer in shape.layers)
    if shape.attention_unit != "query_head" or groups < 2:
        return allocate(shape, scores, request)
    ranked = {
        key: np.argsort(values.reshape(groups, -1), axis=1, kind="stable")  # of each group, lowest first
        for key, values in scores.items()
        if key[1] == "attention" and len(values)
    }
    in_slices = dict(scores)
    for key, order in ranked.items():
        in_slices[key] = np.take_along_axis(scores[key].reshape(groups, -1), order, axis=1).mean(axis=0)
    kept = allocate(_of_slices(shape, groups), in_slices, request)
    for key, order in ranked.items():
        per_group = order.shape[1]
        heads = order[:, kept[key]] + per_group * np.arange(groups)[:, None]
        kept[key] = np.sort(heads.ravel())
    return kept


def _of_slices(shape: ModelShape, groups: int) -> ModelShape:
    """The model as if a slice were a group, with the weights that a slice has."""
    layers = tuple(LayerShape(heads, heads // groups, neurons) for heads, _, neurons in shape.layers)
    weights = {module: shape.unit_parameters(module) for module in MODULES}
    weights["attention"] *= groups
    return shape.model_copy(update={"attention_unit": None, "layers": layers, "unit_weights": weights})
