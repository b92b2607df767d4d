"""`flap run`. What is heavy is imported inside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from flapcli import options as o
from flapcli.cli_stages import apply, calibrate, eval_, plan
from flapcli.command import RUN, command
from flapcli.errors import UsageError


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
    from flapcli.allocate import Request
    from flapcli.choose import checked, needed
    from flapcli.evaluate.suite import expand
    from flapcli.pipeline.apply import ApplyOptions
    from flapcli.pipeline.common import refuse_several_processes
    from flapcli.pipeline.evaluate import EvalOptions
    from flapcli.presets import adds_bias, preset_of
    from flapcli.target import target_of

    refuse_several_processes()
    chosen = preset_of(preset, method)
    fitted, with_bias, in_turn = chosen.compensation(compensate, bias, sequential)
    ApplyOptions(fitted, ridge, with_bias, sequential=in_turn, max_shard_size=max_shard_size).check()
    EvalOptions(
        tuple(perplexity or ()), seqlen, tasks=expand(tasks) if tasks is not None else (), limit=limit,
        include_path=str(include_path) if include_path else None,
    ).check()  # fmt: skip
    share = 0.2 if ratio is None else ratio
    request = Request("", share, remove_heads, round_to, heads_multiple_of, allow_empty)
    checked(method, metric or chosen.metric, structure or chosen.structure, request, attention_exponent)
    counted = store_dtype if target_size else None
    target = target_of(ratio, target_params, target_size, counted, None, method)
    if target and mask_only:
        raise UsageError(f"--mask-only leaves the size as it is: leave out {target.option}")
    gram, fisher = needed(metric, compensate, gram, fisher)  # what the preset needs, calibrate sees itself
    shared: dict[str, Any] = {"run_dir": run_dir, "force": force}
    preset_: dict[str, Any] = {"preset": preset}
    hub = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    where = {"batch_size": batch_size, "device": device, "seqlen": seqlen, "text_column": text_column}
    stages: list[tuple[Callable[..., None], dict[str, Any]]] = [
        (calibrate, {"model": model, "dataset": dataset, "nsamples": nsamples, "seed": seed, "dtype": dtype,
                     "gram": gram, "gram_dtype": gram_dtype, "fisher": fisher, "stream": stream}
         | preset_ | where | hub),
        (plan, preset_ | {"ratio": ratio, "method": method, "metric": metric, "structure": structure,
                "remove_heads": remove_heads, "round_to": round_to, "heads_multiple_of": heads_multiple_of,
                "allow_empty": allow_empty, "attention_exponent": attention_exponent,
                "target_params": target_params, "target_size": target_size,
                "dtype": counted, "target_biases": adds_bias(fitted, with_bias) if target and fitted else None}),
        (apply, preset_ | {"compensate": compensate, "ridge": ridge, "bias": bias, "mask_only": mask_only,
                 "remote_code": remote_code, "max_shard_size": max_shard_size, "dtype": store_dtype,
                 "sequential": sequential, "batch_size": batch_size, "device": device} | hub),
        (eval_, {"checkpoint": "", "perplexity": perplexity, "baseline": baseline, "stream": stream,
                 "dtype": eval_dtype, "tasks": tasks, "include_path": include_path, "limit": limit, "speed": speed}
         | where | hub),
    ]  # fmt: skip
    _go([(stage, shared | own) for stage, own in stages], run_dir, as_json)


def _go(stages: Sequence[tuple[Callable[..., None], dict[str, Any]]], run_dir: Path, as_json: bool) -> None:
    """Run the stages; as JSON, tell what the run folder then holds, also where only a task could not be run."""
    from flapcli import console
    from flapcli.show import inspect

    failed: typer.Exit | None = None
    with console.silent_stdout(as_json):
        for stage, options in stages:
            try:
                stage(**options)
            except typer.Exit as end:
                if stage is not eval_ or not (run_dir / "eval.json").exists():
                    raise
                failed = end
    if as_json:
        console.data({name: value for name, value, _ in inspect(run_dir)})
    if failed:
        raise failed
