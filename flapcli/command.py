"""The typer app, and how a command's errors become one line and an exit code."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import typer

from flapcli import options as o
from flapcli.errors import FlapError

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


def bars() -> Any:
    from flapcli import console

    return console.Bars()


def tell(path: Path, cached: bool, as_json: bool, data: Any, show: str, *args: Any) -> None:
    """Print a stage's result: JSON, or the table that the console draws of it; where it lies, on stderr."""
    from flapcli import console

    console.data(data) if as_json else getattr(console, show)(*args)
    console.note(f"{path}: up to date" if cached else f"{path}: written")
