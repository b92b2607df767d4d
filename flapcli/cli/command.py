"""The typer app: how groups of options become options of a command, and errors one line and an exit code."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import typer

from flapcli.cli import interrupts
from flapcli.cli import options as o
from flapcli.cli.epilogs import epilog
from flapcli.cli.help import Command
from flapcli.cli.misuse import Group
from flapcli.errors import FlapError, UnfinishedError
from flapcli.views import terminal

app = typer.Typer(
    name="flap",
    help="Make large language models smaller without retraining (FLAP, AAAI 2024). "
    "calibrate -> plan -> apply -> eval, or all of it with run.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RUN = Path("flap-run")


def ungrouped(function: Callable[..., None]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """A function's parameters as typer sees them: a dataclass's fields in the place of a parameter of that type.

    And these dataclasses, by the names of their parameters.
    """
    plain, groups = [], {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[parameter.name] = group
            types = get_type_hints(group, include_extras=True)
            for f in fields(group):
                plain.append(parameter.replace(name=f.name, default=f.default, annotation=types[f.name]))
        else:
            plain.append(parameter)
    return plain, groups


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes --debug; without, its errors are one line on stderr and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters, groups = ungrouped(function)

        @functools.wraps(function)
        def guarded(context: typer.Context, debug: bool, **given: Any) -> None:
            made = {key: group(**{f.name: given.pop(f.name) for f in fields(group)}) for key, group in groups.items()}
            with interrupts.raised_in(name):
                try:
                    function(**given, **made)
                except typer.Exit:
                    raise
                except (Exception, KeyboardInterrupt) as error:
                    if debug or context.obj:
                        raise
                    raise typer.Exit(_told(error, name)) from error

        first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        last = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=o.Debug)
        seen = [p.replace(kind=p.KEYWORD_ONLY) for p in (first, *parameters, last)]
        guarded.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
        guarded.__annotations__ = {p.name: p.annotation for p in seen}
        app.command(name=name, cls=Command, epilog=epilog(name))(guarded)
        return function

    return register


def _told(error: BaseException, command: str) -> int:
    """Say what ended a command; returns its exit code."""
    pressed = interrupts.was_pressed(error)
    knows_better = isinstance(error, UnfinishedError)  # what was measured until then, and where it is
    terminal.error(interrupts.line_of(command) if pressed and not knows_better else _describe(error))
    return interrupts.CODE if pressed else error.exit_code if isinstance(error, FlapError) else 1


def _describe(error: BaseException) -> str:
    if isinstance(error, FlapError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{str(error.filename)[:100]}: {error.strerror}"
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows where)"


def tell(path: Path, made: Any, cached: bool, as_json: bool, took: float) -> None:
    """Print a stage's result as JSON or as a table; where it lies and the seconds that it took, on stderr."""
    print_made(made, as_json)
    note_of(path, cached, took)


def print_made(made: Any, as_json: bool) -> None:
    """A stage's result as JSON or as a table."""
    from flapcli.views.contents import VIEWS

    view = VIEWS[type(made)]
    terminal.data(view.data(made)) if as_json else view.draw(made)


@contextmanager
def printing_unfinished(as_json: bool) -> Iterator[None]:
    """Print what was measured before a failure, which goes on."""
    try:
        yield
    except UnfinishedError as error:
        print_made(error.made, as_json)
        raise


def note_of(path: Path, cached: bool, took: float) -> None:
    """Where an artifact lies, and whether it was there."""
    terminal.note(f"{path}: up to date" if cached else f"{path}: written ({terminal.duration(took)})")


def not_run(tasks: Iterable[str], path: Path) -> FlapError:
    """What to raise once a result is written to `path` in which these tasks are missing."""
    return FlapError(f"not every task could be run ({', '.join(tasks)}); the other results are in {path}")
