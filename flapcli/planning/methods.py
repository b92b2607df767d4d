"""Stage 2: from statistics to a plan. Needs no weights, no model, no torch."""

from collections.abc import Callable
from dataclasses import asdict, replace
from math import isfinite

import numpy as np

from flapcli.architecture.shape import MODULES
from flapcli.artifacts.plan import Plan, StatsRef, build_plan
from flapcli.artifacts.stats import Stats
from flapcli.artifacts.target import Target
from flapcli.errors import UsageError
from flapcli.execution.settings import PlanOptions
from flapcli.planning.allocation import Kept, Request
from flapcli.planning.depth import check_whole, drop_layers
from flapcli.planning.devices import over_devices
from flapcli.planning.even_groups import allocate_evenly
from flapcli.planning.scores import ELIMINATION_WEIGHT, UNIT_METRICS, unit_scores
from flapcli.planning.target_search import find_ratio
from flapcli.planning.whole_experts import drop_experts

# Baselines fix metric and structure (METHOD.md, Baselines); a metric of None leaves the choice to the user.
METHODS: dict[str, tuple[str | None, str | None]] = {
    "flap": (None, None),
    "wanda-sp": ("WIFN", "UL-UM"),
    "mag-sp": ("magnitude", "UL-UM"),
    "depth": ("block-influence", "layers"),
    "experts": ("REAP", "experts"),
}
WHOLE: dict[str, Callable[[Stats, float], Kept]] = {"depth": drop_layers, "experts": drop_experts}
DEFAULT_METRIC, DEFAULT_STRUCTURE = "WIFV", "AL-AM"


def checked(options: PlanOptions) -> tuple[str, Request]:
    """The metric, and what to remove in which structure, once all options go together.

    Raises UsageError where options contradict each other or the method, or are out of range, whatever the model.
    """
    own_metric, own_structure = METHODS[options.method]
    for name, own in (("metric", own_metric), ("structure", own_structure)):
        if own is not None and (given := getattr(options, name)) not in (None, own):
            raise UsageError(f"--{name} {given}: --method {options.method} is defined with {own}; leave --{name} out")
    metric = own_metric or options.metric or DEFAULT_METRIC
    structure = own_structure or options.structure or DEFAULT_STRUCTURE
    ratio, remove_heads, exponent = options.ratio, options.remove_heads, options.attention_exponent
    request = Request(
        structure, ratio, remove_heads, options.round_to, options.heads_multiple_of, options.allow_empty,
        options.tensor_parallel,
    )  # fmt: skip
    if options.method in WHOLE:
        check_whole(options.method, request, exponent)
    if request.tensor_parallel > 1 and request.allow_empty:
        raise UsageError(
            "--allow-empty: by --tensor-parallel every layer keeps heads for each device; leave --allow-empty out"
        )
    if exponent is not None and not isfinite(exponent):
        raise UsageError(f"--attention-exponent {exponent}: must be a number")
    if metric in UNIT_METRICS and exponent is not None:
        raise UsageError(
            f"--attention-exponent: --metric {metric} scores heads and neurons on one scale, to which no exponent "
            "applies; give another --metric, or leave --attention-exponent out"
        )
    if not 0 <= ratio < 1:
        percent = f"; did you mean {ratio / 100:g}?" if 1 < ratio < 100 else ""
        raise UsageError(f"--ratio {ratio:g}: must be at least 0 and less than 1{percent}")
    if remove_heads is not None and not structure.endswith("-MM"):
        raise UsageError(f"--remove-heads is for structures UL-MM and AL-MM, not {structure}")
    if remove_heads is None and structure.endswith("-MM"):
        raise UsageError(f"--structure {structure} needs --remove-heads N (heads, or KV groups under GQA)")
    return metric, request


def needed(metric: str | None, compensate: str | None, gram: bool, fisher: bool) -> tuple[bool, bool]:
    """--gram and --fisher of calibrate: as asked for, and where the metric or the compensation reads them."""
    return gram or compensate == "lstsq" or metric == "FISHER-OBS", fisher or metric in UNIT_METRICS


def choose(
    stats: Stats,
    reference: StatsRef,
    method: str,
    metric: str,
    request: Request,
    attention_exponent: float,
    target: Target | None = None,
) -> Plan:
    """The units that stay under a method, as a plan; a `target` decides the ratio in the request's place.

    Raises UsageError where the request can't be reached, FlapError where the statistics lack what the method needs.
    """
    scores, settings = None, {}
    if request.remove_heads is not None and (stats.model.prunable != MODULES):
        raise UsageError(
            f"--structure {request.structure} is for models of heads and MLP neurons; of {stats.model.name} "
            f"{', '.join(stats.model.prunable)} can be pruned: take UL-UM or AL-AM"
        )
    if method not in WHOLE:
        request = over_devices(stats.model, request)
        scores = unit_scores(stats, metric, attention_exponent, adaptive=request.structure.startswith("AL"))
        settings = asdict(request) | {"attention_exponent": None if metric in UNIT_METRICS else attention_exponent}
        del settings["structure"], settings["ratio"]
        if request.tensor_parallel == 1:  # as in plans of older versions
            del settings["tensor_parallel"]
        if metric == "FISHER-OBS":  # older versions' plans, by another weight, are not up to date
            settings["elimination_weight"] = ELIMINATION_WEIGHT

    def kept_at(ratio: float) -> Kept:
        if scores is None:
            return WHOLE[method](stats, ratio)
        chosen = allocate_evenly(stats.model, scores, replace(request, ratio=ratio))
        return {
            (i, m): chosen[i, m] if (i, m) in chosen else np.arange(stats.model.units(i, m))
            for i in range(stats.model.num_layers)
            for m in stats.model.modules
        }

    ratio = find_ratio(target, stats.model, kept_at) if target else request.ratio
    return build_plan(
        stats.model, reference, kept_at(ratio), ratio, method=method, metric=metric, structure=request.structure,
        settings=settings | (target.settings if target else {}),
    )  # fmt: skip
