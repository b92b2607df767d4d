"""The pictures of a run, drawn by matplotlib. No torch."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from flapcli.architecture.flap_section import Healed
from flapcli.architecture.shape import Module
from flapcli.artifacts.eval_report import EvalReport
from flapcli.artifacts.plan import Plan, load_plan
from flapcli.artifacts.reuse import refuse_other
from flapcli.artifacts.run_dir import RunDir
from flapcli.artifacts.stats import Stats
from flapcli.artifacts.sweep_results import Sweep
from flapcli.errors import FlapError, UsageError
from flapcli.evaluation.task_names import main_metric
from flapcli.planning.scores import METRICS, UNIT_METRICS, standardise, unit_scores
from flapcli.storage.atomic import atomic_file
from flapcli.views.eval_rows import gains, sweep_words
from flapcli.views.svg import DENSE, GONE, KEPT, LIMIT, REMOVED, STYLE, TIP, svg

COLOURS = [KEPT, LIMIT, "#6a8d3a", "#8a5aa3"]  # of a sweep's texts
CELLS = 64  # units a layer that are drawn one by one, where no module has more; else all are drawn as counts
UNITS = {"kv_group": "KV group", "query_head": "query head"}  # in words, where they are not
TITLES = {"attention": "Attention", "mlp": "MLP", "shared_expert": "Shared expert", "experts": "Experts"}


def kept_picture(plan: Plan, titled: bool = False) -> Figure:
    """Layers from top to bottom, the modules side by side: which units stay, or how many; a pointer shows the layer's.

    `titled`: it says of which model and at which ratio.
    """
    figure = Figure(figsize=(4.8, max(2.2, 0.9 + 0.13 * len(plan.layers))))
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(plan.present), sharey=True, squeeze=False)[0]
    sizes = {module: [layer.module(module).of for layer in plan.layers] for module in plan.present}
    few = max(map(max, sizes.values())) <= CELLS
    for axes, module in zip(panels, plan.present, strict=True):
        (_cells if few else _counts)(axes, plan, module, max(sizes[module]))
        kept, of = sum(plan.counts(module)), sum(sizes[module])
        unit = UNITS.get(plan.layers[0].module(module).unit, plan.layers[0].module(module).unit)
        axes.set_title(f"{TITLES[module]}: {kept / of:.0%} kept" if of else module)
        axes.set_xlabel(unit if few else f"{unit}s kept")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("layer")
    panels[0].set_ylim(len(plan.layers) - 0.5, -0.5)
    if titled:
        figure.suptitle(f"{Path(plan.model.name).name}, {plan.ratio.achieved:.1%} of its prunable weights removed")
    return figure


def _tips(plan: Plan, module: Module) -> list[str]:
    """What a pointer shows of each layer's module."""
    found = []
    for layer in plan.layers:
        part = layer.module(module)
        unit, which = UNITS.get(part.unit, part.unit), part.keep or "none"
        which = f" ({which})" if part.of <= CELLS else ""
        count = plan.counts(module)[layer.index]
        found.append(f"{TIP}layer {layer.index}: {count:,} of {part.of:,} {unit}s kept{which}")
    return found


def _cells(axes: Axes, plan: Plan, module: Module, width: int) -> None:
    """One cell a unit; where a layer has fewer units than others the rest stays white."""
    grid = np.full((len(plan.layers), width), np.nan)
    for index, layer in enumerate(plan.layers):
        grid[index, : layer.module(module).of] = 0
        grid[index, plan.kept(index, module)] = 1
    tips = _tips(plan, module)
    for value, colour in ((0, GONE), (1, KEPT)):
        rows, columns = np.nonzero(grid == value)
        bars = axes.barh(rows, 0.86, left=columns - 0.43, height=0.8, color=colour)
        for bar, row in zip(bars, rows, strict=True):
            bar.set_gid(tips[row])
    axes.set_xlim(-0.6, width - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _counts(axes: Axes, plan: Plan, module: Module, width: int) -> None:
    """How many units a layer keeps, over how many there were."""
    counts, rows = plan.counts(module), range(len(plan.layers))
    for sizes, colour in (([layer.module(module).of for layer in plan.layers], GONE), (counts, KEPT)):
        for bar, tip in zip(axes.barh(rows, sizes, height=0.8, color=colour), _tips(plan, module), strict=True):
            bar.set_gid(tip)
    axes.set_xlim(0, width)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))


