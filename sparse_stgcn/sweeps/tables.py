"""Tables of a sweep: mean and deviation over seeds and folds, as CSV (a row per cell) and as markdown."""
from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .collect import Entry, matches
from .grid import Table

__all__ = ["Cell", "cells", "to_csv", "to_markdown"]


@dataclass(frozen=True)
class Cell:
    """Runs that differ in what is averaged over only.

    Attributes:
        row, column: values of the table's keys.
        values: the metric of each run, as a fraction.
        kept, kept_all: kept maskable weights over all maskable weights, and kept parameters over all parameters, of one
            dense network (0.66 and more for an ensemble); means over the runs.
        parameters: of one dense network.
    """

    row: tuple[Any, ...]
    column: Any
    values: tuple[float, ...]
    kept: float
    kept_all: float
    parameters: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1), or None of one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f} ({len(self.values)})"


def cells(table: Table, entries: Sequence[Entry]) -> list[Cell]:
    """The cells that have a run, in the order of the entries' rows and columns.

    A dense run stands in every row that differs only in what it does not depend on.

    Raises:
        ValueError: two runs of a cell differ in something else than what is averaged over.
    """
    chosen = [entry for entry in entries if matches(entry, table.where or {})]
    rows = _ordered([tuple(entry["config"][key] for key in table.rows) for entry in chosen])
    columns = _ordered([entry["config"][table.columns] for entry in chosen])
    found = []
    for row in rows:
        wanted = dict(zip(table.rows, row, strict=True))
        for column in columns:
            runs = [e for e in chosen if matches(e, wanted) and e["config"][table.columns] == column]
            if runs:
                _check_alike(table, row, column, runs)
                found.append(Cell(
                    row, column, tuple(e["test"][table.metric] for e in runs),
                    statistics.fmean(e["weights"]["maskable_kept_fraction"] for e in runs),
                    statistics.fmean(e["weights"]["all_kept_fraction"] for e in runs), runs[0]["weights"]["all"]))
    return found


def to_csv(table: Table, found: Sequence[Cell]) -> str:
    """One row per cell; fractions, not percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.rows, table.columns, table.metric, "deviation", "runs", "maskable_kept", "all_kept", "parameters"])
    for cell in found:
        deviation = "" if cell.deviation is None else f"{cell.deviation:.5f}"
        writer.writerow([*cell.row, cell.column, f"{cell.mean:.5f}", deviation, len(cell.values), f"{cell.kept:.5f}",
                         f"{cell.kept_all:.5f}", cell.parameters])
    return text.getvalue()


def to_markdown(table: Table, found: Sequence[Cell]) -> str:
    """Rows and columns as in the paper; under each column what it keeps of the maskable weights and of all parameters.

    A cell is percent, mean ± sample deviation (runs); a dash where no run is finished.
    """
    columns = _ordered([cell.column for cell in found])
    rows = _ordered([cell.row for cell in found])
    by_place = {(cell.row, cell.column): cell for cell in found}
    heads = [*table.rows, "parameters", *(_head(table.columns, column) for column in columns)]
    lines = ["| " + " | ".join(heads) + " |",
             "|" + " --- |" * len(table.rows) + " ---: |" * (1 + len(columns))]
    for row in rows:
        present = [by_place[row, column] for column in columns if (row, column) in by_place]
        texts = [f"{by_place[row, column]}" if (row, column) in by_place else "–" for column in columns]
        lines.append(f"| {' | '.join(map(str, row))} | {present[0].parameters / 1e6:.2f} M | {' | '.join(texts)} |")
        kept = [f"{by_place[row, c].kept:.2f} / {by_place[row, c].kept_all:.2f}" if (row, c) in by_place else ""
                for c in columns]
        lines.append(f"| {' | '.join([''] * len(row))} | kept | {' | '.join(kept)} |")
    return "\n".join(lines) + "\n"


def _head(key: str, value: Any) -> str:
    if key != "sparsity" or isinstance(value, str):
        return str(value)
    return f"{value:g}" if value else "dense"


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers first, ascending, then the rest as they come."""
    distinct = list(dict.fromkeys(values))
    numbers = sorted(v for v in distinct if isinstance(v, (int, float)))
    return numbers + [v for v in distinct if not isinstance(v, (int, float))]


def _check_alike(table: Table, row: tuple[Any, ...], column: Any, runs: Sequence[Entry]) -> None:
    free = {*table.rows, table.columns, *table.average}
    for key, value in runs[0]["config"].items():
        if key not in free and any(run["config"][key] != value for run in runs):
            raise ValueError(f"Expected the runs of table {table.name}, {row} at {column}, to differ in "
                             f"{', '.join(table.average)} only. Got different {key}; add it to rows, or fix it in where.")
