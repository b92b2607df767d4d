"""Runs side by side and plans apart, read from their artifacts. No torch."""

from pathlib import Path
from typing import Any

import numpy as np

from flapcli.artifacts.eval_report import EvalReport, Measurement, load_report
from flapcli.artifacts.plan import Plan, format_ranges, load_plan
from flapcli.artifacts.pruned_folder import found_pruned
from flapcli.artifacts.run_dir import RunDir
from flapcli.artifacts.stats import load_header
from flapcli.errors import FlapError
from flapcli.views.commands import APPLY
from flapcli.views.eval_rows import shown_metrics


def _read(path: Path) -> tuple[dict[str, Any], EvalReport]:
    """What was asked, by heading, as far as stats, plan and checkpoint are there; and the evaluation.

    `path` is a run folder, or an eval.json alone. Raises FlapError where nothing was evaluated.
    """
    run = RunDir(path)
    evaluation = path if path.is_file() else run.eval
    if not evaluation.exists():
        raise FlapError(f"{path} has no eval.json: run `flap eval -d {path}` first")
    settings: dict[str, Any] = {}
    if run.stats.exists():
        header = load_header(run.stats)
        asked = header.calibration
        settings |= {
            "model": header.model.name, "calibration text": asked.dataset, "nsamples": asked.nsamples,
            "seqlen": asked.seqlen, "seed": asked.seed, "calibration dtype": asked.dtype,
        }  # fmt: skip
    if run.plan.exists():
        settings |= _choices(load_plan(run.plan))
    if folder := found_pruned(run.pruned):
        settings |= {name: getattr(folder.flap.made_by, name) for name in APPLY}
    report = load_report(evaluation)
    settings |= {f"eval {name}": report.settings.get(name) for name in ("seqlen", "dtype", "limit", "num_fewshot")}
    return settings, report


def compare(paths: list[Path]) -> dict[str, Any]:
    """Settings that differ between runs, those that all share, and figures, each {heading: [value of each run]}.

    The first run's dense model comes first among the figures where it was measured; None stands for a figure
    that a run lacks.
    """
    runs = [_read(path) for path in paths]
    settings, reports = _aligned([asked for asked, _ in runs]), [report for _, report in runs]
    dense = reports[0].baseline
    differ = {name: values for name, values in settings.items() if any(value != values[0] for value in values)}
    return {
        "runs": [str(path) for path in paths],
        "columns": [*(["dense"] if dense else []), *map(str, paths)],
        "differ": differ,
        "shared": {name: values[0] for name, values in settings.items() if name not in differ},
        "figures": _aligned([_figures(measured) for measured in [*([dense] if dense else []), *reports]]),
    }


def _aligned(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _choices(plan: Plan) -> dict[str, Any]:
    chosen = {"model": plan.model.name, "method": plan.method, "metric": plan.metric, "structure": plan.structure}
    return chosen | {"ratio": plan.ratio.requested, "ratio achieved": plan.ratio.achieved} | plan.settings


def _figures(report: Measurement) -> dict[str, Any]:
    """Every number that a reader compares, by a heading."""
    found: dict[str, Any] = {"parameters": report.size.parameters, "bytes on disk": report.size.bytes}
    for text, value in report.perplexity.items():
        found[f"perplexity {text}"] = value
        if details := report.perplexity_details.get(text):
            found[f"bits per byte {text}"] = details.bits_per_byte
            if details.divergence:
                found[f"divergence {text}"] = details.divergence.kl
                found[f"equal next tokens {text}"] = details.divergence.equal_tokens
    for task, metrics in report.tasks.items():
        for metric in shown_metrics(task, metrics):
            found[f"{task} {metric}"] = metrics[metric]
    if len(report.averaged_tasks) > 1:
        found["average of tasks"] = report.task_average
    for name, value in (report.speed or {}).items():
        found[name.replace("_", " ")] = value
    if isinstance(report, EvalReport) and report.speedup:
        found["prefill gain over dense"] = report.speedup[0].prefill.median
        found["decode gain over dense"] = report.speedup[0].decode.median
    return found


def diff(one: Plan, two: Plan) -> dict[str, Any]:
    """Units that only one of two plans keeps, layer by layer and in all. Raises FlapError for plans of unlike models.

    Each layer that differs: {layer, module: {only_first, only_second}} as ranges of unit indices.
    """
    sizes = [
        [[(part.of, part.unit) for part in map(layer.module, plan.modules)] for layer in plan.layers]
        for plan in (one, two)
    ]
    if sizes[0] != sizes[1]:
        raise FlapError(f"the plans are of models of unlike sizes: {one.model.name} and {two.model.name}")
    layers = []
    totals = {module: {"kept_by_both": 0, "only_first": 0, "only_second": 0} for module in one.present}
    for index in range(len(one.layers)):
        row: dict[str, Any] = {"layer": index}
        for module in one.present:
            first, second = one.kept(index, module), two.kept(index, module)
            only = {"only_first": np.setdiff1d(first, second), "only_second": np.setdiff1d(second, first)}
            for name, units in {"kept_by_both": np.intersect1d(first, second), **only}.items():
                totals[module][name] += len(units)
            if any(map(len, only.values())):
                row[module] = {name: format_ranges(units) for name, units in only.items()}
        if len(row) > 1:
            layers.append(row)
    settings = _aligned([_choices(one), _choices(two)])
    return {
        "same_model": one.model.fingerprint == two.model.fingerprint,
        "settings": {name: values for name, values in settings.items() if values[0] != values[1]},
        "totals": totals,
        "layers": layers,
    }
