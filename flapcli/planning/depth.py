"""Depth pruning: whole decoder layers by block influence (METHOD.md, Depth). No torch."""

import numpy as np

from flapcli.artifacts.stats import Stats
from flapcli.errors import FlapError, UnreachableError, UsageError
from flapcli.planning.allocation import Kept, Request

EXACT = 1 - 1e-12  # so that 0.55 of 20 layers is 11 of them, whatever 0.55 * 20 is in floating point


def check_whole(method: str, request: Request, attention_exponent: float | None) -> None:
    """Raise UsageError where an option speaks of units of width, which whole layers do not have."""
    given = {
        "--remove-heads": request.remove_heads is not None,
        "--round-to": request.round_to > 1,
        "--heads-multiple-of": request.heads_multiple_of > 1,
        "--tensor-parallel": request.tensor_parallel > 1,
        "--attention-exponent": attention_exponent is not None,
    }
    if wrong := [option for option, is_given in given.items() if is_given]:
        what = {"depth": "layers"}.get(method, method)
        raise UsageError(f"{wrong[0]}: --method {method} drops whole {what}; leave {wrong[0]} out")


def drop_layers(stats: Stats, ratio: float) -> Kept:
    """Units that stay: none in the layers of lowest block influence, the fewest that reach the ratio, else all.

    Ties go by index. Raises FlapError where calibration kept no block influence, UnreachableError where no layer
    would stay.
    """
    shape = stats.model
    if stats.influences is None:
        raise FlapError(
            f"{stats.path} is of an older flap and lacks block influence, which --method depth needs: "
            "run `flap calibrate --force`"
        )
    weights = [shape.prunable_layer(layer) for layer in range(shape.num_layers)]
    order = np.argsort([influence.layer for influence in stats.influences], kind="stable")
    order = order[np.array(weights)[order] > 0]
    gone = np.cumsum([weights[layer] for layer in order], dtype=np.int64)
    count = int(np.searchsorted(gone, ratio * sum(weights) * EXACT)) + 1 if ratio > 0 else 0
    if count and count >= len(order):
        raise UnreachableError(f"--ratio {ratio}: it takes all {len(order)} layers to reach it, and one must stay")
    dropped = set(order[:count].tolist())
    return {
        (i, m): np.arange(0 if i in dropped else shape.units(i, m))
        for i in range(shape.num_layers)
        for m in shape.modules
    }
