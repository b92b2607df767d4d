"""`flap sweep`: several ratios planned, applied and evaluated from one calibration, each as cached as elsewhere."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flapcli.artifacts.eval_report import EVAL, EvalReport, Measurement, load_report
from flapcli.artifacts.plan import Plan
from flapcli.artifacts.run_dir import RunDir, holding
from flapcli.artifacts.sweep_results import SWEEP, Figures, Row, Sweep, save_sweep
from flapcli.artifacts.unfinished import save_measured, told
from flapcli.artifacts.versions import versions
from flapcli.calibration.stage import calibrate
from flapcli.checkpoints import DEMO, Hub
from flapcli.evaluation.stage import calibration_text, check_options, check_tasks, evaluate
from flapcli.evaluation.task_names import task_files_sha256
from flapcli.execution.settings import (
    ApplyOptions,
    CalibrateOptions,
    EvalOptions,
    Execution,
    HealOptions,
    Method,
    PlanOptions,
)
from flapcli.healing.stage import HealInputs, check, heal
from flapcli.planning.methods import checked
from flapcli.planning.stage import plan
from flapcli.progress import Progress, Silent
from flapcli.pruning.stage import ApplyInputs, apply
from flapcli.storage.atomic import atomic_file, remove_folder
from flapcli.storage.hashing import sha256
from flapcli.texts.corpus import default_text, source_sha256

PUBLISHED: dict[str, Any] = {"metric": None, "structure": None, "attention_exponent": None}  # of baselines
POINT_FORMAT = "flap-sweep-point/1"


@dataclass(frozen=True)
class SweepOptions:
    """What is done: one calibration, and the same at every ratio. Without `keep` a pruned folder goes once measured.

    `methods`: each of them at every ratio, in place of the plan's own; baselines as they are published.
    With `heal` what is measured was trained after the cut, where that made it better.
    """

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    calibrate: CalibrateOptions = field(default_factory=CalibrateOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    apply: ApplyOptions = field(default_factory=ApplyOptions)
    evaluate: EvalOptions = field(default_factory=EvalOptions)
    keep: bool = False
    methods: tuple[Method, ...] = ()
    heal: HealOptions | None = None

    @property
    def points(self) -> list["Point"]:
        if not self.methods:
            return [Point(None, ratio, replace(self.plan, ratio=ratio), self.apply) for ratio in self.ratios]
        found = []
        for method in self.methods:
            own = method == self.plan.method
            plan = self.plan if own else replace(self.plan, method=method, **PUBLISHED)
            apply = self.apply if own else ApplyOptions(remote_code=self.apply.remote_code, dtype=self.apply.dtype)
            found += [Point(method, ratio, replace(plan, ratio=ratio), apply) for ratio in self.ratios]
        return found


@dataclass(frozen=True)
class Point:
    """One row to come: its method where several are compared, its ratio, and what is asked of plan and apply."""

    method: Method | None
    ratio: float
    plan: PlanOptions
    apply: ApplyOptions

    @property
    def name(self) -> str:
        """Its folder below the sweep's, and what the user is told is done."""
        return f"{self.method}/{self.ratio}" if self.method else str(self.ratio)


@dataclass(frozen=True)
class _Job:
    """A sweep once it is calibrated, its texts known."""

    run: RunDir
    model: str
    hub: Hub
    options: SweepOptions
    execution: Execution
    force: bool
    progress: Progress

    def folder(self, point: Point) -> Path:
        return self.run.path / "sweep" / point.name

    def plan(self, point: Point) -> Plan:
        return plan(self.run.stats, self.folder(point) / "plan.yaml", point.plan, self.force)[0]

    def evaluate(self, checkpoint: str, out: Path) -> EvalReport:
        options = self.options.evaluate
        return evaluate(checkpoint, out, options, None, self.hub, self.execution, self.force, self.progress)[0]

    def measured(self, point: Point) -> EvalReport:
        """Apply and measure one point, or take what was measured of the same; the folder stays or goes."""
        folder = self.folder(point)
        pruned, evaluation = folder / "pruned", folder / "eval.json"
        done = None if self.force else self._found(folder, point)
        if done is None or self.options.keep:
            inputs = ApplyInputs(model=self.model, hub=self.hub)
            apply(folder / "plan.yaml", pruned, point.apply, inputs, self.execution, self.force, self.progress)
            healed = self._heal(folder) if done is None or Path(done.checkpoint).name == "healed" else None
        if done:
            self.progress.note(f"{evaluation}: up to date")
            return done
        report = self.evaluate(str(healed or pruned), evaluation)
        if report.all_failures:  # to be tried again, so the folder stays
            return report
        if not self.options.keep:
            remove_folder(pruned)
            if healed:
                remove_folder(healed)
        with atomic_file(folder / "point.json") as scratch:
            scratch.write_text(json.dumps(self._record(folder, point), indent=2) + "\n", encoding="utf-8")
        return report

    def _heal(self, folder: Path) -> Path | None:
        """Train what was pruned, if that is asked for; the folder where it became better. All have one teacher."""
        if self.options.heal is None:
            return None
        inputs, out = HealInputs(self.model, self.hub, self.run.teacher), folder / "healed"
        made, _ = heal(folder / "pruned", out, self.options.heal, inputs, self.execution, self.force, self.progress)
        return out if made else None

    def _found(self, folder: Path, point: Point) -> EvalReport | None:
        """The evaluation of a point, where point.json says that it is of what is asked now."""
        try:
            record = json.loads((folder / "point.json").read_bytes())
        except (OSError, ValueError):
            return None
        evaluation = folder / "eval.json"
        return load_report(evaluation) if evaluation.exists() and record == self._record(folder, point) else None

    def _record(self, folder: Path, point: Point) -> dict[str, Any]:
        """All that decides a point's figures, and their hash; the plan's stands for model, statistics and units."""
        options = self.options.evaluate
        record = {
            "format": POINT_FORMAT,
            "plan_sha256": sha256(folder / "plan.yaml"),
            "apply": asdict(point.apply),
            "eval": options.recorded(),
            "texts": {text: source_sha256(text) for text in options.perplexity},
            "task_files": task_files_sha256(Path(options.include_path)) if options.include_path else None,
            "device": self.execution.device,
            "eval_sha256": sha256(folder / "eval.json"),
        }
        record |= {"heal": asdict(self.options.heal)} if self.options.heal else {}
        return json.loads(json.dumps(record))


