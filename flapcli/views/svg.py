"""Figures as SVG: text stays text, colours follow the page's, and what a pointer shows stands in the picture."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

KEPT, GONE, REMOVED, DENSE, LIMIT = "#1f6f8b", "#dfe3e8", "#b9c0c8", "#9aa3ad", "#c8553d"
# Text stays text, and equal runs give equal files.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "flap", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"], "legend.frameon": False,
}  # fmt: skip
# Colours of pictures by the page's variables, which dark pages have others for.
ON_PAGE = {
    "#000000": "ink",
    KEPT: "accent",
    GONE: "gone",
    REMOVED: "removed",
    DENSE: "dense",
    LIMIT: "limit",
    "#ffffff": "card",
}
TIP = "tip: "  # begins the group id of what a pointer shows something of


def svg(draw: Callable[..., Figure | None], *arguments: Any, alt: str = "", on_page: bool = True) -> str | None:
    """What `draw` makes of its arguments as an <svg> element; None where one is None, or it makes nothing.

    `alt` says in words what it shows. `on_page`: in the page's colours, on its ground; else as a file of its own.
    """
    if any(argument is None for argument in arguments):
        return None
    with rc_context(STYLE):
        figure = draw(*arguments)
        if figure is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=on_page)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    text = re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", text)
    if on_page:
        for colour, variable in ON_PAGE.items():
            text = text.replace(colour, f"var(--{variable})")
    return text
