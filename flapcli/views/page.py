"""One self-contained HTML page of a run: no network, no script. No torch."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from flapcli import __version__
from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.eval_report import EvalReport, load_report
from flapcli.artifacts.plan import Plan, load_plan
from flapcli.artifacts.pruned_folder import PrunedFolder, found_pruned
from flapcli.artifacts.reuse import refuse_other
from flapcli.artifacts.run_dir import RunDir
from flapcli.artifacts.stats import Stats, load_stats
from flapcli.errors import FlapError
from flapcli.storage.atomic import atomic_file
from flapcli.storage.hashing import sha256
from flapcli.views import plots
from flapcli.views.commands import APPLY, apply_command, calibrate_command, eval_command, heal_command, plan_command
from flapcli.views.compare import compare
from flapcli.views.eval_rows import cost_rows, models_of, quality_rows, speed_lines


def write_page(run_dir: Path, out: Path, others: list[Path]) -> None:
    """Write the page of a run folder to `out`, `others` compared with it.

    Raises FlapError where the folder holds neither plan nor evaluation, or an artifact is broken.
    """
    refuse_other(out, (b"<!doctype html",), "page of flap's")
    run = RunDir(run_dir)
    stats = load_stats(run.stats) if run.stats.exists() else None
    plan = load_plan(run.plan) if run.plan.exists() else None
    report = load_report(run.eval) if run.eval.exists() else None
    if not (plan or report):
        raise FlapError(f"{run_dir} holds neither plan.yaml nor eval.json: `flap run` makes them")
    pruned = found_pruned(run.pruned)
    made_by = pruned.flap.made_by.model_dump() if pruned else None
    healed = _healed(run, pruned)
    belong = bool(plan and stats and sha256(run.stats) == plan.stats.sha256)
    name = plan.model.name if plan else report.checkpoint if report else ""
    place = str(run_dir)
    measured = str(run.healed) if healed and report and Path(report.checkpoint).name == run.healed.name else None
    commands = [
        calibrate_command(stats.header, place) if stats else None,
        plan_command(plan, place) if plan else None,
        apply_command(made_by, place) if made_by else None,
        heal_command(healed, place) if healed else None,
        eval_command(report.settings, place, measured) if report else None,
    ]
    environment = Environment(loader=PackageLoader("flapcli.views", "."), autoescape=True, trim_blocks=True)
    environment.globals |= {f.__name__: f for f in (models_of, quality_rows, cost_rows, number)}
    html = environment.get_template("page.html").render(
        title=Path(name).name,
        name=name,
        version=__version__,
        warnings=_mismatches(run, plan, bool(stats) and not belong, made_by, report),
        tiles=_tiles(plan, report),
        plan=plan,
        layers=list(zip(plan.layers, *map(plan.counts, plan.present), strict=True)) if plan else [],
        titles=plots.TITLES,
        kept=plots.svg(plots.kept_picture, plan),
        scores=plots.svg(plots.score_picture, stats, plan) if belong else None,
        healed=healed,
        healing=plots.svg(plots.healing_picture, healed),
        report=report,
        tasks=plots.svg(plots.task_picture, report),
        speed=plots.svg(plots.speed_picture, report),
        speed_lines=speed_lines(report) if report else [],
        comparison=compare([run_dir, *others]) if others else None,
        settings=_settings(stats, plan, made_by, healed, report),
        commands=commands,
    )
    with atomic_file(out) as scratch:
        scratch.write_text(html, encoding="utf-8")


def _healed(run: RunDir, pruned: PrunedFolder | None) -> Healed | None:
    """How the run's healed folder was trained, where it comes of the pruned one that is there."""
    found = found_pruned(run.healed)
    same = found and pruned and found.flap.made_by.same_as(pruned.flap.made_by)
    return found.flap.healed if found and same else None


def number(value: Any) -> str:
    """A figure as people read it: thousands set apart, two decimals (four below 1), a dash for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _mismatches(
    run: RunDir, plan: Plan | None, other_stats: bool, made_by: dict[str, Any] | None, report: EvalReport | None
) -> list[str]:
    """Artifacts that do not belong together, so that no reader takes one's figures for another's."""
    found = []
    if plan and other_stats:
        found.append("plan.yaml was made from other statistics than stats.safetensors: run `flap plan` again")
    if plan and made_by and made_by["plan_sha256"] != sha256(run.plan):
        found.append("pruned/ was made by another plan than plan.yaml: run `flap apply` again")
    folders = [folder for folder in (run.pruned, run.healed) if (folder / "config.json").exists()]
    if report and folders:
        from flapcli.checkpoints import open_checkpoint

        if report.settings.get("fingerprint") not in [open_checkpoint(str(folder)).fingerprint for folder in folders]:
            names = " and ".join(f"{folder.name}/" for folder in folders)
            found.append(f"eval.json is of another checkpoint than {names}: run `flap eval` again")
    return found


def _tiles(plan: Plan | None, report: EvalReport | None) -> list[tuple[str, str, str]]:
    """Heading, figure and what it was before, for the top of the page."""
    tiles = []
    if plan:
        tiles.append(("prunable weights removed", f"{plan.ratio.achieved:.2%}", f"asked {plan.ratio.requested:.2%}"))
    if report:
        dense = report.baseline
        tiles.append(("parameters", f"{report.size.parameters:,}", f"dense {dense.size.parameters:,}" if dense else ""))
        for text, value in report.perplexity.items():
            before = f"dense {dense.perplexity[text]:.2f}" if dense and text in dense.perplexity else ""
            tiles.append((f"perplexity {Path(text).name}", f"{value:.2f}", before))
        if len(report.averaged_tasks) > 1:
            before = f"dense {dense.task_average:.4f}" if dense and dense.task_average is not None else ""
            tiles.append((f"average of {len(report.averaged_tasks)} tasks", number(report.task_average), before))
        if report.speedup:
            gain = report.speedup[0]
            tiles.append(("decode speed", f"{gain.decode.median:.2f}x", f"possible {gain.decode_possible:.2f}x"))
    return tiles


def _settings(
    stats: Stats | None,
    plan: Plan | None,
    made_by: dict[str, Any] | None,
    healed: Healed | None,
    report: EvalReport | None,
) -> dict[str, dict[str, str]]:
    """What was asked of every stage, and versions; long fingerprints cut short."""
    found: dict[str, dict[str, Any]] = {}
    if stats:
        found["calibrate"] = stats.header.calibration.model_dump()
    if plan:
        found["plan"] = {"method": plan.method, "metric": plan.metric, "structure": plan.structure} | plan.settings
    if made_by:
        found["apply"] = {key: made_by[key] for key in ("version", *APPLY, "plan_sha256", "stats_sha256")}
    if healed:
        found["heal"] = healed.settings
    if report:
        found["eval"] = report.settings
    found["versions"] = (stats.header.versions if stats else {}) | (report.versions if report else {})
    return {stage: {key: _brief(value) for key, value in values.items()} for stage, values in found.items()}


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_brief, value)) or "none"
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