@holding
def sweep(
    run: RunDir,
    model: str = DEMO,
    options: SweepOptions = SweepOptions(),
    hub: Hub = Hub(),
    execution: Execution = Execution(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[Sweep, list[str]]:
    """Calibrate once, measure the dense model once (if asked to), then every ratio; writes sweep.json.

    All plans are made before anything is applied, so that a ratio that can't be reached costs no time.
    Returns the names of tasks that could not be run too. Raises UsageError for options that don't go together, before
    anything is calibrated; UnfinishedError, with the rows so far, where a later ratio fails.
    """
    before = SWEEP.find(run.sweep)  # refuses what is not flap's
    points = options.points
    for first in points:
        checked(first.plan)
    options.apply.check()
    check_options(options.evaluate, execution)
    if options.heal:
        check(options.heal)
    check_tasks(options.evaluate, _evaluated(run, options), progress)
    header, _ = calibrate(model, run.stats, options.calibrate, hub, execution, force, progress)
    texts, read = options.evaluate.perplexity, header.calibration
    texts = texts or (calibration_text(read.dataset, read.source_sha256, default_text(model), progress),)
    evaluation = replace(options.evaluate, perplexity=texts, baseline=False)
    job = _Job(run, model, hub, replace(options, evaluate=evaluation), execution, force, progress)
    plans = {point.name: job.plan(point) for point in points}
    dense = job.evaluate(model, run.path / "sweep" / "dense.json") if options.evaluate.baseline else None
    failed, failure = set(dense.all_failures) if dense else set(), None
    rows: list[Row] = []
    for point in points:
        progress.note(f"{point.method or 'ratio'} {point.ratio}")
        try:
            report = job.measured(point)
        except (Exception, KeyboardInterrupt) as error:
            if not rows:
                raise
            failure = error
            break
        failed |= set(report.all_failures)
        rows.append(_row(point, plans[point.name], report, dense))
    found = Sweep(
        model=header.model.name,
        fingerprint=header.model.fingerprint,
        stats_sha256=sha256(run.stats),
        settings=_settings(job.options, plans[points[0].name]),
        dense=Figures(**_figures(dense)) if dense else None,
        rows=rows,
        unfinished=told(failure) if failure else None,
        versions=versions(),
    )
    save_measured(save_sweep, run.sweep, found, failure, before is not None and before.unfinished is None)
    return found, sorted(failed)


def _evaluated(run: RunDir, options: SweepOptions) -> EvalReport | None:
    """One of a former sweep's evaluations, which all have the same tasks."""
    places = (run.path / "sweep" / point.name / "eval.json" for point in options.points)
    return next(filter(None, map(EVAL.find, places)), None)


def _row(point: Point, made: Plan, report: EvalReport, dense: EvalReport | None) -> Row:
    relative = {text: value / dense.perplexity[text] for text, value in report.perplexity.items()} if dense else {}
    figures, folder = _figures(report), f"sweep/{point.name}"
    return Row(
        **figures, ratio=point.ratio, achieved=made.ratio.achieved, relative=relative, folder=folder,
        method=point.method,
    )  # fmt: skip


def _figures(report: Measurement) -> dict[str, Any]:
    return report.model_dump(include={"perplexity", "tasks", "task_average"}) | report.size.model_dump()


def _settings(options: SweepOptions, plan: Plan) -> dict[str, Any]:
    """The options as asked, those that the method decides as they were decided."""
    chosen = {"method": plan.method, "metric": plan.metric, "structure": plan.structure} | plan.settings
    asked = {"plan": chosen, "apply": asdict(options.apply), "eval": options.evaluate.recorded()}
    found = {"ratios": options.ratios} | ({"methods": options.methods} if options.methods else {}) | asked
    return found | ({"heal": asdict(options.heal)} if options.heal else {})
