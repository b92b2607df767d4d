"""The commands of `flap`: parse, call a stage, print. What is heavy is imported inside."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import typer

from flapcli import options as o
from flapcli.errors import FlapError, UsageError

app = typer.Typer(
    name="flap",
    help="Make large language models smaller without retraining (FLAP, AAAI 2024). "
    "calibrate -> plan -> apply -> eval, or all of it with run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RUN = Path("flap-run")
P = ParamSpec("P")


def main() -> None:
    app()


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command whose errors are one line on stderr and an exit code of the contract."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if o.debugging():
                raise
            from flapcli import console

            console.error(_describe(error))
            raise typer.Exit(error.exit_code if isinstance(error, FlapError) else 1) from error

    return app.command(name=function.__name__.rstrip("_"))(guarded)


def _describe(error: BaseException) -> str:
    if isinstance(error, FlapError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing half-done is left behind (calibrate goes on where it stopped when run again)"
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows where)"


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
    gram: o.Gram = False,
    gram_dtype: o.GramDtypeOption = "float32",
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

    text = dataset or default_text(model)
    wanted = CalibrateOptions(text, nsamples, seqlen, seed, dtype, gram, text_column, gram_dtype)
    scale = Scale(stream, activation_memory, device_map, rank_timeout)
    path = out or run_dir / "stats.safetensors"
    hub = Hub(revision, cache_dir, trust_remote_code)
    compute = Compute(device, _batch(batch_size))
    header, cached = run_calibrate(path, model, hub, wanted, compute, force, _bars(), scale)
    if is_writer():
        _report(path, cached, as_json, header.model_dump(), "show_stats", header)


@command
def plan(
    run_dir: o.Run = RUN,
    stats: o.StatsFile = None,
    out: o.Out = None,
    method: o.MethodOption = "flap",
    metric: o.MetricOption = None,
    structure: o.StructureOption = None,
    ratio: o.RatioOption = 0.2,
    remove_heads: o.RemoveHeads = None,
    round_to: o.RoundTo = 1,
    heads_multiple_of: o.HeadsMultiple = 1,
    allow_empty: o.AllowEmpty = False,
    attention_exponent: o.Exponent = None,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Choose which heads and neurons stay -> DIR/plan.yaml, to read and to edit."""
    from flapcli.allocate import Request
    from flapcli.pipeline.plan import run_plan

    path = out or run_dir / "plan.yaml"
    request = Request(structure or "", ratio, remove_heads, round_to, heads_multiple_of, allow_empty)
    made, cached = run_plan(
        path, stats or run_dir / "stats.safetensors", method, metric, request,
        structure, attention_exponent, force,
    )  # fmt: skip
    _report(path, cached, as_json, made.model_dump(exclude_none=True), "show_plan", made)


