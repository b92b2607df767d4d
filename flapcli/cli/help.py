"""What `flap X --help` prints: the common options first, rare ones last, names that no terminal cuts, examples."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

COMMON, RARE = "Common", "Rare"
OTHER = "Options"
NARROW = 60  # columns of a terminal below which names stand above what they are for
KINDS = {"|": "NAME", "int": "N", "float": "X", "path": "PATH"}


class Command(TyperCommand):
    """A command whose help is laid out here: typer's own gives types a column that names and texts then lack."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        out = Console(markup=False, emoji=False, highlight=False)  # as wide as the terminal is now
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        names = " ".join(f"[{bare(p)}]" if not p.required else bare(p) for p in arguments)
        out.print(Text(f"\nUsage: {ctx.command_path} [OPTIONS] {names}".rstrip() + "\n"))
        _print_paragraphs(out, self.help or "")
        out.print()
        for title, params in _panels(self.get_params(ctx)):
            out.print(
                Panel(_table(params, ctx, out.width < NARROW), title=title, title_align="left", border_style="dim")
            )
        if self.epilog:
            out.print()
            _print_paragraphs(out, self.epilog)


def _print_paragraphs(out: Console, text: str) -> None:
    """Prose as wide as the terminal; what stands indented, commands to copy, is never broken."""
    for number, part in enumerate(text.split("\n\n")):
        indented = part.startswith("    ")
        out.print("\n" * (number > 0), end="")
        out.print(Text(part if indented else " ".join(part.split("\n"))), soft_wrap=indented)


def _panels(params: list[Any]) -> list[tuple[str, list[Any]]]:
    """Titles and what stands under them: arguments, the common, all others as they come, the rare."""
    found: dict[str, list[Any]] = {"Arguments": [], COMMON: []}
    for param in params:
        if param.param_type_name == "argument":
            found["Arguments"].append(param)
        else:
            found.setdefault(getattr(param, "rich_help_panel", None) or OTHER, []).append(param)
    order = sorted(found, key=lambda title: (title == RARE, title == OTHER))
    return [(title, found[title]) for title in order if found[title]]


def _table(params: list[Any], ctx: Any, narrow: bool) -> Table:
    """Names beside what they are for, or above it."""
    names = [_names(param, ctx) for param in params]
    width = max(len(line) for name in names for line in name.splitlines())
    right = Column(ratio=1, overflow="fold")
    table = Table(*([right] if narrow else [Column(width=width, no_wrap=True), right]), box=None, show_header=False)
    for name, param in zip(names, params, strict=True):
        says = Text(_says(param, ctx))
        if narrow:
            table.add_row(Text(name, "cyan"))
            table.add_row(Padding(says, (0, 0, 0, 4)))
        else:
            table.add_row(Text(name, "cyan"), says)
    return table


def bare(argument: Any) -> str:
    """An argument's name."""
    return str(argument.metavar or argument.name.upper()).strip("[]")


def _type(param: Any, ctx: Any) -> str:
    """What typer calls an option's type, such as `int range` or `paper|best`; its versions keep it in two places."""
    display = getattr(param, "display_type_rich", None) or param.make_metavar
    return str(display(ctx=ctx) or "").strip("<>[]")


def _names(param: Any, ctx: Any) -> str:
    """An option's names, the short one first, and what it takes; a line each where it has a negative."""
    if param.param_type_name == "argument":
        return bare(param)
    kind = "" if param.is_flag else f" {_kind(param, ctx)}"
    return "\n".join([", ".join(sorted(param.opts, key=len)) + kind, *param.secondary_opts])


def _kind(param: Any, ctx: Any) -> str:
    """What an option takes, in a word: typer's own are its types, or all choices."""
    if param.metavar:
        return str(param.metavar)
    kind = _type(param, ctx).lower()
    return next((word for part, word in KINDS.items() if part in kind), "TEXT")


def _says(param: Any, ctx: Any) -> str:
    """What an option is for, what it may be and what it is where it is left out."""
    said, kind = [param.help or ""], _type(param, ctx)
    if not param.metavar and "|" in kind:
        said.append(f"[one of: {kind.replace('|', ', ')}]")
    default = param.default
    if isinstance(param.show_default, str):
        said.append(f"[default: {param.show_default}]")
    elif param.secondary_opts and isinstance(default, bool):
        said.append(f"[default: {(param.opts if default else param.secondary_opts)[0].removeprefix('--')}]")
    elif default is not None and not isinstance(default, bool) and param.show_default and not callable(default):
        said.append(f"[default: {default}]")
    return " ".join(filter(None, said))