def score_picture(stats: Stats, plan: Plan) -> Figure | None:
    """Histograms of all units' scores, kept over removed, standardised within each layer; None for unknown metrics."""
    if plan.metric not in METRICS | UNIT_METRICS:
        return None
    exponent = float(plan.settings.get("attention_exponent") or 1)
    adaptive = plan.structure.startswith("AL") and plan.metric in METRICS
    scores = unit_scores(stats, plan.metric, exponent, adaptive)
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
    modules = [module for module in plan.present if (0, module) in scores]
    for axes, module in zip(figure.subplots(1, len(modules), squeeze=False)[0], modules, strict=True):
        kept, gone = [], []
        for layer in range(len(plan.layers)):
            values = scores[layer, module] if adaptive else standardise(scores[layer, module])
            kept.append(values[plan.kept(layer, module)])
            gone.append(np.delete(values, plan.kept(layer, module)))
        _histogram(axes, np.concatenate(kept), np.concatenate(gone))
        axes.set_title(TITLES[module])
    figure.supxlabel(f"{plan.metric} of a unit, standardised in its layer", fontsize=9.5)
    figure.axes[0].set_ylabel("units")
    figure.axes[-1].legend(loc="upper right")
    return figure


def _histogram(axes: Axes, kept: np.ndarray, gone: np.ndarray) -> None:
    """Stacked, the highest percent of scores gathered in the last bar, counts on a log scale where they need it."""
    kept, gone = (part[np.isfinite(part)] for part in (kept, gone))  # units without effect score -infinity
    values = np.concatenate([kept, gone])
    if not len(values):
        return
    low, high = values.min(), np.quantile(values, 0.99)
    bins = np.linspace(low, high if high > low else low + 1, 31)
    clipped = [np.clip(part, bins[0], bins[-1]) for part in (gone, kept)]
    axes.hist(clipped, bins=bins.tolist(), stacked=True, color=[REMOVED, KEPT], label=["removed", "kept"])
    if np.histogram(values, bins)[0].max() > 200:
        axes.set_yscale("symlog", linthresh=10)


def task_picture(report: EvalReport) -> Figure | None:
    """Every task's main metric with its standard error, dense beside pruned; None without such tasks."""
    named = [(task, metric) for task, values in report.tasks.items() if (metric := main_metric(task, values))]
    if not named:
        return None
    models = [("dense", report.baseline, DENSE)] if report.baseline else []
    models.append(("pruned", report, KEPT))
    figure = Figure(figsize=(4.8, 0.9 + 0.42 * len(named)), layout="constrained")
    axes = figure.subplots()
    for place, (label, measured, colour) in enumerate(models):
        heights = [measured.tasks.get(task, {}).get(metric, 0.0) for task, metric in named]
        errors = [measured.tasks.get(task, {}).get(f"{metric}_stderr", 0.0) for task, metric in named]
        rows = np.arange(len(named)) + 0.38 * (place - (len(models) - 1) / 2)
        axes.barh(rows, heights, 0.36, xerr=errors, color=colour, label=label, error_kw={"elinewidth": 0.8})
    axes.set_yticks(range(len(named)), [f"{task} ({metric})" for task, metric in named])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answers, or another score")
    figure.legend(loc="outside lower right", ncols=2)
    return figure


