"""What accuracy costs: networks over their size or latency, and those that no other network beats in both."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from .style import GREY, MARKERS, canvas, readable, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Point", "front", "pareto"]


@dataclass(frozen=True)
class Point:
    """A network.

    Attributes:
        group: what it shares with the other networks of its line, such as the backbone.
        name: what tells it from them, such as its sparsity.
        cost: bytes, seconds ...; less is better.
        accuracy: a fraction, the mean over its runs.
        deviation: of the runs, a fraction; 0 of a single run.
    """

    group: str
    name: str
    cost: float
    accuracy: float
    deviation: float = 0.0


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is better than in one of cost and accuracy and at least as good in the other, by cost."""
    best, found = float("-inf"), []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            found.append(point)
    return found


@styled
def pareto(points: Sequence[Point], cost: str, title: str = "") -> Figure:
    """Accuracy over cost, on a logarithmic axis, one colour and mark per group; the steps are the front.

    Args:
        cost: what the costs are, with their unit.

    Raises:
        ValueError: no points, or a cost that is not above 0.
    """
    from matplotlib.ticker import LogLocator

    if not points:
        raise ValueError("Expected at least one network. Got none.")
    if not all(point.cost > 0 for point in points):
        raise ValueError(f"Expected every cost above 0. Got {min(point.cost for point in points):g}.")
    figure, axes = canvas(title, size=(6.2, 4.2))
    for group, marker in zip(dict.fromkeys(point.group for point in points), cycle(MARKERS), strict=False):
        mine = [point for point in points if point.group == group]
        axes.errorbar([p.cost for p in mine], [100 * p.accuracy for p in mine], [100 * p.deviation for p in mine],
                      linestyle="none", marker=marker, capsize=3, label=readable(group))
        for point in mine:
            axes.annotate(readable(point.name), (point.cost, 100 * point.accuracy), (4, 4), textcoords="offset points",
                          fontsize=7)
    best = front(points)
    axes.step([p.cost for p in best], [100 * p.accuracy for p in best], where="post", color=GREY, linestyle="--", linewidth=1,
              zorder=0, label="no other is better in both")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.12)
    axes.set_xlabel(readable(cost))
    axes.set_ylabel("top-1 accuracy (%)")
    axes.legend(fontsize="small", loc="lower right")
    return figure
