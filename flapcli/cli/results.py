"""The commands that use results: report to push, show and families. What is heavy is imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from flapcli.cli import options as o
from flapcli.cli.command import RUN, command, tell
from flapcli.errors import FlapError, UsageError
from flapcli.progress import IMPORTING
from flapcli.views import terminal
from flapcli.views.display import Display


@command("report")
def report(run_dir: o.Run = RUN, out: o.Out = None, compare: o.CompareRuns = None) -> None:
    """Write one self-contained HTML page of a run or a sweep -> DIR/report.html."""
    path = out or run_dir / "report.html"
    with Display("report"):
        from flapcli.cli.presets import PRESETS
        from flapcli.views.page import write_page

        write_page(run_dir, path, compare or [], PRESETS["best"])
    terminal.note(f"{path}: written")


@command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders, or eval.json files.")],
    as_json: o.Json = False,
) -> None:
    """Put runs side by side: settings that differ, sizes, perplexities, tasks, speed."""
    if len(runs) < 2:
        raise UsageError("compare: give at least two runs")
    from flapcli.views.compare import compare as side_by_side
    from flapcli.views.comparison_tables import show_comparison

    found = side_by_side(runs)
    terminal.data(found) if as_json else show_comparison(found)


@command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.yaml, or a run folder.")],
    second: Annotated[Path, typer.Argument(metavar="PLAN", help="Another.")],
    as_json: o.Json = False,
) -> None:
    """Say which units two plans keep differently, per layer and in all."""
    from flapcli.artifacts.plan import load_plan
    from flapcli.views.compare import diff as apart
    from flapcli.views.comparison_tables import show_difference

    one, two = (load_plan(path / "plan.yaml" if path.is_dir() else path) for path in (first, second))
    found = apart(one, two)
    terminal.data(found) if as_json else show_difference(found, str(first), str(second))


@command("generate")
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    run_dir: o.Run = RUN,
    checkpoint: o.CheckpointOption = None,
    model: o.DenseModel = None,
    *,
    asked: o.GenerateGroup,
    device: o.Device = "auto",
    dtype: o.EvalDtype = "auto",
    threads: o.Threads = None,
    hub: o.HubGroup,
    as_json: o.Json = False,
) -> None:
    """Print what the dense and the pruned model say to a prompt, side by side."""
    if asked.temperature is not None and not asked.sample:
        raise UsageError("--temperature is for --sample; greedy decoding has none")
    from flapcli.execution.settings import Execution, GenerateOptions

    options = GenerateOptions(
        asked.max_new_tokens, asked.sample, asked.seed, asked.temperature or 1.0, asked.chat, dtype, asked.baseline
    )
    name, how = checkpoint or run_dir / "pruned", Execution(device, threads=threads)
    with Display("generate") as display:
        display.doing(IMPORTING)
        from flapcli.cli.resolve import hub_of
        from flapcli.evaluation.generate import generate as continued

        said = continued(prompt, name, options, model, hub_of(hub), how, display)
    from flapcli.views.comparison_tables import show_texts

    terminal.data({"prompt": prompt, **said}) if as_json else show_texts(said)


@command("export")
def export(
    target: Annotated[
        str, typer.Argument(metavar="FORMAT", help="What to write: gguf (llama.cpp, Ollama, LM Studio).")
    ],
    checkpoint: Annotated[str, o.Checkpoint(help="What to export.")] = "",
    run_dir: o.Run = RUN,
    out: o.Out = None,
    outtype: o.Outtype = "f16",
    *,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Write a pruned checkpoint for another runtime -> DIR/pruned.gguf, and an Ollama Modelfile beside it."""
    if target != "gguf":
        raise UsageError(f"export {target}: the formats are gguf")
    path, name = out or run_dir / "pruned.gguf", checkpoint or run_dir / "pruned"
    with Display("export") as display:
        from flapcli.cli.resolve import hub_of
        from flapcli.export.stage import export_gguf

        exported, cached = export_gguf(name, path, outtype, hub_of(hub), force, display)
    tell(path, exported, cached, as_json, display.took)


@command("push")
def push(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME on the hub; created where it is not there.")],
    checkpoint: Annotated[Path | None, o.Checkpoint(help="Pruned folder.")] = None,
    run_dir: o.Run = RUN,
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
) -> None:
    """Upload a pruned folder to the hub; the token comes from the environment."""
    with Display(f"push to {repo}"):
        from flapcli.export.push import push as upload

        place = upload(checkpoint or run_dir / "pruned", repo, private)
    terminal.note(f"uploaded: {place}")


@command("show")
def show(
    path: Annotated[
        Path, typer.Argument(metavar="[DIR|FILE]", help="Run folder, stats, plan, checkpoint or another artifact.")
    ] = RUN,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Say what is in a run, a stats file, a plan, a checkpoint, eval.json, sweep.json or self.json."""
    from flapcli.views.contents import VIEWS, data_of, inspect

    artifacts = inspect(path)
    if plot:
        from flapcli.views.plots import save_picture

        save_picture(path, plot)
        terminal.note(f"{plot}: written")
    if as_json:
        terminal.data(data_of(artifacts))
    else:
        for made in artifacts:
            VIEWS[type(made)].draw(made)


@command("families")
def families(
    check: o.CheckModel = None,
    execution: o.ExecutionGroup = o.ExecutionGroup(),
    *,
    hub: o.HubGroup,
    as_json: o.Json = False,
) -> None:
    """List the model families that flap prunes, or try a description on a checkpoint.

    --check reads headers, and slices the first and the last layer: do all tensors have their place, do sizes agree,
    does a sliced layer compute what the masked one does?
    """
    from flapcli.architecture.catalogue import catalogue
    from flapcli.views import tables

    if check is None:
        rows = catalogue()
        terminal.data(rows) if as_json else tables.show_families(rows)
        return
    with Display(f"families --check {check}") as display:
        from flapcli.checkpoints import open_checkpoint
        from flapcli.cli.resolve import execution_of, hub_of

        checkpoint = open_checkpoint(check, hub_of(hub))
        display.doing(IMPORTING)
        from flapcli.pruning.trial import try_description

        trials = try_description(checkpoint, execution_of(execution), display)
    found = {
        "model": checkpoint.name,
        "family": checkpoint.family.name,
        "tensors": len(checkpoint.tensors),
        "layers": [trial._asdict() | {"agrees": trial.agrees} for trial in trials],
    }
    terminal.data(found) if as_json else tables.show_trials(found)
    if not all(trial.agrees for trial in trials):
        raise FlapError(f"{check}: sliced layers do not compute what masked ones do; its description does not fit")
