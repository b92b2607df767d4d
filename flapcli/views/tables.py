"""How artifacts look in the terminal: a table each."""

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from flapcli.architecture.family import families
from flapcli.architecture.shape import Module
from flapcli.artifacts.eval_report import EvalReport
from flapcli.artifacts.plan import Plan, format_ranges
from flapcli.artifacts.pruned_folder import PrunedFolder
from flapcli.artifacts.self_text import SelfText
from flapcli.artifacts.stats import StatsHeader
from flapcli.artifacts.sweep_results import Sweep
from flapcli.export.stage import ExportedGguf
from flapcli.views.commands import next_commands
from flapcli.views.eval_rows import (
    cost_rows,
    gigabytes,
    megabytes,
    models_of,
    quality_rows,
    recommendation,
    speed_lines,
    story,
    sweep_rows,
)
from flapcli.views.paper_table import table as paper_table
from flapcli.views.terminal import duration, out

if TYPE_CHECKING:
    from flapcli.estimation.estimate import Estimate

BAR = 20  # characters
WIDTH, HEIGHT, MARGIN = 60, 12, 10  # of the plot of a sweep and of its labels, in characters
MARKS, WHOLE = "●◆▲■○◇△□", "D"


def show_stats(header: StatsHeader) -> None:
    model, run = header.model, header.calibration
    table = _pairs("statistics")
    table.add_row("model", f"{model.name} ({model.family}, {model.parameters:,} parameters)")
    table.add_row("layers", f"{model.num_layers} x {model.hidden_size} wide")
    heads = f"{model.num_attention_heads} heads, {model.num_key_value_heads} key/value heads of {model.head_dim}"
    table.add_row("attention", f"{heads}; unit: {model.unit('attention')}")
    table.add_row("MLP", f"{model.intermediate_size} neurons")
    windows = f"{run.nsamples} windows of {run.seqlen}, {run.tokens:,} tokens, seed {run.seed}"
    table.add_row("text", f"{run.dataset}: {windows}")
    if run.begins_with:
        table.add_row("each window", f"begins with {run.begins_with}")
    table.add_row("ran in", run.dtype + (f", {run.mode}" if run.mode else ""))
    asked = header.settings
    beside = [f"Gram matrices ({asked.get('gram_dtype', 'float32')})"] if asked.get("gram") else []
    beside += ["Fisher information"] if asked.get("fisher") else []
    if beside:
        table.add_row("beside moments", ", ".join(beside))
    out.print(table)


def show_selftext(made: SelfText) -> None:
    """What the model wrote, a window a row."""
    title = f"text that {made.model} wrote, seed {made.seed}"
    table = Table(Column("window", justify="right"), f"{made.seqlen} tokens", title=title, title_justify="left")
    for index, window in enumerate(made.windows):
        table.add_row(str(index), Text(" ".join(window.text.split())))
    out.print(table)


def show_plan(plan: Plan) -> None:
    """A row and two bars per layer, and what it comes to."""
    table = Table(title=f"{plan.method} {plan.metric} {plan.structure} on {plan.model.name}", title_justify="left")
    table.add_column("layer", justify="right")
    bars = out.width >= 10 + len(plan.present) * (BAR + 15)  # else the counts alone
    for module in plan.present:
        unit = plan.layers[0].module(module).unit + "s"
        short = unit.removeprefix("query_")  # bars take what room 80 columns have
        table.add_column(short if bars else f"{module}: {unit}", justify="right", no_wrap=bars)
        if bars:
            table.add_column(f"{module} kept", no_wrap=True)
    for layer, *counts in zip(plan.layers, *map(plan.counts, plan.present), strict=True):
        row = [str(layer.index)]
        for count, of in zip(counts, (layer.module(module).of for module in plan.present), strict=True):
            row += [f"{count}/{of}", *([_bar(count, of)] if bars else [])]
        table.add_row(*row)
    out.print(table)
    p = plan.parameters
    out.print(
        f"{plan.ratio.achieved:.2%} of {p.prunable:,} prunable weights go (asked: {plan.ratio.requested:.2%})\n"
        f"parameters {p.model:,} -> {p.model_after:,}, without the biases that apply may add",
        highlight=False,
    )
    if target := plan.target:
        counted = "biases that compensation adds included" if target.biases else "no added biases counted"
        written = f", written as {target.dtype}" if target.dtype else ""
        out.print(f"target: at most {target.limit:,} {target.unit}{written}, {counted}", highlight=False)
    _say_of_widths(plan.settings.get("round_to"))


def _say_of_widths(round_to: Any) -> None:
    """What multiples of MLP widths are good for, where the user asked for some."""
    if isinstance(round_to, int) and round_to > 1:
        fits = "K-quants and older types" if round_to % 256 == 0 else "older types (K-quants want 256)"
        fits = fits if round_to % 32 == 0 else "none of its types (older ones want 32, K-quants 256)"
        suits = f"which suits llama.cpp's quantisations: {fits}"
        out.print(f"MLP widths are multiples of {round_to}, {suits}", highlight=False)


