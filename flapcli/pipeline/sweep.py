"""`flap sweep`: several ratios planned, applied and evaluated from one calibration, each as cached as elsewhere."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flapcli.allocate import Request
from flapcli.checkpoint import Hub
from flapcli.choose import checked
from flapcli.corpus import source_sha256
from flapcli.errors import FlapError
from flapcli.evaluate.report import EvalReport, Measurement, load_report
from flapcli.evaluate.suite import task_files_sha256
from flapcli.pipeline.apply import ApplyOptions, run_apply
from flapcli.pipeline.calibrate import run_calibrate
from flapcli.pipeline.common import CalibrateOptions, Compute, Scale, default_text, versions
from flapcli.pipeline.evaluate import EvalOptions, calibration_text, run_eval
from flapcli.pipeline.plan import run_plan
from flapcli.plan import Plan
from flapcli.progress import Progress
from flapcli.rundir import RunDir, atomic_file, remove_folder, sha256
from flapcli.sweep import FORMAT, Figures, Row, Sweep, save_sweep

POINT_FORMAT = "flap-sweep-point/1"


@dataclass(frozen=True)
class SweepOptions:
    """What is done at every ratio; `request` is of any ratio. Without `keep` a pruned folder goes once measured."""

    ratios: tuple[float, ...]
    method: str
    metric: str | None
    structure: str | None
    attention_exponent: float | None
    request: Request
    apply: ApplyOptions
    evaluate: EvalOptions
    keep: bool

    def check(self) -> None:
        """Raise UsageError for options that don't go together, before anything is calibrated."""
        checked(self.method, self.metric, self.structure, self.request, self.attention_exponent)
        self.apply.check()
        self.evaluate.check()


@dataclass(frozen=True)
class _Job:
    """A sweep once it is calibrated, its texts known."""

    run: RunDir
    model: str
    hub: Hub
    options: SweepOptions
    compute: Compute
    force: bool
    progress: Progress

    def folder(self, ratio: float) -> Path:
        return self.run.path / "sweep" / str(ratio)

    def plan(self, ratio: float) -> Plan:
        o = self.options
        request = replace(o.request, ratio=ratio)
        out = self.folder(ratio) / "plan.yaml"
        return run_plan(
            out, self.run.stats, o.method, o.metric, request, o.structure, o.attention_exponent, self.force
        )[0]

    def dense(self) -> EvalReport:
        out = self.run.path / "sweep" / "dense.json"
        return run_eval(
            out, self.model, None, self.hub, self.options.evaluate, self.compute, self.force, self.progress
        )[0]

    def point(self, ratio: float) -> EvalReport:
        """Apply and measure one ratio, or take what was measured of the same; the folder stays or goes."""
        folder = self.folder(ratio)
        pruned, evaluation = folder / "pruned", folder / "eval.json"
        done = None if self.force else self._measured(folder)
        if done is None or self.options.keep:
            run_apply(
                pruned, folder / "plan.yaml", None, self.model, self.hub, self.options.apply, self.force, self.progress,
                self.compute,
            )  # fmt: skip
        if done:
            self.progress.note(f"{evaluation}: up to date")
            return done
        report, _ = run_eval(
            evaluation, str(pruned), None, self.hub, self.options.evaluate, self.compute, self.force, self.progress
        )
        if report.all_failures:  # to be tried again, so the folder stays
            return report
        if not self.options.keep:
            remove_folder(pruned)
        record = {"format": POINT_FORMAT, **self._asked(folder), "eval_sha256": sha256(evaluation)}
        with atomic_file(folder / "point.json") as scratch:
            scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return report

    def _asked(self, folder: Path) -> dict[str, Any]:
        """All that decides a point's figures; the plan's hash stands for model, statistics and units."""
        options = self.options.evaluate
        asked = {
            "plan_sha256": sha256(folder / "plan.yaml"),
            "apply": asdict(self.options.apply),
            "eval": asdict(options),
            "texts": {text: source_sha256(text) for text in options.perplexity},
            "task_files": task_files_sha256(Path(options.include_path)) if options.include_path else None,
            "device": self.compute.device,
        }
        return json.loads(json.dumps(asked))

    def _measured(self, folder: Path) -> EvalReport | None:
        """The evaluation of a point, where point.json says that it is of what is asked now."""
        try:
            record = json.loads((folder / "point.json").read_bytes())
            evaluation = sha256(folder / "eval.json")
        except (OSError, ValueError):
            return None
        same = record == {"format": POINT_FORMAT, **self._asked(folder), "eval_sha256": evaluation}
        return load_report(folder / "eval.json") if same else None


def run_sweep(
    run: RunDir,
    model: str,
    hub: Hub,
    calibrate: CalibrateOptions,
    options: SweepOptions,
    compute: Compute,
    scale: Scale,
    force: bool,
    progress: Progress,
) -> tuple[Sweep, list[str]]:
    """Calibrate once, measure the dense model once (if asked to), then every ratio; writes sweep.json.

    All plans are made before anything is applied, so that a ratio that can't be reached costs no time.
    Returns the names of tasks that could not be run too.
    """
    _refuse_foreign(run.sweep)
    options.check()
    baseline = options.evaluate.baseline
    header, _ = run_calibrate(run.stats, model, hub, calibrate, compute, force, progress, scale)
    texts = options.evaluate.perplexity or (
        calibration_text(header.calibration.dataset, default_text(model), progress),
    )
    options = replace(options, evaluate=replace(options.evaluate, perplexity=texts, baseline=False))
    job = _Job(run, model, hub, options, compute, force, progress)
    plans = {ratio: job.plan(ratio) for ratio in options.ratios}
    dense = job.dense() if baseline else None
    reports = {}
    for ratio in options.ratios:
        progress.note(f"ratio {ratio}")
        reports[ratio] = job.point(ratio)
    sweep = Sweep(
        model=header.model.name,
        fingerprint=header.model.fingerprint,
        stats_sha256=sha256(run.stats),
        settings=_settings(options, plans[options.ratios[0]]),
        dense=Figures(**_figures(dense)) if dense else None,
        rows=[_row(ratio, plans[ratio], report, dense) for ratio, report in reports.items()],
        versions=versions(),
    )
    save_sweep(run.sweep, sweep)
    failed = {task for report in [*reports.values(), *([dense] if dense else [])] for task in report.all_failures}
    return sweep, sorted(failed)


def _row(ratio: float, plan: Plan, report: EvalReport, dense: EvalReport | None) -> Row:
    relative = {text: value / dense.perplexity[text] for text, value in report.perplexity.items()} if dense else {}
    return Row(
        **_figures(report), ratio=ratio, achieved=plan.ratio.achieved, relative=relative, folder=f"sweep/{ratio}"
    )


def _figures(report: Measurement) -> dict[str, Any]:
    kept = report.model_dump(include={"perplexity", "tasks", "task_average"})
    return kept | report.size.model_dump()


def _settings(options: SweepOptions, plan: Plan) -> dict[str, Any]:
    """The options as asked, those that the method decides as they were decided."""
    chosen = {"method": plan.method, "metric": plan.metric, "structure": plan.structure} | plan.settings
    evaluate = json.loads(json.dumps(asdict(options.evaluate)))
    return {"ratios": list(options.ratios), "plan": chosen, "apply": asdict(options.apply), "eval": evaluate}


def _refuse_foreign(path: Path) -> None:
    """Raise FlapError where something else than a sweep lies in its place."""
    if not path.exists():
        return
    try:
        ours = json.loads(path.read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise FlapError(f"{path} exists and is not a sweep of flap's: move it away or give another --run-dir")
