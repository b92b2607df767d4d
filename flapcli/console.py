"""Everything people see: progress, notes, errors, tables and bars. Data goes to stdout, the rest to stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flapcli.console_sweep import sweep_plot, sweep_table
from flapcli.evaluate.report import EvalReport
from flapcli.evaluate.table import cost_rows, models_of, quality_rows, speed_lines
from flapcli.plan import Plan, format_ranges
from flapcli.progress import Advance
from flapcli.selftext import SelfText
from flapcli.shape import MODULES
from flapcli.stats import StatsHeader
from flapcli.sweep import Sweep
from flapcli.target import recorded

out = Console()
err = Console(stderr=True)
BAR = 20


def error(message: str) -> None:
    """One line on stderr, whatever its length."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def note(message: str) -> None:
    err.print(Text(message), soft_wrap=True)


def data(value: Any) -> None:
    """JSON on stdout, plain."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def silent_stdout(silent: bool) -> Iterator[None]:
    """Keep tables off stdout while only the JSON that follows is wanted there."""
    before, out.quiet = out.quiet, silent
    try:
        yield
    finally:
        out.quiet = before


class Bars:
    """A rich progress bar with rate and time left on a terminal; nothing elsewhere."""

    def note(self, message: str) -> None:
        note(message)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        if not err.is_terminal:
            yield lambda _done: None
            return
        from rich import progress

        class Rate(progress.ProgressColumn):
            def render(self, task: progress.Task) -> Text:
                scale, name = (1e6, "MB") if unit == "bytes" else (1, unit)
                return Text(f"{(task.speed or 0) / scale:,.0f} {name}/s")

        columns = (
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
            Rate(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
        )  # fmt: skip
        with progress.Progress(*columns, console=err, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda done: bars.advance(task, done)


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
    table.add_row("ran in", run.dtype + (f", {run.mode}" if run.mode else ""))
    asked = header.settings
    beside = [f"Gram matrices ({asked.get('gram_dtype', 'float32')})"] if asked.get("gram") else []
    beside += ["Fisher information"] if asked.get("fisher") else []
    if beside:
        table.add_row("beside moments", ", ".join(beside))
    out.print(table)


def show_selftext(made: SelfText) -> None:
    """What the model wrote, a window a row."""
    table = Table(title=f"text that {made.model} wrote, seed {made.seed}", title_justify="left")
    table.add_column("window", justify="right")
    table.add_column(f"{made.seqlen} tokens")
    for index, window in enumerate(made.windows):
        table.add_row(str(index), Text(" ".join(window.text.split())))
    out.print(table)


def show_plan(plan: Plan) -> None:
    """A row and two bars per layer, and what it comes to."""
    table = Table(title=f"{plan.method} {plan.metric} {plan.structure} on {plan.model.name}", title_justify="left")
    table.add_column("layer", justify="right")
    for module in MODULES:
        table.add_column(plan.layers[0].module(module).unit + "s", justify="right", no_wrap=True)
        table.add_column(f"{module} kept", no_wrap=True)
    for layer, (heads, neurons) in enumerate(zip(plan.counts("attention"), plan.counts("mlp"), strict=True)):
        row = [str(layer)]
        for module, count in zip(MODULES, (heads, neurons), strict=True):
            of = plan.layers[layer].module(module).of
            row += [f"{count}/{of}", _bar(count, of)]
        table.add_row(*row)
    out.print(table)
    p = plan.parameters
    out.print(
        f"{plan.ratio.achieved:.2%} of {p.prunable:,} prunable weights go (asked: {plan.ratio.requested:.2%})\n"
        f"parameters {p.model:,} -> {p.model_after:,}",
        highlight=False,
    )
    if target := recorded(plan.settings):
        counted = "biases that compensation adds included" if target.biases else "no added biases counted"
        written = f", written as {target.dtype}" if target.dtype else ""
        out.print(f"target: at most {target.limit:,} {target.unit}{written}, {counted}", highlight=False)
    _say_of_widths(plan.settings.get("round_to"))


def _say_of_widths(round_to: Any) -> None:
    """What multiples of MLP widths are good for, where the user asked for some."""
    if isinstance(round_to, int) and round_to > 1:
        fits = "K-quants and older types" if round_to % 256 == 0 else "older types (K-quants want 256)"
        fits = fits if round_to % 32 == 0 else "none of its types (older ones want 32, K-quants 256)"
        out.print(
            f"MLP widths are multiples of {round_to}, which suits llama.cpp's quantisations: {fits}", highlight=False
        )


def show_folder(config: dict[str, Any], path: str) -> None:
    """What a pruned folder is."""
    flap = config["flap"]
    made_by = flap["made_by"]
    table = _pairs(f"pruned checkpoint {path}")
    table.add_row("made from", made_by["model"]["name"])
    how = ", sequential" if made_by.get("sequential") else ""
    masked = ", masked in place" if made_by["mask_only"] else ""
    table.add_row("compensation", made_by["compensate"] + how + masked)
    table.add_row("biases added", ", ".join(flap["biases"]) or "none")
    if "source_layers" in flap:
        kept = flap["source_layers"]
        table.add_row("layers", f"{len(kept)} of the dense model's: {format_ranges(kept)}")
    for size in ("num_key_value_heads", "intermediate_size"):
        values = flap[size]
        table.add_row(size, f"{min(values)} to {max(values)}, {sum(values):,} in all")
    table.add_row("weights", config["dtype"])
    out.print(table)
    if errors := flap.get("output_error"):
        _show_output_errors(errors)


def _show_output_errors(errors: dict[str, list[list[float] | None]]) -> None:
    """What least squares gained: share of each projection's output variance lost on the calibration text."""
    table = Table(title="output variance lost, with the pruned channels' mean -> least squares", title_justify="left")
    table.add_column("layer", justify="right")
    for module in MODULES:
        table.add_column(module, justify="right")
    for layer, pairs in enumerate(zip(*(errors[module] for module in MODULES), strict=True)):
        table.add_row(str(layer), *(f"{pair[0]:.2%} -> {pair[1]:.2%}" if pair else "-" for pair in pairs))
    out.print(table)