def show_folder(folder: PrunedFolder) -> None:
    """What a pruned folder is."""
    flap, made_by = folder.flap, folder.flap.made_by
    table = _pairs(f"{'healed' if flap.healed else 'pruned'} checkpoint {folder.path}")
    table.add_row("made from", made_by.model.name)
    how = ", sequential" if made_by.sequential else ""
    masked = ", masked in place" if made_by.mask_only else ""
    table.add_row("compensation", made_by.compensate + how + masked)
    table.add_row("biases added", ", ".join(flap.biases) or "none")
    if flap.source_layers is not None:
        kept = flap.source_layers
        table.add_row("layers", f"{len(kept)} of the dense model's: {format_ranges(kept)}")
    for size in ("num_key_value_heads", "intermediate_size"):
        values = getattr(flap, size)
        table.add_row(size, f"{min(values)} to {max(values)}, {sum(values):,} in all")
    table.add_row("weights", str(folder.config["dtype"]))
    if healed := flap.healed:
        table.add_row("healed", f"{healed.best:,} of {healed.tokens:,} tokens of {healed.dataset}")
        loss = f"{healed.settings['loss']} {healed.before:.4f} -> {healed.after:.4f}"
        table.add_row("loss on held-out windows", loss)
    out.print(table)
    if flap.output_error and not flap.healed:
        _show_output_errors(flap.output_error)
    counts = ", ".join(map(str, folder.tensor_parallel))
    out.print(f"tensor parallel sizes that divide every layer: {counts}", highlight=False)


def _show_output_errors(errors: Mapping[Module, list[tuple[float, float] | None]]) -> None:
    """What least squares gained: share of each projection's output variance lost on the calibration text."""
    title = "output variance lost, with the pruned channels' mean -> least squares"
    table = Table(*_right("layer", *errors), title=title, title_justify="left")
    for layer, pairs in enumerate(zip(*errors.values(), strict=True)):
        table.add_row(str(layer), *(f"{pair[0]:.2%} -> {pair[1]:.2%}" if pair else "-" for pair in pairs))
    out.print(table)


def show_report(report: EvalReport) -> None:
    """The figures of the pruned model, the dense one's beside them, and what the speed comes to."""
    table = Table(
        Column("", overflow="fold"), *_right(*models_of(report)), title=report.checkpoint, title_justify="left"
    )
    for name, cells in quality_rows(report) + cost_rows(report):
        table.add_row(name, *cells)
    out.print(table)
    for line in speed_lines(report):
        out.print(Text(line), soft_wrap=True)
    if report.unfinished:
        out.print(Text(f"unfinished: {report.unfinished}"), soft_wrap=True)
    if report.all_failures:
        out.print(Text(f"tasks that were not run: {', '.join(report.all_failures)}"), soft_wrap=True)


def show_end(plan: Plan, folder: PrunedFolder, run_dir: Path, report: EvalReport | None = None) -> None:
    """The end of a run: what pruning took and cost, where that was measured, and what to do next."""
    healed = str(folder.path) if folder.flap.healed else None
    next_ones = next_commands(str(run_dir), healed, _exports(plan, folder), bool(report))
    for line in (*(story(report, plan) if report else ()), "next:", *(f"  {line}" for line in next_ones)):
        out.print(Text(line), soft_wrap=True)


def _exports(plan: Plan, folder: PrunedFolder) -> bool:
    """Whether llama.cpp may read such sizes and biases, by what the family's forms say of them."""
    even = all(len(set(plan.counts(module))) == 1 for module in plan.present)
    forms = families()[plan.model.family].gguf.forms
    return any((form.per_layer or even) and (form.output_biases or not folder.flap.biases) for form in forms)


def show_estimate(found: "Estimate") -> None:
    """What the stages would take, beside what there is."""
    size = f"{found.parameters:,} parameters, {gigabytes(found.bytes)} of {found.stored_as}"
    table = Table("", "goes", *_right("memory", "disk", "reads", "time"), title=f"{found.model}: {size}",
                  title_justify="left")  # fmt: skip
    for need in found.stages:
        sizes = map(gigabytes, (need.memory, need.disk, need.reads))
        table.add_row(need.stage, need.way, *sizes, duration(need.seconds))
    memory, disk = max(need.memory for need in found.stages), sum(need.disk for need in found.stages)
    took = duration(sum(need.seconds for need in found.stages))
    table.add_section()
    table.add_row("run", "", gigabytes(memory), gigabytes(disk), "", took)
    table.add_row("there is", found.device, gigabytes(found.free_memory), gigabytes(found.free_disk), "", "")
    out.print(table)
    rate = f"{2 * found.multiplies / 1e9:,.0f} GFLOP/s in {found.dtype}"
    out.print(
        f"computed, not measured: by {rate} and {megabytes(round(found.writes))}/s, as this machine did just now; it "
        "may take some times longer where it is busy",
        highlight=False,
    )


