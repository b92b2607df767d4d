"""The commands that look at results: report, compare, diff, generate. What is heavy is imported inside."""

from pathlib import Path

import typer

from flapcli import options as o
from flapcli.command import command
from flapcli.errors import UsageError

RUN = Path("flap-run")


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
