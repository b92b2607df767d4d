"""`flap plan`: which units stay, or the plan that is there already, edits included."""

from pathlib import Path
from typing import Any

from flapcli.allocate import Request
from flapcli.choose import checked, choose
from flapcli.errors import FlapError
from flapcli.plan import FORMAT as PLAN_FORMAT
from flapcli.plan import Plan, StatsRef, load_plan, save_plan
from flapcli.rundir import sha256
from flapcli.stats import load_stats
from flapcli.target import Target


def run_plan(
    out: Path,
    stats_path: Path,
    method: str,
    metric: str | None,
    request: Request,
    structure: str | None,
    attention_exponent: float | None,
    force: bool,
    target: Target | None = None,
) -> tuple[Plan, bool]:
    """Stage 2: the plan of `stats_path` in `out`; a `target` decides the ratio in the request's place."""
    metric, request = checked(method, metric, structure, request, attention_exponent)
    exponent = attention_exponent or (2.0 if method == "flap" else 1.0)
    stats = load_stats(stats_path)
    reference = StatsRef(path=_relative(stats_path, out.parent), sha256=sha256(stats_path))
    made = choose(stats, reference, method, metric, request, exponent, target)
    found = _existing_plan(out, force)
    if found and not force and _header_of(found) == _header_of(made):
        return found, True
    save_plan(out, made)
    return made, False


def _header_of(plan: Plan) -> dict[str, Any]:
    """What a plan was asked to be, without what it keeps: that may have been edited."""
    header = plan.model_dump(exclude={"layers", "parameters", "ratio"})
    header["stats"].pop("path")
    return header | {"requested": plan.ratio.requested}


def _existing_plan(out: Path, force: bool) -> Plan | None:
    """The plan at `out`; a foreign file is refused, a broken edit only replaced by force."""
    if not out.exists():
        return None
    try:
        return load_plan(out)
    except FlapError as error:
        with out.open(encoding="utf-8", errors="replace") as file:
            ours = file.readline().strip() == f"format: {PLAN_FORMAT}"
        if ours and force:
            return None
        hint = "mend it, or replace it with --force" if ours else "move it away or give another --out"
        raise FlapError(f"{error}; {hint}") from error


def _relative(path: Path, start: Path) -> str:
    path, start = path.resolve(), start.resolve()
    return str(path.relative_to(start)) if path.is_relative_to(start) else str(path)
