"""One self-contained HTML page of a run: no network, no script. No torch."""

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader

from flapcli import __version__
from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.eval_report import EvalReport, load_report
from flapcli.artifacts.plan import Plan, load_plan
from flapcli.artifacts.pruned_folder import PrunedFolder, found_pruned
from flapcli.artifacts.reuse import refuse_other
from flapcli.artifacts.run_dir import RunDir
from flapcli.artifacts.stats import load_stats
from flapcli.artifacts.sweep_results import load_sweep
from flapcli.errors import FlapError
from flapcli.storage.atomic import atomic_file
from flapcli.storage.hashing import sha256
from flapcli.views import plots
from flapcli.views.commands import Preset, made_anew, sweep_anew
from flapcli.views.compare import compare
from flapcli.views.eval_rows import (
    cost_rows,
    models_of,
    quality_rows,
    recommendation,
    speed_lines,
    sweep_rows,
    sweep_words,
)
from flapcli.views.page_settings import settings_in_words
from flapcli.views.svg import svg


def write_page(run_dir: Path, out: Path, others: list[Path], best: Preset) -> None:
    """Write the page of a run folder to `out`, `others` compared with it; `best` is what --preset best stands for.

    Raises FlapError where the folder holds neither plan nor evaluation nor sweep, or an artifact is broken.
    """
    refuse_other(out, (b"<!doctype html",), "page of flap's")
    run = RunDir(run_dir)
    stats = load_stats(run.stats) if run.stats.exists() else None
    plan = load_plan(run.plan) if run.plan.exists() else None
    report = load_report(run.eval) if run.eval.exists() else None
    sweep = load_sweep(run.sweep) if run.sweep.exists() else None
    if not (plan or report or sweep):
        raise FlapError(f"{run_dir} holds neither plan.yaml nor eval.json nor sweep.json: `flap run` makes them")
    pruned = found_pruned(run.pruned)
    made_by = pruned.flap.made_by.model_dump() if pruned else None
    healed = _healed(run, pruned)
    measured = str(run.healed) if healed and report and Path(report.checkpoint).name == run.healed.name else None
    header, asked = (stats.header if stats else None), (report.settings if report else None)
    belong = bool(plan and stats and sha256(run.stats) == plan.stats.sha256)
    named = (plan and plan.model.name) or (sweep and sweep.model) or (report and report.checkpoint) or ""
    environment = Environment(loader=PackageLoader("flapcli.views", "."), autoescape=True, trim_blocks=True)
    environment.globals |= {f.__name__: f for f in (models_of, quality_rows, cost_rows, number, sweep_rows)}
    html = environment.get_template("page.html").render(
        title=Path(named).name,
        name=named,
        version=__version__,
        warnings=_mismatches(run, plan, bool(stats) and not belong, made_by, report),
        tiles=_tiles(plan, report),
        plan=plan,
        layers=list(zip(plan.layers, *map(plan.counts, plan.present), strict=True)) if plan else [],
        titles=plots.TITLES,
        kept=svg(plots.kept_picture, plan, alt="Which units of each layer stay; the table below has the counts."),
        scores=svg(plots.score_picture, stats, plan, alt="Histograms of the units' scores, kept over removed.")
        if belong
        else None,
        healed=healed,
        healing=svg(plots.healing_picture, healed, alt="Losses over tokens, trained on and held out; words say it."),
        report=report,
        tasks=svg(plots.task_picture, report, alt="Scores of every task, dense beside pruned, as in the table above."),
        speed=svg(plots.speed_picture, report, alt="Gain in speed over the dense model; the lines below say it."),
        speed_lines=speed_lines(report) if report else [],
        sweep=sweep,
        curve=svg(plots.sweep_picture, sweep, alt=sweep_words(sweep)) if sweep else None,
        recommendation=recommendation(sweep) if sweep else "",
        comparison=compare([run_dir, *others]) if others else None,
        settings=settings_in_words(header, plan, made_by, report, healed),
        commands=[
            *(made_anew(header, plan, made_by, asked, str(run_dir), best, healed, measured) if plan or report else ()),
            *(sweep_anew(header, sweep, str(run_dir), best) if sweep else ()),
        ],
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


class Tile(NamedTuple):
    """A figure for the top of the page, what it is of, what it was before, and by how much it changed."""

    heading: str
    figure: str
    before: str = ""
    delta: str = ""


def _tiles(plan: Plan | None, report: EvalReport | None) -> list[Tile]:
    tiles = []
    if plan:
        asked = f"asked {plan.ratio.requested:.2%}"
        tiles.append(Tile("prunable weights removed", f"{plan.ratio.achieved:.2%}", asked))
    if not report:
        return tiles
    dense, size = report.baseline, report.size.parameters
    tiles.append(
        Tile("parameters", f"{size:,}", f"dense {dense.size.parameters:,}", f"{size / dense.size.parameters - 1:+.1%}")
        if dense
        else Tile("parameters", f"{size:,}")
    )
    for text, value in report.perplexity.items():
        was = dense.perplexity.get(text) if dense else None
        before, delta = (f"dense {was:.2f}", f"{value / was - 1:+.1%}") if was else ("", "")
        tiles.append(Tile(f"perplexity {Path(text).name}", f"{value:.2f}", before, delta))
    if len(report.averaged_tasks) > 1 and report.task_average is not None:
        mean, was = report.task_average, dense.task_average if dense else None
        before, delta = (f"dense {was:.4f}", f"{mean - was:+.4f}") if was is not None else ("", "")
        tiles.append(Tile(f"average of {len(report.averaged_tasks)} tasks", number(mean), before, delta))
    if report.speedup:
        gain = report.speedup[0]
        tiles.append(Tile("decode speed", f"{gain.decode.median:.2f}x", f"possible {gain.decode_possible:.2f}x"))
    return tiles