@command
def apply(
    run_dir: o.Run = RUN,
    plan: o.PlanFile = None,
    stats: o.StatsFile = None,
    model: o.DenseModel = None,
    out: o.Out = None,
    compensate: o.CompensateOption = None,
    ridge: o.Ridge = 0.01,
    bias: o.LstsqBias = True,
    mask_only: o.MaskOnly = False,
    remote_code: o.RemoteCode = "auto",
    dtype: o.StoreDtype = None,
    max_shard_size: o.MaxShardSize = "5GB",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Cut the checkpoint down to the plan, tensor by tensor -> DIR/pruned/."""
    from flapcli.checkpoint import Hub
    from flapcli.pipeline.apply import ApplyOptions, run_apply

    path = out or run_dir / "pruned"
    config, cached = run_apply(
        path, plan or run_dir / "plan.yaml", stats, model, Hub(revision, cache_dir, trust_remote_code),
        ApplyOptions(compensate, ridge, bias, mask_only, remote_code, dtype, max_shard_size), force, _bars(),
    )  # fmt: skip
    _report(path, cached, as_json, config, "show_folder", config, str(path))


@command
def eval_(
    checkpoint: str = typer.Argument("", metavar="[CHECKPOINT]", help="What to measure [default: DIR/pruned]."),
    run_dir: o.Run = RUN,
    model: o.DenseModel = None,
    out: o.Out = None,
    perplexity: o.Perplexity = None,
    seqlen: o.Seqlen = 128,
    text_column: o.TextColumn = "text",
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
    from flapcli.pipeline.common import Compute
    from flapcli.pipeline.evaluate import EvalOptions, run_eval

    path = out or run_dir / "eval.json"
    wanted = EvalOptions(tuple(perplexity or ()), seqlen, dtype, baseline, text_column)
    report, cached = run_eval(
        path, checkpoint or str(run_dir / "pruned"), model, Hub(revision, cache_dir, trust_remote_code),
        wanted, Compute(device, _batch(batch_size)), force, _bars(),
    )  # fmt: skip
    _report(path, cached, as_json, report.model_dump(), "show_report", report)


@command
def run(
    model: o.Model = "demo",
    run_dir: o.Run = RUN,
    ratio: o.RatioOption = 0.2,
    method: o.MethodOption = "flap",
    metric: o.MetricOption = None,
    structure: o.StructureOption = None,
    remove_heads: o.RemoveHeads = None,
    round_to: o.RoundTo = 1,
    heads_multiple_of: o.HeadsMultiple = 1,
    allow_empty: o.AllowEmpty = False,
    attention_exponent: o.Exponent = None,
    compensate: o.CompensateOption = None,
    ridge: o.Ridge = 0.01,
    bias: o.LstsqBias = True,
    mask_only: o.MaskOnly = False,
    remote_code: o.RemoteCode = "auto",
    max_shard_size: o.MaxShardSize = "5GB",
    dataset: o.Dataset = None,
    text_column: o.TextColumn = "text",
    nsamples: o.Nsamples = 1024,
    seqlen: o.Seqlen = 128,
    seed: o.Seed = 0,
    gram: o.Gram = False,
    gram_dtype: o.GramDtypeOption = "float32",
    stream: o.Stream = None,
    perplexity: o.Perplexity = None,
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
    from flapcli.pipeline.common import several_processes

    if several_processes():
        raise UsageError("of all commands only calibrate runs under torchrun; the others take its statistics")
    shared: dict[str, Any] = {"run_dir": run_dir, "force": force}
    hub = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    where = {"batch_size": batch_size, "device": device, "seqlen": seqlen, "text_column": text_column}
    stages: list[tuple[Callable[..., None], dict[str, Any]]] = [
        (calibrate, {"model": model, "dataset": dataset, "nsamples": nsamples, "seed": seed, "dtype": dtype,
                     "gram": gram, "gram_dtype": gram_dtype, "stream": stream}
         | where | hub),
        (plan, {"ratio": ratio, "method": method, "metric": metric, "structure": structure,
                "remove_heads": remove_heads, "round_to": round_to, "heads_multiple_of": heads_multiple_of,
                "allow_empty": allow_empty, "attention_exponent": attention_exponent}),
        (apply, {"compensate": compensate, "ridge": ridge, "bias": bias, "mask_only": mask_only,
                 "remote_code": remote_code, "max_shard_size": max_shard_size} | hub),
        (eval_, {"checkpoint": "", "perplexity": perplexity, "baseline": baseline, "dtype": eval_dtype}
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
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say what is in a run, a stats file, a plan, a checkpoint or an eval.json."""
    from flapcli import console
    from flapcli.show import inspect

    found = inspect(path)
    if as_json:
        console.data({name: value for name, value, _ in found})
        return
    for _, _, draw in found:
        getattr(console, draw[0])(*draw[1:])


@command
def push(
    repo: str = typer.Argument(metavar="REPO", help="USER/NAME on the hub; created where it is not there."),
    checkpoint: Path | None = typer.Argument(None, metavar="[CHECKPOINT]", help="Pruned folder [default: DIR/pruned]."),
    run_dir: o.Run = RUN,
    private: bool = typer.Option(False, "--private", help="Create it as a private repository."),
    debug: o.Debug = False,
) -> None:
    """Upload a pruned folder to the hub; the token comes from the environment."""
    from flapcli import console
    from flapcli.pipeline.push import push as upload

    console.note(f"uploaded: {upload(checkpoint or run_dir / 'pruned', repo, private)}")


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


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: give a number of windows, at least 1, or auto")
    return int(text)


def _bars() -> Any:
    from flapcli import console

    return console.Bars()


def _report(path: Path, cached: bool, as_json: bool, data: Any, show: str, *args: Any) -> None:
    """Print a stage's result: JSON, or the table that the console draws of it; where it lies, on stderr."""
    from flapcli import console

    console.data(data) if as_json else getattr(console, show)(*args)
    console.note(f"{path}: up to date" if cached else f"{path}: written")
