"""`flap estimate`. What is heavy is imported inside."""

from dataclasses import asdict

from flapcli.cli import options as o
from flapcli.cli.command import RUN, command
from flapcli.progress import IMPORTING
from flapcli.views import terminal
from flapcli.views.display import Display


@command("estimate")
def estimate(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    preset: o.PresetOfRun = None,
    *,
    amount: o.AmountGroup,
    units: o.UnitGroup,
    attention_unit: o.AttentionUnit = None,
    compensation: o.CompensationGroup,
    store_dtype: o.StoreDtypeOfRun = None,
    calibration: o.CalibrationGroup,
    windows: o.WindowGroup,
    evaluation: o.EvaluationGroup,
    eval_dtype: o.EvalDtypeOfRun = "auto",
    execution: o.ExecutionGroup,
    stream: o.Stream = None,
    scale: o.ScaleGroup,
    hub: o.HubGroup,
    as_json: o.Json = False,
) -> None:
    """Say what `flap run` with these options would take: memory, disk, bytes read and time of every stage.

    From headers alone (of a model on the hub only these are read). Times are by what this machine multiplies and writes
    in a second just now; tasks and --speed are not in them.
    """
    from tempfile import TemporaryDirectory

    with Display("estimate") as display, TemporaryDirectory() as scratch:
        from pathlib import Path

        from flapcli.checkpoints import open_checkpoint
        from flapcli.checkpoints.hub_headers import with_headers
        from flapcli.cli.resolve import Asked, execution_of, hub_of, resolve

        stages = resolve(Asked(
            model, preset, windows, calibration, units, amount, store_dtype if amount.target_size else None, None,
            compensation, False, store_dtype, evaluation, eval_dtype, attention_unit=attention_unit,
        ))  # fmt: skip
        how = execution_of(execution, stream, scale=scale)
        display.doing(f"reading the headers of {model}")
        checkpoint = open_checkpoint(with_headers(model, hub_of(hub), Path(scratch)), hub_of(hub))
        checkpoint.attention_unit = attention_unit
        checkpoint.prefers_query_heads = stages.calibrate.prefers_query_heads
        display.doing(IMPORTING)
        from flapcli.estimation.estimate import estimate as estimated

        display.doing("multiplying and writing, to see how fast")
        found = estimated(checkpoint, stages, how, run_dir, model)
    if as_json:
        terminal.data(asdict(found))
    else:
        from flapcli.views.tables import show_estimate

        show_estimate(found)
