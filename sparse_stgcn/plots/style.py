"""How every figure looks: one style, colours that the colour-blind tell apart, and text that is never taken for a formula."""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GREY", "MARKERS", "canvas", "readable", "require", "save", "styled"]

# Okabe and Ito's palette (jfly.uni-koeln.de/color), without black and yellow, which vanish on dark or white paper.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#808080"

# What has no glyph and no place in an SVG, which is XML: control characters but for tab and line ends, halves of surrogate
# pairs, and two that are no characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def styled(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``draw`` in the style of this package, whatever matplotlib was told elsewhere; UserError without matplotlib."""
    @wraps(draw)
    def inside(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        require()
        from matplotlib import rc_context

        with rc_context(_style()):
            return draw(*args, **options)
    return inside


def canvas(title: str = "", rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.2, 3.8)) -> tuple[Figure, Any]:
    """A figure and its axes (one, a row or column of them, or an array (rows, columns)), ``size`` inches each."""
    figure = require()(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    if title:
        figure.suptitle(readable(title))
    return figure, figure.subplots(rows, columns)


def readable(text: object) -> str:
    """``text`` as a figure or a page can show it: names come from data sets, and may have any character in them."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


@styled
def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG, SVG or PDF, by the suffix, that depends on what is drawn alone, not on the time."""
    path = Path(path)
    known = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, dpi=120, metadata=known.get(path.suffix.lower(), {"Software": None}))


def require() -> type[Figure]:
    """matplotlib's Figure. Raises UserError without matplotlib; a long command asks before it begins."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UserError("Expected matplotlib for figures. Got none; install it with pip install "
                        f"'sparse-stgcn[plots]' ({error}).") from error
    return Canvas


def _style() -> Any:
    from cycler import cycler

    colours = cycler(color=COLOURS)
    # A class may be called "$5": names are text. Text of an SVG stays text, which can be searched and read aloud.
    return {"axes.prop_cycle": colours, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "sparse_stgcn",
            "savefig.bbox": "standard"}
