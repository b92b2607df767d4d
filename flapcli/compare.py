"""Runs side by side and plans apart, read from their artifacts. No torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from flapcli.errors import FlapError
from flapcli.evaluate.report import EvalReport, Measurement, load_report
from flapcli.evaluate.suite import main_metric
from flapcli.plan import Plan, format_ranges, load_plan
from flapcli.report.commands import APPLY
from flapcli.rundir import RunDir
from flapcli.shape import MODULES
from flapcli.stats import StatsHeader, load_header

Summary = dict[str, Any]


def summarise(path: Path) -> Summary:
    """A run folder (or an eval.json alone) as flat {heading: value} under settings and figures.

    Settings come from stats, plan and checkpoint as far as they are there. Raises FlapError where nothing was
    evaluated.
    """
    if path.is_file():
        report = load_report(path)
        return {"settings": _evaluation(report), "figures": _figures(report)}
    run = RunDir(path)
    if not run.eval.exists():
        raise FlapError(f"{path} has no eval.json: run `flap eval -d {path}` first")
    settings: dict[str, Any] = {}
    if run.stats.exists():
        settings |= _calibration(load_header(run.stats))
    if run.plan.exists():
        settings |= _choices(load_plan(run.plan))
    if (run.pruned / "config.json").exists():
        settings |= _application(run.pruned / "config.json")
    report = load_report(run.eval)
    return {"settings": settings | _evaluation(report), "figures": _figures(report)}


def compare(paths: list[Path]) -> dict[str, Any]:
    """Settings that differ between runs, those that all share, and figures, each {heading: [value of each run]}.

    The first run's dense model comes first among the figures where it was measured; None stands for a figure
    that a run lacks.
    """
    runs = [summarise(path) for path in paths]
    settings = _aligned([run["settings"] for run in runs])
    dense = _figures_of_baseline(paths[0])
    figures = _aligned(([dense] if dense else []) + [run["figures"] for run in runs])
    return {
        "runs": [str(path) for path in paths],
        "columns": (["dense"] if dense else []) + [str(path) for path in paths],
        "differ": {name: values for name, values in settings.items() if any(value != values[0] for value in values)},
        "shared": {name: values[0] for name, values in settings.items() if all(v == values[0] for v in values)},
        "figures": figures,
    }


def _aligned(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _calibration(header: StatsHeader) -> dict[str, Any]:
    run = header.calibration
    return {
        "model": header.model.name, "calibration text": run.dataset, "nsamples": run.nsamples,
        "seqlen": run.seqlen, "seed": run.seed, "calibration dtype": run.dtype,
    }  # fmt: skip


def _choices(plan: Plan) -> dict[str, Any]:
    chosen = {"model": plan.model.name, "method": plan.method, "metric": plan.metric, "structure": plan.structure}
    return chosen | {"ratio": plan.ratio.requested, "ratio achieved": plan.ratio.achieved} | plan.settings


def _application(config: Path) -> dict[str, Any]:
    made_by = (json.loads(config.read_bytes()).get("flap") or {}).get("made_by", {})
    return {name: made_by[name] for name in APPLY if name in made_by}


def _evaluation(report: EvalReport) -> dict[str, Any]:
    return {f"eval {name}": report.settings.get(name) for name in ("seqlen", "dtype", "limit", "num_fewshot")}


def _figures_of_baseline(path: Path) -> dict[str, Any]:
    report = load_report(path if path.is_file() else RunDir(path).eval)
    return _figures(report.baseline) if report.baseline else {}


def _figures(report: Measurement) -> dict[str, Any]:
    """Every number that a reader compares, by a heading."""
    found: dict[str, Any] = {"parameters": report.size.parameters, "bytes on disk": report.size.bytes}
    for text, value in report.perplexity.items():
        found[f"perplexity {text}"] = value
        if text in report.perplexity_details:
            found[f"bits per byte {text}"] = report.perplexity_details[text].bits_per_byte
    for task, metrics in report.tasks.items():
        main = main_metric(task, metrics)
        for metric in [main] if main else [name for name in metrics if "_stderr" not in name]:
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
    sizes = [[(layer.attention.of, layer.attention.unit, layer.mlp.of) for layer in plan.layers] for plan in (one, two)]
    if sizes[0] != sizes[1]:
        raise FlapError(f"the plans are of models of unlike sizes: {one.model.name} and {two.model.name}")
    layers = []
    totals = {module: {"kept_by_both": 0, "only_first": 0, "only_second": 0} for module in MODULES}
    for index in range(len(one.layers)):
        row: dict[str, Any] = {"layer": index}
        for module in MODULES:
            first, second = one.kept(index, module), two.kept(index, module)
            only = (np.setdiff1d(first, second), np.setdiff1d(second, first))
            totals[module]["kept_by_both"] += len(np.intersect1d(first, second))
            totals[module]["only_first"] += len(only[0])
            totals[module]["only_second"] += len(only[1])
            if len(only[0]) or len(only[1]):
                row[module] = {"only_first": format_ranges(only[0]), "only_second": format_ranges(only[1])}
        if len(row) > 1:
            layers.append(row)
    settings = _aligned([_choices(one), _choices(two)])
    return {
        "same_model": one.model.fingerprint == two.model.fingerprint,
        "settings": {name: values for name, values in settings.items() if values[0] != values[1]},
        "totals": totals,
        "layers": layers,
    }
