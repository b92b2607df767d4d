"""`flap sweep`. What is heavy is imported inside."""

from flapcli.cli import options as o
from flapcli.cli import values
from flapcli.cli.command import RUN, command, not_run, printing_unfinished, tell
from flapcli.cli.heal_options import HealTokens
from flapcli.views import terminal
from flapcli.views.display import Display


@command("sweep")
def sweep(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    ratios: o.Ratios = "0.1,0.2,0.3,0.5",
    methods: o.Methods = None,
    keep: o.Keep = False,
    preset: o.Preset = "paper",
    *,
    units: o.UnitGroup,
    attention_unit: o.AttentionUnit = None,
    compensation: o.CompensationGroup,
    heal_tokens: HealTokens = None,
    store_dtype: o.StoreDtypeOfRun = None,
    calibration: o.CalibrationGroup,
    windows: o.WindowGroup,
    evaluation: o.EvaluationGroup,
    eval_dtype: o.EvalDtypeOfRun = "auto",
    execution: o.ExecutionGroup,
    stream: o.Stream = None,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Plan, apply and eval several ratios from one calibration -> DIR/sweep.json and DIR/sweep/.

    Perplexity over size as a table and a plot, drawn to DIR/sweep/sweep.svg too. Interrupted, it goes on where it
    stopped. Each ratio's plan and evaluation stay in DIR/sweep/RATIO/. Calibrate keeps what metric and compensation
    need, untold. With --methods the table of the paper, printed and as DIR/sweep/table.csv and table.tex.
    """
    from flapcli.execution.processes import refuse_several_processes

    refuse_several_processes()
    wanted, compared = values.ratios(ratios), values.methods(methods)
    with printing_unfinished(as_json), Display("sweep") as display:
        from flapcli import sweep as stage
        from flapcli.artifacts.run_dir import RunDir
        from flapcli.cli.resolve import Asked, execution_of, hub_of, resolve

        asked = Asked(
            model, preset, windows, calibration, units, compensation=compensation, store_dtype=store_dtype,
            evaluation=evaluation, eval_dtype=eval_dtype, lean=True, attention_unit=attention_unit,
            heal_tokens=heal_tokens,
        )  # fmt: skip
        stages = resolve(asked)
        options = stage.SweepOptions(
            wanted, stages.calibrate, stages.plan, stages.apply, stages.evaluate, keep, compared, stages.heal
        )
        run, how = RunDir(run_dir), execution_of(execution, stream)
        made, failed = stage.sweep(run, model, options, hub_of(hub), how, force, display)
        display.doing("drawing")
        from flapcli.views.paper_table import save_tables
        from flapcli.views.plots import save_sweep_picture

        save_sweep_picture(made, run_dir / "sweep" / "sweep.svg")
        tables = save_tables(made, run_dir / "sweep") if compared else []
    tell(run.sweep, made, False, as_json, display.took)
    for path in tables:
        terminal.note(f"{path}: written")
    if failed:
        raise not_run(failed, run.sweep)
