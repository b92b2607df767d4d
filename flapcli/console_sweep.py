"""How a sweep looks in the terminal: a table, and perplexity over size drawn with characters."""

from math import log10
from pathlib import Path

from rich.table import Table
from rich.text import Text

from flapcli.evaluate.table import megabytes
from flapcli.sweep import Figures, Row, Sweep

WIDTH, HEIGHT, MARGIN = 60, 12, 10  # of the plot and of its labels, in characters
MARKS = "●◆▲■○◇△□"


def sweep_table(sweep: Sweep) -> Table:
    """The dense model's row and one a ratio: size, and each text's perplexity, over the dense model's in brackets."""
    table = Table(title=f"sweep of {sweep.model}", title_justify="left")
    texts = list(sweep.rows[0].perplexity)
    averaged = any(row.task_average is not None for row in sweep.rows)
    for column in ("ratio", "parameters", "weights", *(f"perplexity {Path(text).name}" for text in texts)):
        table.add_column(column, justify="right")
    if averaged:
        table.add_column("average of tasks", justify="right")
    for row in [*([sweep.dense] if sweep.dense else []), *sweep.rows]:
        name = str(row.ratio) if isinstance(row, Row) else "dense"
        cells = [
            name,
            f"{row.parameters:,}",
            f"{megabytes(row.bytes)} {row.stored_as}",
            *(_cell(row, t) for t in texts),
        ]
        table.add_row(*cells, *(["-" if row.task_average is None else f"{row.task_average:.4f}"] if averaged else []))
    return table


def _cell(row: Figures, text: str) -> str:
    relative = f" ({row.relative[text]:.2f}x)" if isinstance(row, Row) and text in row.relative else ""
    return f"{row.perplexity[text]:.2f}{relative}"


def sweep_plot(sweep: Sweep) -> Text:
    """Perplexity (logarithmic) over parameters, one mark a text; where two meet the later one shows."""
    models: list[Figures] = [*([sweep.dense] if sweep.dense else []), *sweep.rows]
    texts = list(sweep.rows[0].perplexity)
    heights = [log10(model.perplexity[text]) for model in models for text in texts]
    sizes = [model.parameters for model in models]
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, text in zip(MARKS, texts, strict=False):
        for model in models:
            x = _place(model.parameters, min(sizes), max(sizes), WIDTH)
            y = _place(log10(model.perplexity[text]), min(heights), max(heights), HEIGHT)
            grid[HEIGHT - 1 - y][x] = mark
    ticks = {0: max(heights), HEIGHT // 2: (max(heights) + min(heights)) / 2, HEIGHT - 1: min(heights)}
    lines = ["perplexity over parameters"]
    for place, line in enumerate(grid):
        label = f"{10 ** ticks[place]:,.4g}" if place in ticks else ""
        lines.append(f"{label:>{MARGIN}} ┤{''.join(line).rstrip()}")
    lines.append(f"{'':>{MARGIN}} └{'─' * WIDTH}")
    low, high = f"{min(sizes):,}", f"{max(sizes):,}"
    lines.append(f"{'':>{MARGIN}}  {low}{high:>{WIDTH - len(low)}}")
    lines.append(" " * (MARGIN + 2) + "   ".join(f"{m} {Path(t).name}" for m, t in zip(MARKS, texts, strict=False)))
    return Text("\n".join(lines), no_wrap=True)


def _place(value: float, low: float, high: float, cells: int) -> int:
    """The cell of a value on an axis of `cells` from low to high; the middle where there is but one value."""
    return round((value - low) / (high - low) * (cells - 1)) if high > low else cells // 2
