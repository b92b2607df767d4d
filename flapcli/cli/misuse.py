"""What the parser refuses, as one line in our words, with what was meant where that can be told."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from flapcli.cli.help import bare
from flapcli.errors import meant
from flapcli.views import terminal

Misuse: Any = typer.BadParameter.__base__  # UsageError, which typer has of its own or of click's


class Group(TyperGroup):
    """All commands; what they are asked wrongly is told in one line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Misuse as error:
        if not str(error) and not getattr(error, "param", None):
            raise  # the help, where no command is named
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        terminal.error(_reason(error) + where)
        raise typer.Exit(2) from error


def _reason(error: Any) -> str:
    wrong = getattr(error, "option_name", None)
    if wrong and error.ctx:  # without, one that is known is used wrongly
        options = [name for param in error.ctx.command.params for name in (*param.opts, *param.secondary_opts)]
        return f"no such option: {wrong}{meant(wrong, options)}"
    param = getattr(error, "param", None)
    if not param:
        said = str(error.format_message()).rstrip(".")
        return said[:1].lower() + said[1:]
    name = param.opts[0] if param.param_type_name == "option" else bare(param)
    if choice := re.search(r"'(.*)' is not one of (.*)\.$", error.message):
        choices = re.findall(r"'([^']*)'", choice[2])
        return f"{name} {choice[1]}: give one of {', '.join(choices)}{meant(choice[1], choices)}"
    if not error.message:
        return f"{name} is missing"
    return _of_value(name, error)


def _of_value(name: str, error: Any) -> str:
    """What is wrong with a number; the parser's own words where it says nothing of the value."""
    found = getattr(error.__cause__, "errors", None)
    first = found()[0] if found else {}
    bounds = first.get("ctx", {})
    for key, words in {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}.items():
        if key in bounds:
            return f"{name} {first['input']}: must be {words} {bounds[key]}"
    kinds = {"float_parsing": "a number", "int_parsing": "a whole number", "int_from_float": "a whole number"}
    if first.get("type") in kinds:
        return f"{name} {first['input']}: give {kinds[first['type']]}"
    return f"{name}: {str(error.message).removeprefix('Value error, ')}".rstrip(".")
