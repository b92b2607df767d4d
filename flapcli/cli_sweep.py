"""`flap sweep`. What is heavy is imported inside."""

from flapcli import options as o
from flapcli.command import RUN, bars, command, tell
from flapcli.errors import FlapError


@command
def sweep(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    ratios: o.Ratios = "0.1,0.2,0.3,0.5",
    keep: o.Keep = False,
    preset: o.Preset = "paper",
    method: o.MethodOption = "flap",
    metric: o.MetricOption = None,
    structure: o.StructureOption = None,
    remove_heads: o.RemoveHeads = None,
    round_to: o.RoundTo = 1,
    heads_multiple_of: o.HeadsMultiple = 1,
    allow_empty: o.AllowEmpty = False,
    attention_exponent: o.Exponent = None,
    compensate: o.CompensateOption = None,
    ridge: o.Ridge = None,
    bias: o.LstsqBias = None,
    sequential: o.Sequential = None,
    remote_code: o.RemoteCode = "auto",
    store_dtype: o.StoreDtypeOfRun = None,
    max_shard_size: o.MaxShardSize = "5GB",
    dataset: o.Dataset = None,
    text_column: o.TextColumn = "text",
    nsamples: o.Nsamples = 1024,
    seqlen: o.Seqlen = 128,
    seed: o.Seed = 0,
    gram: o.Gram = False,
    gram_dtype: o.GramDtypeOption = "float32",
    fisher: o.Fisher = False,
    stream: o.Stream = None,
    perplexity: o.Perplexity = None,
    tasks: o.Tasks = None,
    include_path: o.IncludePath = None,
    limit: o.Limit = None,
    baseline: o.Baseline = True,
    batch_size: o.BatchSize = "auto",
    device: o.Device = "auto",
    dtype: o.RunDtype = "auto",
    eval_dtype: o.EvalDtype = "auto",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Plan, apply and eval several ratios from one calibration -> DIR/sweep.json and DIR/sweep/.

    Perplexity over size as a table and a plot, drawn to DIR/sweep/sweep.svg too. Interrupted, it goes on where it
    stopped. Each ratio's plan and evaluation stay in DIR/sweep/RATIO/. Calibrate keeps what metric and compensation
    need, untold.
    """
    from flapcli.allocate import Request
    from flapcli.checkpoint import Hub
    from flapcli.choose import needed
    from flapcli.evaluate.suite import expand
    from flapcli.pipeline.apply import ApplyOptions
    from flapcli.pipeline.common import CalibrateOptions, Compute, Scale, default_text, refuse_several_processes
    from flapcli.pipeline.evaluate import EvalOptions
    from flapcli.pipeline.sweep import SweepOptions, run_sweep
    from flapcli.presets import preset_of
    from flapcli.report.sweep import save_sweep_picture
    from flapcli.rundir import RunDir

    refuse_several_processes()
    wanted = o.ratios(ratios)
    chosen = preset_of(preset, method)
    metric, structure = metric or chosen.metric, structure or chosen.structure
    compensate, bias, sequential = chosen.compensation(compensate, bias, sequential)
    gram, fisher = needed(metric, compensate, gram, fisher)
    text, nsamples = chosen.text(dataset, default_text(model), nsamples)
    options = SweepOptions(
        wanted, method, metric, structure, attention_exponent,
        Request("", wanted[0], remove_heads, round_to, heads_multiple_of, allow_empty),
        ApplyOptions(compensate, ridge, bias, False, remote_code, store_dtype, max_shard_size, sequential),
        EvalOptions(
            tuple(perplexity or ()), seqlen, eval_dtype, baseline, text_column,
            expand(tasks) if tasks is not None else (), str(include_path) if include_path else None, limit,
        ),
        keep,
    )  # fmt: skip
    run = RunDir(run_dir)
    made, failed = run_sweep(
        run, model, Hub(revision, cache_dir, trust_remote_code),
        CalibrateOptions(text, nsamples, seqlen, seed, dtype, gram, text_column, gram_dtype, fisher), options,
        Compute(device, o.batch(batch_size), stream=stream), Scale(stream), force, bars(),
    )  # fmt: skip
    save_sweep_picture(made, run_dir / "sweep" / "sweep.svg")
    tell(run.sweep, False, as_json, made.model_dump(), "show_sweep", made)
    if failed:
        raise FlapError(f"not every task could be run ({', '.join(failed)}); the other results are in {run.sweep}")
