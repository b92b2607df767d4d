"""The commands of `flap`: parse, call a stage, print. What is heavy is imported inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from flapcli import cli_results as _cli_results  # noqa: F401  registers its commands
from flapcli import cli_sweep as _cli_sweep  # noqa: F401  likewise
from flapcli import options as o
from flapcli.command import RUN, app, bars, command, tell
from flapcli.errors import FlapError, UsageError


def main() -> None:
    app()


@app.callback()
def _global(version: o.Version = False, debug: o.Debug = False) -> None:
    pass


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
    from flapcli.pipeline.calibrate import run_calibrate
    from flapcli.pipeline.common import CalibrateOptions, Compute, Scale, default_text, is_writer
    from flapcli.presets import preset_of

    chosen = preset_of(preset)
    text = chosen.text(dataset, default_text(model), nsamples)
    wanted = CalibrateOptions(
        text, nsamples, seqlen, seed, dtype, gram or chosen.gram, text_column, gram_dtype, fisher or chosen.fisher
    )
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
    dtype: o.RunDtype = "auto",
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
    if report.task_failures:
        failed = ", ".join(report.task_failures)
        raise FlapError(f"not every task could be run ({failed}); the other results are in {path}")


@command
def run(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    ratio: o.RatioOption = None,
    preset: o.Preset = "paper",
    method: o.MethodOption = "flap",
    metric: o.MetricOption = None,
    structure: o.StructureOption = None,
    remove_heads: o.RemoveHeads = None,
    round_to: o.RoundTo = 1,
    heads_multiple_of: o.HeadsMultiple = 1,
    allow_empty: o.AllowEmpty = False,
    attention_exponent: o.Exponent = None,
    target_params: o.TargetParams = None,
    target_size: o.TargetSize = None,
    compensate: o.CompensateOption = None,
    ridge: o.Ridge = None,
    bias: o.LstsqBias = None,
    sequential: o.Sequential = None,
    mask_only: o.MaskOnly = False,
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
    speed: o.Speed = False,
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
    """Calibrate, plan, apply and eval in one go, skipping what is up to date."""
    from flapcli.pipeline.apply import ApplyOptions
    from flapcli.pipeline.common import several_processes
    from flapcli.presets import preset_of
    from flapcli.target import target_of

    if several_processes():
        raise UsageError("of all commands only calibrate runs under torchrun; the others take its statistics")
    chosen = preset_of(preset, method)
    fitted, with_bias, in_turn = chosen.compensation(compensate, bias, sequential)
    ApplyOptions(fitted, ridge, sequential=in_turn).check()
    counted = store_dtype if target_size else None
    target = target_of(ratio, target_params, target_size, counted, None, method)
    if target and mask_only:
        raise UsageError(f"--mask-only leaves the size as it is: leave out {target.option}")
    biases = fitted == "bias" or (fitted == "lstsq" and with_bias)
    gram = gram or fitted == "lstsq"
    shared: dict[str, Any] = {"run_dir": run_dir, "force": force}
    preset_: dict[str, Any] = {"preset": preset}
    hub = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    where = {"batch_size": batch_size, "device": device, "seqlen": seqlen, "text_column": text_column}
    stages: list[tuple[Callable[..., None], dict[str, Any]]] = [
        (calibrate, {"model": model, "dataset": dataset, "nsamples": nsamples, "seed": seed, "dtype": dtype,
                     "gram": gram, "gram_dtype": gram_dtype, "fisher": fisher or metric == "FISHER", "stream": stream}
         | preset_ | where | hub),
        (plan, preset_ | {"ratio": ratio, "method": method, "metric": metric, "structure": structure,
                "remove_heads": remove_heads, "round_to": round_to, "heads_multiple_of": heads_multiple_of,
                "allow_empty": allow_empty, "attention_exponent": attention_exponent,
                "target_params": target_params, "target_size": target_size,
                "dtype": counted, "target_biases": biases if target and compensate else None}),
        (apply, preset_ | {"compensate": compensate, "ridge": ridge, "bias": bias, "mask_only": mask_only,
                 "remote_code": remote_code, "max_shard_size": max_shard_size, "dtype": store_dtype,
                 "sequential": sequential, "batch_size": batch_size, "device": device} | hub),
        (eval_, {"checkpoint": "", "perplexity": perplexity, "baseline": baseline, "stream": stream,
                 "dtype": eval_dtype, "tasks": tasks, "include_path": include_path, "limit": limit, "speed": speed}
         | where | hub),
    ]  # fmt: skip
    from flapcli import console
    from flapcli.show import inspect

    with console.silent_stdout(as_json):
        for stage, own in stages:
            stage(**shared, **own)
    if as_json:
        console.data({name: value for name, value, _ in inspect(run_dir)})


@command
def show(
    path: Path = typer.Argument(RUN, metavar="[DIR|FILE]", help="Run folder, stats, plan, checkpoint or eval.json."),
    plot: o.Plot = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say what is in a run, a stats file, a plan, a checkpoint or an eval.json."""
    from flapcli import console
    from flapcli.show import inspect

    found = inspect(path)
    if plot:
        from flapcli.report.plots import save_picture

        save_picture(path, plot)
        console.note(f"{plot}: written")
    if as_json:
        console.data({name: value for name, value, _ in found})
        return
    for _, _, draw in found:
        getattr(console, draw[0])(*draw[1:])


@command
def families(as_json: o.Json = False, debug: o.Debug = False) -> None:
    """List the model families that flap prunes."""
    from flapcli import console
    from flapcli.families import families as known

    rows = [
        {"family": f.name, "covers": f.covers, "model_type": f.model_type, "architecture": f.architecture}
        for f in known().values()
    ]
    console.data(rows) if as_json else console.show_families(rows)