def show_export(exported: ExportedGguf) -> None:
    """What an exported file is, and what smaller quantisations of it would meet."""
    table = _pairs(f"exported {exported.path}")
    table.add_row("made from", exported.made_by.model.name)
    table.add_row("weights", exported.made_by.outtype)
    table.add_row("bytes", f"{exported.path.stat().st_size:,}")
    table.add_row("for Ollama", f"ollama create NAME -f {exported.modelfile}")
    for line in exported.advice:
        table.add_row("quantising", line)
    out.print(table)


def show_families(rows: list[dict[str, str]]) -> None:
    """What is supported, a line a family."""
    table = Table("family", "models", "unit of attention", "prunable", "stock if even", "GGUF", "notes")
    for row in rows:
        keys = ("family", "models", "unit", "prunable", "stock_when_even", "gguf", "notes")
        table.add_row(*(row[key] for key in keys))
    out.print(table)
    out.print(
        f"{len(rows)} model types. stock if even: what may go, alike in every layer, from a folder that needs no code "
        "of flap's, biases being added where its configuration knows them. mlp beside experts: of layers without them. "
        "GGUF: llama.cpp's architecture."
    )


def show_trials(found: dict[str, Any]) -> None:
    """What trying a description said."""
    table = _pairs(f"{found['model']}, family {found['family']}")
    table.add_row("tensors", f"all {found['tensors']:,} have their place and their size")
    for trial in found["layers"]:
        said = "sliced equals masked" if trial["agrees"] else "sliced differs from masked"
        table.add_row(f"layer {trial['layer']}", f"{said}: {trial['difference']:.1e} standard deviations")
    out.print(table)


def _pairs(title: str) -> Table:
    columns = (Column(style="bold", overflow="fold"), Column(overflow="fold"))
    return Table(*columns, title=title, title_justify="left", show_header=False)


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right", overflow="fold") for name in names]


def _bar(count: int, of: int) -> str:
    full = round(BAR * count / of) if of else 0
    return "█" * full + "░" * (BAR - full)


def show_sweep(sweep: Sweep) -> None:
    """A row for the dense model and one a ratio: size, perplexities, over the dense model's in brackets; and a plot.

    Of several methods the paper's table, its own figures beside ours where there are some.
    """
    columns, rows = sweep_rows(sweep)
    if sweep.rows[0].method:
        columns, *lines = paper_table(sweep)
        rows = [(name, cells) for name, *cells in lines]
    table = Table(*_right(*columns), title=f"sweep of {sweep.model}", title_justify="left")
    for name, cells in rows:
        table.add_row(name, *cells)
    out.print(table)
    out.print(_plot(sweep))
    out.print(Text(recommendation(sweep)), soft_wrap=True)
    if sweep.unfinished:
        out.print(Text(f"unfinished: {sweep.unfinished}"), soft_wrap=True)


def _plot(sweep: Sweep) -> Text:
    """Perplexity (logarithmic) over parameters, one mark a text and method; where two meet the later one shows."""
    series = list(zip(MARKS, sweep.series, strict=False))
    points = [(row.parameters, row.perplexity[text], mark) for mark, (_, text, rows) in series for row in rows]
    if dense := sweep.dense:
        points += [(dense.parameters, value, WHOLE) for value in dense.perplexity.values()]
    sizes, heights = [size for size, _, _ in points], [log10(value) for _, value, _ in points]
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for size, value, mark in points:
        x = _place(size, min(sizes), max(sizes), WIDTH)
        y = _place(log10(value), min(heights), max(heights), HEIGHT)
        grid[HEIGHT - 1 - y][x] = mark
    ticks = {0: max(heights), HEIGHT // 2: (max(heights) + min(heights)) / 2, HEIGHT - 1: min(heights)}
    lines = ["perplexity over parameters"]
    for place, line in enumerate(grid):
        label = f"{10 ** ticks[place]:,.4g}" if place in ticks else ""
        lines.append(f"{label:>{MARGIN}} ┤{''.join(line).rstrip()}")
    lines.append(f"{'':>{MARGIN}} └{'─' * WIDTH}")
    low, high = f"{min(sizes):,}", f"{max(sizes):,}"
    lines.append(f"{'':>{MARGIN}}  {low}{high:>{WIDTH - len(low)}}")
    marks = [*((mark, name) for mark, (name, _, _) in series), *([(WHOLE, "dense")] if dense else [])]
    lines.append(" " * (MARGIN + 2) + "   ".join(f"{mark} {name}" for mark, name in marks))
    return Text("\n".join(lines), no_wrap=True)


def _place(value: float, low: float, high: float, cells: int) -> int:
    """The cell of a value on an axis of `cells` from low to high; the middle where there is but one value."""
    return round((value - low) / (high - low) * (cells - 1)) if high > low else cells // 2
