"""Figures of a sweep, as its grid lists them, from the entries alone."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import plots
from ..errors import UserError
from .collect import Entry, matches
from .grid import Grid

__all__ = ["draw"]


def draw(grid: Grid, entries: Sequence[Entry], out: Path) -> list[Path]:
    """Draw each figure that has data into ``out``; without matplotlib a warning, and none."""
    drawn: list[Path] = []
    for name, wanted in grid.figures.items():
        chosen = [entry for entry in entries if matches(entry, wanted.get("where") or {})]
        if not chosen:
            continue
        try:
            figure = KINDS[wanted["kind"]](wanted, chosen)
        except UserError as error:  # no matplotlib; everything else of the report is there
            warnings.warn(str(error), stacklevel=2)
            return drawn
        path = out / f"{grid.name}_{name}.png"
        plots.save(figure, path)
        drawn.append(path)
    return drawn


def _lines(wanted: Mapping[str, Any], entries: Sequence[Entry]) -> Any:
    x, line = wanted["x"], wanted["lines"]
    points: dict[str, dict[float, list[float]]] = {}
    dense = []
    for entry in entries:
        place, value = entry["config"][x], entry["test"]["top1"]
        if x == "sparsity" and place == 0:
            dense.append(value)
        elif isinstance(place, (int, float)):
            points.setdefault(_name(wanted, line, entry["config"][line]), {}).setdefault(place, []).append(value)
    return plots.lines(points, x, title=wanted.get("title", ""), dense=dense)


def _curves(wanted: Mapping[str, Any], entries: Sequence[Entry]) -> Any:
    histories: dict[str, list[Any]] = {}
    for entry in entries:
        if "history" in entry:
            histories.setdefault(_name(wanted, wanted["lines"], entry["config"][wanted["lines"]]), []).append(entry["history"])
    return plots.curves(histories, wanted.get("title", ""))


def _violins(wanted: Mapping[str, Any], entries: Sequence[Entry]) -> Any:
    values: dict[str, list[float]] = {}
    for entry in sorted(entries, key=lambda e: str(e["config"][wanted["over"]])):
        name = _name(wanted, wanted["over"], entry["config"][wanted["over"]])
        values.setdefault(name, []).extend(entry["confidence"]["max_probability"])
    return plots.violins(values, wanted.get("title", ""))


def _name(wanted: Mapping[str, Any], key: str, value: Any) -> str:
    """How a value of ``key`` is called in the legend: as ``names`` says, or as it is."""
    if value in (names := wanted.get("names") or {}):
        return str(names[value])
    return ("dense" if value == 0 and key == "sparsity" else f"{value:g}") if isinstance(value, float) else str(value)


KINDS = {"lines": _lines, "curves": _curves, "violins": _violins}
