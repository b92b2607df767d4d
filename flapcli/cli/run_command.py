"""`flap run`: the stages in one go. What is heavy is imported inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapcli.cli import options as o
from flapcli.cli.command import RUN, command, not_run, note_of, print_made
from flapcli.cli.heal_options import HealMinutes
from flapcli.errors import UnfinishedError, UsageError, only_with
from flapcli.views import terminal
from flapcli.views.display import Display

if TYPE_CHECKING:
    from flapcli.checkpoints import Hub
    from flapcli.cli.resolve import Stages
    from flapcli.execution.settings import Execution

COUNTS = {3: "three", 4: "four", 5: "five"}


@command("run")
def run(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    preset: o.PresetOfRun = None,
    *,
    amount: o.AmountGroup,
    units: o.UnitGroup,
    attention_unit: o.AttentionUnit = None,
    compensation: o.CompensationGroup,
    mask_only: o.MaskOnly = False,
    heal_minutes: HealMinutes = None,
    store_dtype: o.StoreDtypeOfRun = None,
    calibration: o.CalibrationGroup,
    windows: o.WindowGroup,
    evaluates: o.EvaluateInRun = True,
    evaluation: o.EvaluationGroup,
    divergence: o.Divergence = False,
    speed: o.Speed = False,
    eval_dtype: o.EvalDtypeOfRun = "auto",
    execution: o.ExecutionGroup,
    stream: o.Stream = None,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Calibrate, plan, apply and eval in one go, skipping what is up to date; with --heal-minutes, heal before eval."""
    from flapcli.execution.processes import refuse_several_processes

    refuse_several_processes()
    with Display("run") as display:
        from flapcli.artifacts.eval_report import EVAL
        from flapcli.artifacts.pruned_folder import check_not_source
        from flapcli.artifacts.run_dir import RunDir, hold
        from flapcli.cli.resolve import Asked, execution_of, hub_of, resolve
        from flapcli.evaluation.stage import check_tasks
        from flapcli.execution.settings import SpeedOptions

        how = execution_of(execution, stream)
        stages = resolve(Asked(
            model, preset, windows, calibration, units, amount, store_dtype if amount.target_size else None, None,
            compensation, mask_only, store_dtype, evaluation, eval_dtype, speed=SpeedOptions() if speed else None,
            divergence=divergence, attention_unit=attention_unit, heal_minutes=heal_minutes,
        ))  # fmt: skip
        stages.check(how)
        _refuse_with_zeros(stages)
        check_not_source(RunDir(run_dir).pruned, model)
        if evaluates:
            check_tasks(stages.evaluate, EVAL.find(RunDir(run_dir).eval), display)
        else:
            _refuse_of_eval(evaluation, speed, divergence)
    with hold(RunDir(run_dir).stats):
        failed = _go(run_dir, model, stages, hub_of(hub), how, force, not as_json, evaluates)
    if as_json:
        from flapcli.views.contents import data_of, inspect

        unsaved = {"eval": failed.made.model_dump()} if isinstance(failed, UnfinishedError) else {}
        terminal.data(data_of(inspect(run_dir)) | unsaved)
    if failed:
        raise failed
    terminal.note(f"all {COUNTS[len(_names(stages, evaluates))]} stages: {terminal.duration(display.took)}")


def _refuse_of_eval(evaluation: o.EvaluationGroup, speed: bool, divergence: bool) -> None:
    tasks, texts = evaluation.tasks is not None, bool(evaluation.perplexity)
    given = {"--perplexity": texts, "--tasks": tasks, "--speed": speed, "--divergence": divergence}
    only_with("--eval", False, given)


def _refuse_with_zeros(stages: "Stages") -> None:
    """Raise UsageError for what --mask-only, where it was given, does not go with."""
    if not stages.apply.mask_only:
        return
    if stages.heal:
        raise UsageError("--mask-only leaves zeros, which training would fill: leave out --heal-minutes")
    if stages.plan.target:
        raise UsageError(f"--mask-only leaves the size as it is: leave out {stages.plan.target.option}")


def _names(stages: "Stages", evaluates: bool) -> list[str]:
    """Of the stages that run."""
    return ["calibrate", "plan", "apply", *(["heal"] if stages.heal else []), *(["eval"] if evaluates else [])]


def _go(
    run_dir: Path, model: str, stages: "Stages", hub: "Hub", execution: "Execution", force: bool, draws: bool,
    evaluates: bool,
) -> Exception | None:  # fmt: skip
    """Run the stages, each drawn as it ends; returns what was wrong with the last, where eval.json is there anyway."""
    from flapcli.artifacts.run_dir import RunDir
    from flapcli.calibration.stage import calibrate
    from flapcli.evaluation.stage import evaluate
    from flapcli.healing.stage import HealInputs, heal
    from flapcli.planning.stage import plan
    from flapcli.pruning.stage import ApplyInputs, apply
    from flapcli.views.tables import show_end

    def ended(path: Path, made: Any, cached: bool) -> None:
        if draws:
            print_made(made, as_json=False)
        note_of(path, cached, display.took)

    run, names = RunDir(run_dir), _names(stages, evaluates)

    def display_of(stage: str) -> Display:
        return Display(f"[{names.index(stage) + 1}/{len(names)}] {stage}")

    with display_of("calibrate") as display:
        found = calibrate(model, run.stats, stages.calibrate, hub, execution, force, display)
    ended(run.stats, *found)
    others = run.plan.exists()
    with display_of("plan") as display:
        made = plan(run.stats, run.plan, stages.plan, force, display)
    ended(run.plan, *made)
    if others and not (made[1] or force):
        terminal.note(f"{run_dir} held another plan: its results are replaced; -d with another folder would keep both")
    with display_of("apply") as display:
        folder, cached = apply(run.plan, run.pruned, stages.apply, ApplyInputs(hub=hub), execution, force, display)
    ended(run.pruned, folder, cached)
    if stages.heal:
        with display_of("heal") as display:
            healed, cached = heal(run.pruned, run.healed, stages.heal, HealInputs(hub=hub), execution, force, display)
        if healed:
            ended(run.healed, healed, cached)
            folder = healed
    if not evaluates:
        if draws:
            show_end(made[0], folder, run_dir)
        return None
    try:
        with display_of("eval") as display:
            report, cached = evaluate(folder.path, run.eval, stages.evaluate, None, hub, execution, force, display)
    except UnfinishedError as error:
        if draws:
            print_made(error.made, as_json=False)
        return error
    except Exception as error:
        if not run.eval.exists():
            raise
        return error
    ended(run.eval, report, cached)
    if draws:
        show_end(made[0], folder, run_dir, report)
    return not_run(report.all_failures, run.eval) if report.all_failures else None
