"""The commands that use results: report, compare, diff, generate, export, push. What is heavy is imported inside."""

from pathlib import Path

import typer

from flapcli import options as o
from flapcli.command import RUN, bars, command, tell
from flapcli.errors import UsageError


@command
def report(
    run_dir: o.Run = RUN,
    out: o.Out = None,
    compare: o.CompareRuns = None,
    debug: o.Debug = False,
) -> None:
    """Write one self-contained HTML page of a run -> DIR/report.html."""
    from flapcli import console
    from flapcli.report.page import write_page

    path = out or run_dir / "report.html"
    write_page(run_dir, path, compare or [])
    console.note(f"{path}: written")


@command
def compare(
    runs: list[Path] = typer.Argument(metavar="RUN RUN ...", help="Run folders, or eval.json files."),
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Put runs side by side: settings that differ, sizes, perplexities, tasks, speed."""
    if len(runs) < 2:
        raise UsageError("compare: give at least two runs")
    from flapcli import console, console_results
    from flapcli.compare import compare as side_by_side

    found = side_by_side(runs)
    console.data(found) if as_json else console_results.show_comparison(found)


@command
def diff(
    first: Path = typer.Argument(metavar="PLAN", help="A plan.yaml, or a run folder."),
    second: Path = typer.Argument(metavar="PLAN", help="Another."),
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say which units two plans keep differently, per layer and in all."""
    from flapcli import console, console_results
    from flapcli.compare import diff as apart
    from flapcli.plan import load_plan

    one, two = (load_plan(path / "plan.yaml" if path.is_dir() else path) for path in (first, second))
    found = apart(one, two)
    console.data(found) if as_json else console_results.show_difference(found, str(first), str(second))


@command
def generate(
    prompt: str = typer.Argument(help="The text to go on from."),
    run_dir: o.Run = RUN,
    checkpoint: o.CheckpointOption = None,
    model: o.DenseModel = None,
    max_new_tokens: o.MaxNewTokens = 64,
    sample: o.Sample = False,
    seed: o.SampleSeed = 0,
    temperature: o.Temperature = None,
    chat: o.Chat = False,
    baseline: o.Baseline = True,
    device: o.Device = "auto",
    dtype: o.EvalRunDtype = "auto",
    threads: o.Threads = None,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Print what the dense and the pruned model say to a prompt, side by side."""
    if temperature is not None and not sample:
        raise UsageError("--temperature is for --sample; greedy decoding has none")
    from flapcli import console, console_results
    from flapcli.checkpoint import Hub
    from flapcli.pipeline.common import Compute
    from flapcli.pipeline.generate import GenerateOptions, run_generate

    wanted = GenerateOptions(max_new_tokens, sample, seed, 1.0 if temperature is None else temperature, chat, dtype)
    said = run_generate(
        prompt, checkpoint or str(run_dir / "pruned"), model, Hub(revision, cache_dir, trust_remote_code),
        wanted, baseline, Compute(device, threads=threads), console.Bars(),
    )  # fmt: skip
    console.data({"prompt": prompt, **said}) if as_json else console_results.show_texts(said)


@command
def export(
    target: str = typer.Argument(metavar="FORMAT", help="What to write: gguf (llama.cpp, Ollama, LM Studio)."),
    checkpoint: str = typer.Argument("", metavar="[CHECKPOINT]", help="What to export [default: DIR/pruned]."),
    run_dir: o.Run = RUN,
    out: o.Out = None,
    outtype: o.Outtype = "f16",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a pruned checkpoint for another runtime -> DIR/pruned.gguf, and an Ollama Modelfile beside it."""
    from flapcli.checkpoint import Hub
    from flapcli.pipeline.export import run_export_gguf

    if target != "gguf":
        raise UsageError(f"export {target}: the formats are gguf")
    path = out or run_dir / "pruned.gguf"
    told, cached = run_export_gguf(
        path, checkpoint or str(run_dir / "pruned"), Hub(revision, cache_dir, trust_remote_code),
        outtype, force, bars(),
    )  # fmt: skip
    tell(path, cached, as_json, told, "show_export", told)


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
