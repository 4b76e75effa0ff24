"""Which classes a network takes for which."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .style import canvas, readable, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confusion", "hardest"]

ANNOTATED = 16  # classes up to which the numbers fit into the cells
LONGEST = 28  # letters of a name


@styled
def confusion(counts: NDArray[np.int64], names: Sequence[str], limit: int = 30, title: str = "") -> Figure:
    """Confusion matrix: rows are true classes, columns predicted ones, cells the percent of the row.

    Of more than ``limit`` classes those with the most errors are shown, with a last column for all other predictions. A
    class without samples is left blank.

    Args:
        counts: (classes, classes), as ``metrics.confusion_matrix`` gives it.
        names: of all classes.

    Raises:
        ValueError: ``counts`` is not square, ``names`` are more or fewer, or ``limit`` < 2.
    """
    classes = len(names)
    if counts.shape != (classes, classes):
        raise ValueError(f"Expected counts ({classes}, {classes}), a row and a column per name. Got {counts.shape}.")
    chosen = hardest(counts, limit)
    total = counts.sum(1)
    with np.errstate(invalid="ignore"):  # 0 / 0: no samples
        percent = 100 * counts / total[:, None]
    shown, labels = percent[np.ix_(chosen, chosen)], [_short(names[i]) for i in chosen]
    columns = list(labels)
    if len(chosen) < classes:
        shown = np.c_[shown, 100 - shown.sum(1)]
        columns.append("any other")
        title = title or f"the {len(chosen)} of {classes} classes with the most errors"
    side = max(3.6, 0.26 * len(columns) + 2.2)
    figure, axes = canvas(title, size=(side + 0.9, side))
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=100)
    small = 9 if len(columns) <= ANNOTATED else 7
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=small)
    axes.set_yticks(range(len(labels)), labels, fontsize=small)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(columns) <= ANNOTATED:
        for (row, column), value in np.ndenumerate(shown):
            if value >= 0.5:
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 55 else "#202020")
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    return figure


def hardest(counts: NDArray[np.int64], limit: int) -> list[int]:
    """The ``limit`` classes with the most wrong answers, in the order of the classes; all where there are no more."""
    if limit < 2:
        raise ValueError(f"Expected limit >= 2. Got {limit}.")
    errors = counts.sum(1) - counts.diagonal()
    return sorted(np.argsort(-errors, kind="stable")[:limit].tolist())


def _short(name: str) -> str:
    name = readable(name)
    return name if len(name) <= LONGEST else name[:LONGEST - 1] + "…"
