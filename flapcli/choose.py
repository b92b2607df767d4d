"""Stage 2: from statistics to a plan. Needs no weights, no model, no torch."""

from dataclasses import asdict, replace
from math import isfinite
from typing import Any

from flapcli.allocate import Kept, Request, allocate
from flapcli.depth import check_depth, drop_layers
from flapcli.errors import UsageError
from flapcli.plan import Plan, StatsRef, build_plan
from flapcli.scores import UNIT_METRICS, unit_scores
from flapcli.stats import Stats
from flapcli.target import Target, find_ratio

# Baselines fix metric and structure (METHOD.md, Baselines); a metric of None leaves the choice to the user.
METHODS: dict[str, tuple[str | None, str | None]] = {
    "flap": (None, None),
    "wanda-sp": ("WIFN", "UL-UM"),
    "mag-sp": ("magnitude", "UL-UM"),
    "depth": ("block-influence", "layers"),
}
DEFAULT_METRIC, DEFAULT_STRUCTURE = "WIFV", "AL-AM"


def resolve(method: str, metric: str | None, structure: str | None) -> tuple[str, str]:
    """Metric and structure of a method. Raises UsageError where an option contradicts the method."""
    fixed = METHODS[method]
    for option, given, own in (("--metric", metric, fixed[0]), ("--structure", structure, fixed[1])):
        if own is not None and given not in (None, own):
            raise UsageError(f"{option} {given}: --method {method} is defined with {own}; leave {option} out")
    return fixed[0] or metric or DEFAULT_METRIC, fixed[1] or structure or DEFAULT_STRUCTURE


def checked(
    method: str, metric: str | None, structure: str | None, request: Request, attention_exponent: float | None
) -> tuple[str, Request]:
    """The metric, and the request with its structure, once all options go together; `resolve` says of both.

    Raises UsageError where options contradict each other or are out of range, whatever the model.
    """
    metric, structure = resolve(method, metric, structure)
    request = replace(request, structure=structure)
    if method == "depth":
        check_depth(request, attention_exponent)
    _check_exponent(metric, attention_exponent)
    _check(request)
    return metric, request


def _check(request: Request) -> None:
    if not 0 <= request.ratio < 1:
        raise UsageError(f"--ratio {request.ratio}: must be at least 0 and less than 1")
    if request.remove_heads is not None and not request.structure.endswith("-MM"):
        raise UsageError(f"--remove-heads is for structures UL-MM and AL-MM, not {request.structure}")
    if request.remove_heads is None and request.structure.endswith("-MM"):
        raise UsageError(f"--structure {request.structure} needs --remove-heads N (heads, or KV groups under GQA)")


def _check_exponent(metric: str, attention_exponent: float | None) -> None:
    if attention_exponent is not None and not isfinite(attention_exponent):
        raise UsageError(f"--attention-exponent {attention_exponent}: must be a number")
    if metric in UNIT_METRICS and attention_exponent is not None:
        raise UsageError(
            f"--attention-exponent: --metric {metric} scores heads and neurons on one scale, to which no exponent "
            "applies; leave --attention-exponent out"
        )


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
    settings: dict[str, Any] = {}
    if method == "depth":

        def kept_at(ratio: float) -> Kept:
            return drop_layers(stats, ratio)

    else:
        scores = unit_scores(stats, metric, attention_exponent, adaptive=request.structure.startswith("AL"))
        exponent = None if metric in UNIT_METRICS else attention_exponent
        settings = asdict(request) | {"attention_exponent": exponent}
        del settings["structure"], settings["ratio"]

        def kept_at(ratio: float) -> Kept:
            return allocate(stats.model, scores, replace(request, ratio=ratio))

    if target:
        request = replace(request, ratio=find_ratio(target, stats.model, kept_at))
        settings |= target.settings
    kept = kept_at(request.ratio)
    return build_plan(
        stats.model, reference, kept, request.ratio,
        method=method, metric=metric, structure=request.structure, settings=settings,
    )  # fmt: skip