def speed_picture(report: EvalReport) -> Figure | None:
    """The pruned model's gain in every case, its spread, and a mark for what the removed computation would allow."""
    found = gains(report)
    if not found:
        return None
    names, spreads, possible = zip(*found, strict=True)
    figure = Figure(figsize=(4.8, 0.9 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    middle = np.array([spread.median for spread in spreads])
    ends = np.abs(np.array([[spread.low for spread in spreads], [spread.high for spread in spreads]]) - middle)
    axes.barh(rows, middle, 0.6, xerr=ends, color=KEPT, error_kw={"elinewidth": 0.8}, label="measured")
    axes.scatter(possible, rows, marker="|", s=160, linewidths=2, color=LIMIT, label="removed computation", zorder=3)
    axes.axvline(1, color=DENSE, linewidth=1, linestyle="--", label="dense")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlabel("times the dense speed")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def healing_picture(healed: Healed) -> Figure:
    """Losses over tokens: of what was trained on, and on held-out windows, with the point that was kept."""
    figure = Figure(figsize=(4.8, 2.5), layout="constrained")
    axes = figure.subplots()
    trained = [(point.tokens, point.training) for point in healed.curve if point.training is not None]
    axes.plot(*zip(*trained, strict=True), "-o", color=DENSE, markersize=3, label="training")
    read = {point.tokens: point.validation for point in healed.curve}
    axes.plot(list(read), list(read.values()), "-o", color=KEPT, markersize=3, label="held out")
    axes.plot([healed.best], [read[healed.best]], "o", color=LIMIT, label="kept")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"loss ({healed.settings['loss']})")
    axes.legend()
    return figure


def save_picture(source: Path, target: Path) -> None:
    """Draw what the plan at `source` (a run folder, a pruned folder or a plan) keeps into a .png or .svg file.

    Raises UsageError for another suffix, FlapError where there is no plan.
    """
    kind = target.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg"):
        raise UsageError(f"--plot {target}: give a file that ends in .png or .svg")
    found = [source] if source.is_file() else [RunDir(source).plan, RunDir(source).pruned / "plan.yaml"]
    existing = next((path for path in found if path.suffix in (".yaml", ".yml") and path.exists()), None)
    if existing is None:
        raise FlapError(f"{source} holds no plan to draw: run `flap plan` first")
    refuse_other(target, (b"\x89png",) if kind == "png" else (b"<?xml", b"<svg"), f".{kind} picture")
    undated = {"Date": None} if kind == "svg" else None  # so that equal plans give equal files
    with rc_context(STYLE), atomic_file(target) as scratch:
        kept_picture(load_plan(existing), titled=True).savefig(scratch, format=kind, dpi=160, metadata=undated)


def sweep_picture(sweep: Sweep) -> Figure:
    """One line a text from the smallest model to the dense one, which is hollow; perplexity is logarithmic.

    Ratios stand above the picture, where no line is, and further apart than two of them are wide.
    """
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, text, rows) in enumerate(sweep.series):
        points = [(row.parameters, row.perplexity[text]) for row in rows]
        colour = COLOURS[place % len(COLOURS)]
        whole = [(sweep.dense.parameters, sweep.dense.perplexity[text])] if sweep.dense else []
        axes.plot(*zip(*(whole + points), strict=True), "-o", color=colour, label=name, zorder=2)
        if whole:
            axes.plot(*zip(*whole, strict=True), "o", color=colour, markerfacecolor="white", markersize=8, zorder=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:,.4g} M")
    axes.set_xlabel("parameters")
    axes.set_ylabel("perplexity")
    named = {row.parameters: f"{row.ratio:g}" for row in sweep.rows}
    above = axes.secondary_xaxis("top")
    places = _apart((named | {sweep.dense.parameters: "dense"}) if sweep.dense else named)
    above.set_xticks(list(places), list(places.values()))
    above.set_xlabel("ratio")
    above.spines["top"].set_visible(False)
    axes.legend()
    return figure


def _apart(labels: dict[int, str]) -> dict[int, str]:
    """The labels of an axis, from the largest place on, without those that would meet the one before."""
    room, found = (max(labels) - min(labels)) / 11, dict[int, str]()
    for place in sorted(labels, reverse=True):
        if not found or min(found) - place >= room:
            found[place] = labels[place]
    return found


def save_sweep_picture(sweep: Sweep, target: Path) -> None:
    """Write the picture as an SVG file. Raises FlapError where the file system refuses."""
    with atomic_file(target) as scratch:
        scratch.write_text(svg(sweep_picture, sweep, alt=sweep_words(sweep), on_page=False) or "", encoding="utf-8")
