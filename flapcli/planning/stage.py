"""Stage 2, `flap plan`: which units stay, or the plan that is there already, edits included. Needs no torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flapcli.architecture.shape import AttentionUnit
from flapcli.artifacts.plan import Plan, StatsRef, found_plan, save_plan
from flapcli.artifacts.run_dir import holding
from flapcli.artifacts.stats import Stats, load_stats
from flapcli.errors import FlapError
from flapcli.execution.settings import PlanOptions
from flapcli.planning.methods import checked, choose
from flapcli.planning.scores import UNIT_METRICS
from flapcli.progress import Progress, Silent
from flapcli.storage.hashing import sha256

SHORT = 0.005  # of the ratio asked for: past it a plan that achieves less says so

__all__ = ["PlanOptions", "plan"]


@holding
def plan(
    stats_path: Path,
    out: Path,
    options: PlanOptions = PlanOptions(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[Plan, bool]:
    """The plan of the statistics at `stats_path` in `out`; and whether it was there.

    Raises UsageError for options that don't go together or a ratio out of reach, FlapError for broken inputs.
    """
    metric, request = checked(options)
    exponent = options.attention_exponent or (2.0 if options.method == "flap" else 1.0)
    stats = _in_units(load_stats(stats_path), options.attention_unit, metric)
    target = options.target and options.target.of(stats.model)
    path, folder = stats_path.resolve(), out.parent.resolve()
    stored = path.relative_to(folder) if path.is_relative_to(folder) else path
    reference = StatsRef(path=str(stored), sha256=sha256(stats_path))
    with progress.task("plan", 1, "plans") as advance:  # a target takes a search of some seconds
        made = choose(stats, reference, options.method, metric, request, exponent, target)
        advance(1)
    if options.attention_unit:
        made = made.model_copy(update={"settings": made.settings | {"attention_unit": options.attention_unit}})
    found = found_plan(out, force)
    if found and not force and _asked_of(found) == _asked_of(made):
        return found, True
    short = made.ratio.requested - made.ratio.achieved
    if short > SHORT and made.structure.startswith("UL"):
        progress.note(
            f"only {made.ratio.achieved:.2%} of the prunable weights go, where {made.ratio.requested:.2%} is asked: "
            f"structure {made.structure} cuts whole units in every layer and rounds down"
        )
    save_plan(out, made)
    return made, False


def _in_units(stats: Stats, unit: AttentionUnit | None, metric: str) -> Stats:
    """The statistics with the units that are asked for. Raises FlapError where they hold something of other ones."""
    if unit is None:
        return stats
    model = stats.model.with_attention_unit(unit)
    if model.attention_unit != stats.model.attention_unit and metric in UNIT_METRICS:
        raise FlapError(
            f"{stats.path} has its Fisher information of other units: run `flap calibrate --attention-unit {unit}` "
            f"with what --metric {metric} needs"
        )
    return replace(stats, header=stats.header.model_copy(update={"model": model}))


def _asked_of(plan: Plan) -> dict[str, Any]:
    """What a plan was asked to be, without what it keeps: that may have been edited."""
    asked = plan.model_dump(exclude={"layers", "parameters", "ratio"})
    asked["stats"].pop("path")
    return asked | {"requested": plan.ratio.requested}