def show_report(report: EvalReport) -> None:
    """The figures of the pruned model, the dense one's beside them, and what the speed comes to."""
    table = Table(title=report.checkpoint, title_justify="left")
    table.add_column("")
    for label in models_of(report):
        table.add_column(label, justify="right")
    for name, cells in quality_rows(report) + cost_rows(report):
        table.add_row(name, *cells)
    out.print(table)
    for line in speed_lines(report):
        out.print(Text(line), soft_wrap=True)
    if report.all_failures:
        out.print(Text(f"tasks that were not run: {', '.join(report.all_failures)}"), soft_wrap=True)


def show_sweep(sweep: Sweep) -> None:
    """A row per ratio, and perplexity over size."""
    out.print(sweep_table(sweep))
    out.print(sweep_plot(sweep))


def show_export(told: dict[str, Any]) -> None:
    """What an exported file is, and what smaller quantisations of it would meet."""
    table = _pairs(f"exported {told['path']}")
    table.add_row("made from", told["model"]["name"])
    table.add_row("weights", told["outtype"])
    table.add_row("bytes", f"{told['bytes']:,}")
    table.add_row("for Ollama", f"ollama create NAME -f {told['modelfile']}")
    for line in told["advice"]:
        table.add_row("quantising", line)
    out.print(table)


def show_families(rows: list[dict[str, str]]) -> None:
    table = Table()
    for column in ("family", "covers", "model_type", "architecture"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    out.print(table)


def _pairs(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _bar(count: int, of: int) -> str:
    full = round(BAR * count / of) if of else 0
    return "█" * full + "░" * (BAR - full)
