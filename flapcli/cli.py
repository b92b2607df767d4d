"""The command line: all commands of `flap`, those of the stages and of results in modules of their own."""

from pathlib import Path

import typer

from flapcli import options as o
from flapcli.command import RUN, app, command

# isort: off
# In the order of the help: importing one registers its commands.
from flapcli import cli_stages, cli_run, cli_sweep, cli_results  # noqa: F401
# isort: on


def main() -> None:
    app()


@app.callback()
def _global(version: o.Version = False, debug: o.Debug = False) -> None:
    pass


@command
def show(
    path: Path = typer.Argument(
        RUN, metavar="[DIR|FILE]", help="Run folder, stats, plan, checkpoint or another artifact."
    ),
    plot: o.Plot = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say what is in a run, a stats file, a plan, a checkpoint, eval.json, sweep.json or self.json."""
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
