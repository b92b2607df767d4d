"""The command line: all commands of `flap`, in the order of its help."""

import logging
import sys
import warnings

import typer

from flapcli.cli import options as o
from flapcli.cli.command import app
from flapcli.views.terminal import forgive_encodings

# isort: off
# Importing one registers its commands.
from flapcli.cli import stages, heal_command, run_command, estimate_command, sweep_command, results  # noqa: F401
# isort: on


def main() -> None:
    forgive_encodings()
    if "--debug" not in sys.argv:
        quiet_libraries()
    app(prog_name="flap")


def quiet_libraries() -> None:
    """What libraries warn of, many as they are imported, tells no user of flap what to do; --debug shows it."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


@app.callback()
def _global(context: typer.Context, version: o.Version = False, debug: o.Debug = False) -> None:
    context.obj = debug  # commands have --debug of their own, and look here too
