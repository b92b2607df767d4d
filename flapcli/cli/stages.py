"""The four stages as commands: parse, call a stage, print. What is heavy is imported inside."""

from typing import Annotated

from flapcli.cli import options as o
from flapcli.cli.command import RUN, command, not_run, printing_unfinished, tell
from flapcli.errors import only_with
from flapcli.execution.settings import Execution
from flapcli.views.display import Display


@command("calibrate")
def calibrate(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    out: o.Out = None,
    *,
    calibration: o.CalibrationGroup,
    windows: o.WindowGroup,
    preset: o.Preset = "paper",
    attention_unit: o.AttentionUnit = None,
    execution: o.ExecutionGroup,
    stream: o.Stream = None,
    scale: o.ScaleGroup,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Measure how much every channel fluctuates on a text -> DIR/stats.safetensors.

    Killed, it goes on where it stopped when run again. Several processes share the windows:
    torchrun --nproc-per-node 2 -m flapcli calibrate ...
    """
    from flapcli.execution.processes import is_writer

    path = out or run_dir / "stats.safetensors"
    with Display("calibrate", shown=is_writer()) as display:
        from flapcli.calibration import stage
        from flapcli.cli.resolve import Asked, execution_of, hub_of, resolve

        asked = Asked(model, preset, windows=windows, calibration=calibration, attention_unit=attention_unit)
        options, how = resolve(asked).calibrate, execution_of(execution, stream, scale=scale)
        header, cached = stage.calibrate(model, path, options, hub_of(hub), how, force, display)
    if is_writer():
        tell(path, header, cached, as_json, display.took)


@command("plan")
def plan(
    run_dir: o.Run = RUN,
    stats: o.StatsFile = None,
    out: o.Out = None,
    preset: o.Preset = "paper",
    *,
    units: o.UnitGroup,
    amount: o.AmountGroup,
    dtype: o.TargetDtype = None,
    target_biases: o.TargetBiases = None,
    attention_unit: o.AttentionUnit = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Choose which heads and neurons stay -> DIR/plan.yaml, to read and to edit."""
    path, statistics = out or run_dir / "plan.yaml", stats or run_dir / "stats.safetensors"
    with Display("plan") as display:
        from flapcli.cli.resolve import Asked, resolve
        from flapcli.planning import stage

        asked = Asked(
            preset=preset, units=units, amount=amount, target_dtype=dtype, target_biases=target_biases,
            attention_unit=attention_unit,
        )  # fmt: skip
        made, cached = stage.plan(statistics, path, resolve(asked).plan, force, display)
    tell(path, made, cached, as_json, display.took)


@command("apply")
def apply(
    run_dir: o.Run = RUN,
    plan: o.PlanFile = None,
    stats: o.StatsFile = None,
    model: o.DenseModel = None,
    out: o.Out = None,
    preset: o.Preset = "paper",
    *,
    compensation: o.CompensationGroup,
    mask_only: o.MaskOnly = False,
    dtype: o.StoreDtype = None,
    execution: o.ExecutionGroup,
    rank_timeout: o.RankTimeout = Execution.rank_timeout,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Cut the checkpoint down to the plan, tensor by tensor -> DIR/pruned/.

    --batch-size is for --sequential, which runs in the type of the calibration. Several processes share the solves of
    --compensate lstsq: torchrun --nproc-per-node 2 -m flapcli apply ...
    """
    from flapcli.execution.processes import is_writer

    path = out or run_dir / "pruned"
    with Display("apply", shown=is_writer()) as display:
        from flapcli.cli.resolve import Asked, execution_of, hub_of, resolve
        from flapcli.pruning import stage

        asked = Asked(preset=preset, compensation=compensation, mask_only=mask_only, store_dtype=dtype)
        inputs, scale = stage.ApplyInputs(stats, model, hub_of(hub)), o.ScaleGroup(rank_timeout=rank_timeout)
        how = execution_of(execution, scale=scale)
        plan = plan or run_dir / "plan.yaml"
        folder, cached = stage.apply(plan, path, resolve(asked).apply, inputs, how, force, display)
    if is_writer():
        tell(path, folder, cached, as_json, display.took)


@command("eval")
def eval_(
    checkpoint: Annotated[str, o.Checkpoint(help="What to measure.")] = "",
    run_dir: o.Run = RUN,
    model: o.DenseModel = None,
    out: o.Out = None,
    *,
    evaluation: o.EvaluationGroup,
    windows: o.WindowGroup,
    divergence: o.Divergence = False,
    num_fewshot: o.NumFewshot = None,
    cache_requests: o.CacheRequests = False,
    speed: o.Speed = False,
    timing: o.SpeedGroup,
    threads: o.Threads = None,
    dtype: o.EvalDtype = "auto",
    execution: o.ExecutionGroup,
    stream: o.Stream = None,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Measure a checkpoint, and the dense model beside it -> DIR/eval.json."""
    only_with("--tasks", evaluation.tasks is not None, {"--cache-requests": cache_requests})
    path, name = out or run_dir / "eval.json", checkpoint or run_dir / "pruned"
    with printing_unfinished(as_json), Display("eval") as display:
        from flapcli.cli.resolve import Asked, execution_of, hub_of, resolve, speed_of
        from flapcli.evaluation import stage

        asked = Asked(
            windows=windows, evaluation=evaluation, eval_dtype=dtype, num_fewshot=num_fewshot,
            speed=speed_of(speed, timing, threads), divergence=divergence,
        )  # fmt: skip
        how = execution_of(execution, stream, threads, cache_requests)
        options = resolve(asked).evaluate
        report, cached = stage.evaluate(name, path, options, model, hub_of(hub), how, force, display)
    tell(path, report, cached, as_json, display.took)
    if report.all_failures:
        raise not_run(report.all_failures, path)
