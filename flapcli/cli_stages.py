"""The four stages as commands: parse, call a stage, print. What is heavy is imported inside."""

import typer

from flapcli import options as o
from flapcli.command import RUN, bars, command, tell
from flapcli.errors import FlapError, only_with


@command
def calibrate(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    out: o.Out = None,
    dataset: o.Dataset = None,
    text_column: o.TextColumn = "text",
    nsamples: o.Nsamples = 1024,
    seqlen: o.Seqlen = 128,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = "auto",
    device: o.Device = "auto",
    dtype: o.RunDtype = "auto",
    preset: o.Preset = "paper",
    gram: o.Gram = False,
    gram_dtype: o.GramDtypeOption = "float32",
    fisher: o.Fisher = False,
    stream: o.Stream = None,
    activation_memory: o.ActivationMemory = "8GB",
    device_map: o.DeviceMap = None,
    rank_timeout: o.RankTimeout = 60,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure how much every channel fluctuates on a text -> DIR/stats.safetensors.

    Killed, it goes on where it stopped when run again. Several processes share the windows:
    torchrun --nproc-per-node 2 -m flapcli calibrate ...
    """
    from flapcli.checkpoint import Hub
    from flapcli.choose import needed
    from flapcli.pipeline.calibrate import run_calibrate
    from flapcli.pipeline.common import CalibrateOptions, Compute, Scale, default_text, is_writer
    from flapcli.presets import preset_of

    chosen = preset_of(preset)
    text, nsamples = chosen.text(dataset, default_text(model), nsamples)
    gram, fisher = needed(chosen.metric, chosen.compensate, gram, fisher)
    wanted = CalibrateOptions(text, nsamples, seqlen, seed, dtype, gram, text_column, gram_dtype, fisher)
    scale = Scale(stream, activation_memory, device_map, rank_timeout)
    path = out or run_dir / "stats.safetensors"
    hub = Hub(revision, cache_dir, trust_remote_code)
    compute = Compute(device, o.batch(batch_size))
    header, cached = run_calibrate(path, model, hub, wanted, compute, force, bars(), scale)
    if is_writer():
        tell(path, cached, as_json, header.model_dump(), "show_stats", header)


@command
def plan(
    run_dir: o.Run = RUN,
    stats: o.StatsFile = None,
    out: o.Out = None,
    preset: o.Preset = "paper",
    method: o.MethodOption = "flap",
    metric: o.MetricOption = None,
    structure: o.StructureOption = None,
    ratio: o.RatioOption = None,
    remove_heads: o.RemoveHeads = None,
    round_to: o.RoundTo = 1,
    heads_multiple_of: o.HeadsMultiple = 1,
    allow_empty: o.AllowEmpty = False,
    attention_exponent: o.Exponent = None,
    target_params: o.TargetParams = None,
    target_size: o.TargetSize = None,
    dtype: o.TargetDtype = None,
    target_biases: o.TargetBiases = None,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Choose which heads and neurons stay -> DIR/plan.yaml, to read and to edit."""
    from flapcli.allocate import Request
    from flapcli.pipeline.plan import run_plan
    from flapcli.presets import preset_of
    from flapcli.target import target_of

    path, chosen = out or run_dir / "plan.yaml", preset_of(preset, method)
    if target_params or target_size:
        target_biases = chosen.adds_bias if target_biases is None else target_biases
    target = target_of(ratio, target_params, target_size, dtype, target_biases, method)
    share = 0.2 if ratio is None else ratio
    request = Request(structure or "", share, remove_heads, round_to, heads_multiple_of, allow_empty)
    made, cached = run_plan(
        path, stats or run_dir / "stats.safetensors", method, metric or chosen.metric, request,
        structure or chosen.structure, attention_exponent, force, target,
    )  # fmt: skip
    tell(path, cached, as_json, made.model_dump(exclude_none=True), "show_plan", made)


@command
def apply(
    run_dir: o.Run = RUN,
    plan: o.PlanFile = None,
    stats: o.StatsFile = None,
    model: o.DenseModel = None,
    out: o.Out = None,
    preset: o.Preset = "paper",
    compensate: o.CompensateOption = None,
    ridge: o.Ridge = None,
    bias: o.LstsqBias = None,
    sequential: o.Sequential = None,
    mask_only: o.MaskOnly = False,
    remote_code: o.RemoteCode = "auto",
    dtype: o.StoreDtype = None,
    max_shard_size: o.MaxShardSize = "5GB",
    batch_size: o.BatchSize = "auto",
    device: o.Device = "auto",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Cut the checkpoint down to the plan, tensor by tensor -> DIR/pruned/.

    --batch-size and --device are for --sequential, which runs in the type of the calibration.
    """
    from flapcli.checkpoint import Hub
    from flapcli.pipeline.apply import ApplyOptions, run_apply
    from flapcli.pipeline.common import Compute
    from flapcli.presets import PRESETS

    path = out or run_dir / "pruned"
    compensate, bias, sequential = PRESETS[preset].compensation(compensate, bias, sequential)
    config, cached = run_apply(
        path, plan or run_dir / "plan.yaml", stats, model, Hub(revision, cache_dir, trust_remote_code),
        ApplyOptions(compensate, ridge, bias, mask_only, remote_code, dtype, max_shard_size, sequential), force, bars(),
        Compute(device, o.batch(batch_size)),
    )  # fmt: skip
    tell(path, cached, as_json, config, "show_folder", config, str(path))


@command
def eval_(
    checkpoint: str = typer.Argument("", metavar="[CHECKPOINT]", help="What to measure [default: DIR/pruned]."),
    run_dir: o.Run = RUN,
    model: o.DenseModel = None,
    out: o.Out = None,
    perplexity: o.Perplexity = None,
    seqlen: o.Seqlen = 128,
    text_column: o.TextColumn = "text",
    tasks: o.Tasks = None,
    include_path: o.IncludePath = None,
    limit: o.Limit = None,
    num_fewshot: o.NumFewshot = None,
    cache_requests: o.CacheRequests = False,
    speed: o.Speed = False,
    speed_batch_sizes: o.SpeedBatchSizes = "1",
    speed_lengths: o.SpeedLengths = "128",
    speed_new_tokens: o.SpeedNewTokens = 16,
    speed_rounds: o.SpeedRounds = 5,
    threads: o.Threads = None,
    stream: o.Stream = None,
    baseline: o.Baseline = True,
    batch_size: o.BatchSize = "auto",
    device: o.Device = "auto",
    dtype: o.EvalRunDtype = "auto",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure a checkpoint, and the dense model beside it -> DIR/eval.json."""
    from flapcli.checkpoint import Hub
    from flapcli.evaluate.suite import expand
    from flapcli.pipeline.common import Compute
    from flapcli.pipeline.evaluate import EvalOptions, SpeedSettings, run_eval

    path = out or run_dir / "eval.json"
    only_with("--tasks", tasks is not None, {"--cache-requests": cache_requests})
    only_with("--speed", speed, {
        "--speed-batch-sizes": speed_batch_sizes != "1", "--speed-lengths": speed_lengths != "128",
        "--speed-new-tokens": speed_new_tokens != 16, "--speed-rounds": speed_rounds != 5,
    })  # fmt: skip
    timed = SpeedSettings(
        o.numbers(speed_batch_sizes, "--speed-batch-sizes"), o.numbers(speed_lengths, "--speed-lengths"),
        speed_new_tokens, speed_rounds, threads,
    )  # fmt: skip
    wanted = EvalOptions(
        tuple(perplexity or ()), seqlen, dtype, baseline, text_column, expand(tasks) if tasks is not None else (),
        str(include_path) if include_path else None, limit, num_fewshot, timed if speed else None,
    )  # fmt: skip
    report, cached = run_eval(
        path, checkpoint or str(run_dir / "pruned"), model, Hub(revision, cache_dir, trust_remote_code),
        wanted, Compute(device, o.batch(batch_size), threads, stream), force, bars(), cache_requests,
    )  # fmt: skip
    tell(path, cached, as_json, report.model_dump(), "show_report", report)
    if report.all_failures:
        failed = ", ".join(report.all_failures)
        raise FlapError(f"not every task could be run ({failed}); the other results are in {path}")
