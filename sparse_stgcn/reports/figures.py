"""Figures as images inside the page, in the reader's light or dark colours."""
from __future__ import annotations

import base64
import io
import re
from typing import TYPE_CHECKING

from ..plots.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["embedded"]

# matplotlib draws axes in this colour, and nothing else of this package does; text without a colour of its own has none.
_INK = "#000000"
_THEME = ("<style>svg { color: #1b1f24 } text { fill: currentColor } "
          "@media (prefers-color-scheme: dark) { svg { color: #d7dde5 } }</style>")


@styled
def embedded(figure: Figure) -> str:
    """``data:`` address of the figure as SVG without background; axes and text follow the reader's colour scheme."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawing = text.getvalue().replace(_INK, "currentColor")
    drawing = re.sub(r"(<svg\b[^>]*>)", rf"\1{_THEME}", drawing, count=1)
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode()
