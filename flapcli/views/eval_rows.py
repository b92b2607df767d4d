"""An evaluation in words and rows, for the terminal and the page alike. No torch."""

from pathlib import Path

from flapcli.artifacts.eval_report import EvalReport, Measurement, Spread
from flapcli.artifacts.plan import Plan
from flapcli.artifacts.sweep_results import Figures, Sweep
from flapcli.artifacts.sweep_results import Row as Ratio
from flapcli.evaluation.task_names import main_metric
from flapcli.storage.dtypes import ITEM_SIZE

Row = tuple[str, list[str]]
DEAR = 1.25  # times the dense perplexity: past it a ratio is not recommended
SMALL_BYTES = 2 * 10**9  # below this a CPU spends much of its time outside the matrix products


def models_of(report: EvalReport) -> dict[str, Measurement]:
    """The columns: the dense model first, where it was measured."""
    if report.baseline:
        return {"dense": report.baseline, "pruned": report}
    return {"model": report}


def quality_rows(report: EvalReport) -> list[Row]:
    """Perplexity, bits per byte and divergence of every text, then tasks, with standard errors, one cell a model."""
    models = list(models_of(report).values())
    rows: list[Row] = []
    for text in report.perplexity:
        details = report.perplexity_details.get(text)
        part = f" ({details.windows} of {details.of_windows:,} windows)" if details and details.of_windows else ""
        rows.append((f"perplexity {text}{part}", [_perplexity(m, text) for m in models]))
        if all(text in m.perplexity_details for m in models):
            bits = [f"{m.perplexity_details[text].bits_per_byte:.3f}" for m in models]
            rows.append((f"bits per byte {text}", bits))
        rows += _divergence_rows(models, text)
    ran = [{d.dtype for d in m.perplexity_details.values() if d.dtype} for m in models]
    if all(ran):
        rows.append(("run in", [", ".join(sorted(found)) for found in ran]))
    for task, metrics in report.tasks.items():
        for metric in shown_metrics(task, metrics):
            rows.append((f"{task} ({metric})", [_metric(m.tasks.get(task, {}), metric) for m in models]))
    if (counted := len(report.averaged_tasks)) > 1:
        means = ["-" if m.task_average is None else f"{m.task_average:.4f}" for m in models]
        rows.append((f"average of {counted} tasks", means))
    return rows


def _divergence_rows(models: list[Measurement], text: str) -> list[Row]:
    """How far each model is from the dense one on a text, where that was measured of one."""
    found = [details.divergence if (details := m.perplexity_details.get(text)) else None for m in models]
    if not any(found):
        return []
    apart = [f"{each.kl:.4f} ± {each.standard_error:.4f}" if each else "-" for each in found]
    equal = [f"{each.equal_tokens:.1%}" if each else "-" for each in found]
    return [(f"divergence, nats a token {text}", apart), (f"equal next tokens {text}", equal)]


def cost_rows(report: EvalReport) -> list[Row]:
    """Size, speed and memory, one cell a model."""
    models = list(models_of(report).values())
    rows: list[Row] = [
        ("parameters", [f"{m.size.parameters:,}" for m in models]),
        ("weights on disk", [f"{megabytes(m.size.bytes)} ({m.size.stored_as})" for m in models]),
        *_alike(models),
    ]
    details = [m.speed_details for m in models if m.speed_details]
    if len(details) != len(models):
        return rows
    rows.append((f"weights in memory ({details[0].dtype})", [megabytes(d.weight_bytes) for d in details]))
    peaks = [int(m.speed["peak_memory_bytes"]) if m.speed else 0 for m in models]
    where = "resident" if details[0].device == "cpu" else details[0].device
    rows.append((f"peak memory ({where})", [megabytes(peak) for peak in peaks]))
    for cases in zip(*(d.cases for d in details), strict=True):
        name = f"({cases[0].batch_size} x {cases[0].prompt_tokens})"
        rows.append((f"prefill tokens/s {name}", [_spread(c.prefill) for c in cases]))
        rows.append((f"decode tokens/s {name}", [_spread(c.decode) for c in cases]))
        rows.append((f"MACs per decoded token {name}", [f"{c.macs_decode / 1e6:,.1f} M" for c in cases]))
    return rows


def _alike(models: list[Measurement]) -> list[Row]:
    """Sizes of models that are stored in unlike types, like with like: what a weight takes, and all in the last's."""
    kind = models[-1].size.stored_as
    if len({m.size.stored_as for m in models}) == 1 or kind not in ITEM_SIZE:
        return []
    return [
        ("bits a weight", [f"{m.size.bytes * 8 / m.size.parameters:.1f}" for m in models]),
        (f"weights as {kind}", [megabytes(m.size.parameters * ITEM_SIZE[kind]) for m in models]),
    ]


def story(report: EvalReport, plan: Plan) -> list[str]:
    """What pruning took and what it cost, a line each."""
    before, after, planned = plan.parameters.model, report.size.parameters, plan.parameters.model_after
    biases = f"; {after - planned:,} of them are added biases" if after > planned else ""
    removed = f"{plan.ratio.achieved:.1%} of what can be pruned"
    lines = [
        f"parameters {before:,} -> {after:,}: {after / before - 1:+.1%} ({removed}{biases})"
        if after < before
        else f"parameters {after:,}: as many as before, {removed} set to zero"
    ]
    if not (dense := report.baseline):
        return lines
    for text, value in report.perplexity.items():
        if was := dense.perplexity.get(text):
            lines.append(f"perplexity {text} {was:.2f} -> {value:.2f}: {value / was - 1:+.0%}")
    kind, disk = report.size.stored_as, dense.size
    if kind in ITEM_SIZE:
        same, now = disk.parameters * ITEM_SIZE[kind], report.size.bytes
        source = f"; the source is {disk.stored_as}, {disk.bytes * 8 / disk.parameters:.1f} bits a weight, "
        unlike = f"{source}{megabytes(disk.bytes)}" if disk.stored_as != kind else ""
        lines.append(f"weights, both as {kind}, {megabytes(same)} -> {megabytes(now)}: {now / same - 1:+.1%}{unlike}")
    return lines


