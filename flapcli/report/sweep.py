"""The picture of a sweep: perplexity over size. No torch."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from flapcli.report.plots import DENSE, svg
from flapcli.rundir import atomic_file
from flapcli.sweep import Sweep

COLOURS = ["#1f6f8b", "#c8553d", "#6a8d3a", "#8a5aa3"]


def sweep_picture(sweep: Sweep) -> Figure:
    """One line a text from the smallest model to the dense one, which is hollow; perplexity is logarithmic."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, text in enumerate(sweep.rows[0].perplexity):
        points = [(row.parameters, row.perplexity[text]) for row in sweep.rows]
        colour = COLOURS[place % len(COLOURS)]
        whole = [(sweep.dense.parameters, sweep.dense.perplexity[text])] if sweep.dense else []
        axes.plot(*zip(*(whole + points), strict=True), "-o", color=colour, label=Path(text).name, zorder=2)
        if whole:
            axes.plot(*zip(*whole, strict=True), "o", color=colour, markerfacecolor="white", zorder=3)
        for row in sweep.rows:
            at = (row.parameters, row.perplexity[text])
            axes.annotate(f"{row.ratio}", at, (4, 4), textcoords="offset points", fontsize=7.5, color=DENSE)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:,.4g} M")
    axes.set_xlabel("parameters (hollow: dense; small figures: ratio)")
    axes.set_ylabel("perplexity")
    axes.legend()
    return figure


def save_sweep_picture(sweep: Sweep, target: Path) -> None:
    """Write the picture as an SVG file. Raises FlapError where the file system refuses."""
    with atomic_file(target) as scratch:
        scratch.write_text(svg(sweep_picture, sweep) or "", encoding="utf-8")
