"""Figures in the paper's arrangement, drawn from the entries of a sweep or from scores."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .style import GREY, MARKERS, canvas, readable, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves", "lines", "violins"]

SPARSE = 20  # epochs: a line through fewer shows where it was measured
Points = Mapping[str, Mapping[float, Sequence[float]]]


@styled
def lines(points: Points, x_label: str, y_label: str = "top-1 accuracy (%)", title: str = "",
          dense: Sequence[float] = ()) -> Figure:
    """Accuracy over sparsity: one line per name, the mean over the runs with their standard deviation as bars.

    Args:
        points: name of a line -> x -> value of each run, as a fraction.
        dense: values of the dense runs, drawn as a horizontal line.
    """
    figure, axes = canvas(title)
    places = sorted({x for line in points.values() for x in line})
    where = {x: i for i, x in enumerate(places)}  # levels of sparsity lie too close together at the right to be to scale
    for (name, line), marker in zip(points.items(), cycle(MARKERS), strict=False):
        xs = sorted(line)
        means = [100 * statistics.fmean(line[x]) for x in xs]
        deviations = [100 * statistics.stdev(line[x]) if len(line[x]) > 1 else 0 for x in xs]
        axes.errorbar([where[x] for x in xs], means, deviations, marker=marker, capsize=3, label=readable(name))
    if dense:
        axes.axhline(100 * statistics.fmean(dense), color=GREY, linestyle="--", label="dense")
    axes.set_xticks(range(len(places)), [f"{x:g}" for x in places])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend()
    return figure


@styled
def curves(histories: Mapping[str, Sequence[Mapping[str, Sequence[Any]]]], title: str = "") -> Figure:
    """Training: cross entropy, test accuracy, and norm of the masked weights over the epochs, one line per name.

    Args:
        histories: name -> history of each run, by column, as a sweep's entries have it; the mean over the runs is drawn.
    """
    from matplotlib.ticker import MaxNLocator

    figure, all_axes = canvas(title, columns=3)
    for axes, key, label, factor in zip(all_axes, ("loss", "test_accuracy", "masked_norm"), (
            "cross entropy", "test accuracy, one clip (%)", "norm of the masked weights"), (1, 100, 1), strict=True):
        for name, runs in histories.items():
            epochs = [e for e in range(min(len(run[key]) for run in runs)) if all(run[key][e] is not None for run in runs)]
            if key == "masked_norm":  # the masked weights are gone after the warm-up
                epochs = [e for e in epochs if all(run["stage"][e] == "warm-up" for run in runs)]
            axes.plot([e + 1 for e in epochs], [factor * statistics.fmean(run[key][e] for run in runs) for e in epochs],
                      marker="." if len(epochs) < SPARSE else "", label=readable(name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    all_axes[0].legend()
    return figure


@styled
def violins(max_probability: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Distribution of the largest probability of each network: of all samples, and of those under 0.5 (paper, Fig. 6)."""
    figure, all_axes = canvas(title, columns=2)
    names = list(max_probability)
    for axes, limit, label in zip(all_axes, (1.0, 0.5), ("all samples", "samples under 0.5"), strict=True):
        for position, name in enumerate(names):
            values = [p for p in max_probability[name] if limit == 1 or p < limit]
            if len(set(values)) > 1:  # a density needs two different values
                axes.violinplot(values, [position], widths=0.8, showmedians=True)
            elif values:
                axes.plot([position], values[:1], marker="_", markersize=20)
        axes.set_xticks(range(len(names)), [readable(name) for name in names])
        axes.set_ylim(0, limit)
        axes.set_ylabel("largest probability")
        axes.set_title(label)
    return figure