def sweep_rows(sweep: Sweep) -> tuple[list[str], list[Row]]:
    """Headings, and a row for the dense model and one a ratio: size, perplexities over the dense model's, tasks."""
    models: list[Figures] = [*([sweep.dense] if sweep.dense else []), *sweep.rows]
    texts = list(sweep.rows[0].perplexity)
    averaged = any(row.task_average is not None for row in sweep.rows)
    kind = sweep.rows[-1].stored_as
    width = ITEM_SIZE.get(kind)  # like with like: a source may be quantised
    columns = [
        "ratio",
        "parameters",
        f"weights as {kind}" if width else "weights",
        *(f"perplexity {Path(text).name}" for text in texts),
    ]
    rows: list[Row] = []
    for model in models:
        size = megabytes(model.parameters * width) if width else f"{megabytes(model.bytes)} {model.stored_as}"
        cells = [f"{model.parameters:,}", size]
        for text in texts:
            over = model.relative.get(text) if isinstance(model, Ratio) else None
            cells.append(f"{model.perplexity[text]:.2f}" + (f" ({over:.2f}x)" if over else ""))
        cells += ["-" if model.task_average is None else f"{model.task_average:.4f}"] if averaged else []
        name = " ".join(filter(None, (model.method, f"{model.ratio:g}"))) if isinstance(model, Ratio) else "dense"
        rows.append((name, cells))
    return [*columns, *(["average of tasks"] if averaged else [])], rows


def recommendation(sweep: Sweep) -> str:
    """The largest ratio that stays near the dense model on every text, in words."""
    if not sweep.dense:
        return "without the dense model's figures (--no-baseline) no ratio can be recommended"
    tried = [row for row in sweep.rows if row.method == sweep.rows[0].method]
    near = [row for row in tried if max(row.relative.values()) <= DEAR]
    if near:
        cost = max(near[-1].relative.values())
        return (
            f"recommended: {near[-1].ratio:g}, the largest ratio tried at which no perplexity is more than {DEAR:g} "
            f"times the dense model's ({cost:.2f})"
        )
    least = min(tried, key=lambda row: max(row.relative.values()))
    return (
        f"no ratio tried keeps perplexity within {DEAR:g} times the dense model's; {least.ratio:g} comes nearest "
        f"({max(least.relative.values()):.2f} times): try smaller ones, or --preset best"
    )


def sweep_words(sweep: Sweep) -> str:
    """What the picture of a sweep shows."""
    _, rows = sweep_rows(sweep)
    return "Perplexity over parameters: " + "; ".join(f"{name}: {', '.join(cells)}" for name, cells in rows)


def speed_lines(report: EvalReport) -> list[str]:
    """What pruning gained in speed beside what the removed computation would allow, and plainly where it did not."""
    found = gains(report)
    lines = [
        f"{case}: {gain.median:.2f}x the dense speed ({gain.low:.2f} to {gain.high:.2f}); "
        f"the removed computation would allow {possible:.2f}x; {_verdict(gain)}"
        for case, gain, possible in found
    ]
    short = any(gain.median - 1 < (possible - 1) / 2 for _, gain, possible in found)
    return lines + (_reasons(report) if short else [])


def gains(report: EvalReport) -> list[tuple[str, Spread, float]]:
    """Every case by name, its gain over the dense speed, and the gain that the removed computation would allow."""
    if not report.speedup or not report.speed_details:
        return []
    return [
        (f"{phase}, batch {case.batch_size}, prompt {case.prompt_tokens}", found, possible)
        for case, gain in zip(report.speed_details.cases, report.speedup, strict=False)
        for phase, found, possible in (
            ("prefill", gain.prefill, gain.prefill_possible), ("decode", gain.decode, gain.decode_possible)
        )
    ]  # fmt: skip


def shown_metrics(task: str, metrics: dict[str, float]) -> list[str]:
    """The metric that speaks for a task, or all where none does."""
    main = main_metric(task, metrics)
    return [main] if main else [name for name in metrics if "_stderr" not in name]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**8 else megabytes(count)


def _verdict(gain: Spread) -> str:
    if gain.low > 1:
        return "pruning paid"
    if gain.median <= 1:
        return "pruning did not pay"
    return "within the machine's noise"


def _reasons(report: EvalReport) -> list[str]:
    """Why less than half of the possible gain may have been reached."""
    details = report.speed_details
    reasons = []
    if details and details.odd_widths:
        reasons.append(
            f"{details.odd_widths:.0%} of the layers have an MLP width that is no multiple of 16, which kernels, "
            "above all on GPUs, may run slower on: try `flap plan --round-to 32`"
        )
    if details and details.device == "cpu" and details.weight_bytes < SMALL_BYTES:
        reasons.append("a small model on a CPU spends much of its time outside the products that pruning shrinks")
    return reasons


def _perplexity(measurement: Measurement, text: str) -> str:
    value, details = measurement.perplexity.get(text), measurement.perplexity_details.get(text)
    if value is None:
        return "-"
    return f"{value:.2f} ± {details.standard_error:.2f}" if details else f"{value:.2f}"


def _metric(values: dict[str, float], metric: str) -> str:
    if metric not in values:
        return "-"
    name, comma, filtered = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{filtered}")
    return f"{values[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _spread(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f} to {spread.high:,.1f})"
