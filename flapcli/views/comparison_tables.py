"""How comparisons, differences and texts look in the terminal."""

from typing import Any

from rich.columns import Columns
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from flapcli.artifacts.plan import parse_ranges
from flapcli.views.terminal import out

LONG = 60  # characters of a list of units that a table still shows; --json has them all
SIDE_BY_SIDE = 90  # columns of a terminal from which two texts fit beside each other


def show_comparison(found: dict[str, Any]) -> None:
    """Settings that differ, then figures; one column a run, the dense model's first where it was measured."""
    table = Table("", *(Column(name, justify="right", overflow="fold") for name in found["columns"]))
    missing = len(found["columns"]) - len(found["runs"])
    for name, values in found["differ"].items():
        table.add_row(name, *[""] * missing, *map(figure, values))
    table.add_section()
    for name, values in found["figures"].items():
        table.add_row(name, *map(figure, values))
    out.print(table)
    shared = ", ".join(f"{name} {figure(value)}" for name, value in found["shared"].items())
    out.print(Text(f"the same in all: {shared or 'nothing'}"))


def figure(value: Any) -> str:
    """A number as people read it; a dash for what a run lacks."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4g}"


def show_difference(found: dict[str, Any], first: str, second: str) -> None:
    """Units that one plan alone keeps, a row per layer that differs, and totals."""
    if not found["same_model"]:
        out.print(Text("the plans are of different models of equal sizes"))
    for name, (one, two) in found["settings"].items():
        out.print(Text(f"{name}: {figure(one)} -> {figure(two)}"))
    if found["layers"]:
        caption = f"- kept by {first} alone, + kept by {second} alone"
        columns = (Column("layer", justify="right"), *(Column(module, overflow="fold") for module in found["totals"]))
        table = Table(*columns, caption=caption, caption_justify="left")
        for row in found["layers"]:
            table.add_row(str(row["layer"]), *(_changes(row.get(module)) for module in found["totals"]))
        out.print(table)
    for module, total in found["totals"].items():
        out.print(
            f"{module}: {total['kept_by_both']:,} units kept by both, {total['only_first']:,} by the first alone, "
            f"{total['only_second']:,} by the second alone",
            highlight=False,
        )


def _changes(change: dict[str, str] | None) -> str:
    """The units by name where they are few, else how many."""
    if change is None:
        return ""
    cells = []
    for sign, ranges in (("-", change["only_first"]), ("+", change["only_second"])):
        if len(ranges) > LONG:
            cells.append(f"{sign}({len(parse_ranges(ranges))} units)")
        elif ranges:
            cells.append(f"{sign}{ranges}")
    return " ".join(cells)


def show_texts(said: dict[str, str]) -> None:
    """Each model's text in a panel, side by side where the terminal is wide enough."""
    width = out.width // len(said) - 1 if out.width >= SIDE_BY_SIDE else out.width
    panels = [Panel(Text(text), title=label, width=width, title_align="left") for label, text in said.items()]
    out.print(Columns(panels, padding=(0, 1)))
