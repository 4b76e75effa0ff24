"""Rows of a benchmark, what is derived from them, and their arrangement as markdown."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

OURS = "sparse_stgcn"


@dataclass(frozen=True)
class Row:
    """One candidate of one paired run.

    Attributes:
        what: the quantity, e.g. ``inference`` or ``temporal_conv dX``.
        subject: the backbone, or the shape of an op.
        name: the engine; ``sparse_stgcn`` is this package.
        batch, threads: samples and threads.
        sparsity, block, density: of the pattern; None for a dense engine.
        seconds: median over the rounds.
        speedup: median over the rounds of best dense engine / this one.
        own: the same against this package at density 1; None for other engines.
        gflops: 2 x multiply-adds of the kept weights (and of everything else that is multiplied) per second. It is the work of
            the network as it is written, see ``macs``: a rate of answers, not of instructions.
        fma: gflops as a share of the multiply-add peak of these threads, measured before and after the run. A runtime that
            needs fewer products than the network as it is written can exceed 100 %.
        bandwidth: share of their copy bandwidth, measured then, if every tensor between blocks moved once.
        memory: peak bytes above those before the call, or None where it was not measured.
        error: largest difference from the float64 reference over its largest value; of a step that of the classifier's
            gradient.
    """

    what: str
    subject: str
    name: str
    batch: int
    threads: int
    sparsity: float | None
    block: str | None
    density: str | None
    seconds: float
    speedup: float
    own: float | None
    gflops: float
    fma: float | None
    bandwidth: float | None
    memory: int | None
    error: float

    @property
    def label(self) -> str:
        """The engine, with the pattern for this package."""
        if self.sparsity is None:
            return self.name
        if self.sparsity == 0:
            return f"{self.name} dense ({self.block})"
        rule = "" if self.density == "uniform" else f" {self.density}"
        return f"{self.name} {self.sparsity:g} ({self.block}{rule})"


def break_even(rows: Sequence[Row]) -> float | None:
    """The sparsity from which one series (levels of one pattern, one setting) is faster than the best dense engine.

    Linear between the measured levels; the lowest level if that is faster already, None if no level is.
    """
    times = sorted((row.sparsity, 1 / row.speedup) for row in rows if row.sparsity is not None)  # 1: the best dense engine's
    if not times or all(time > 1 for _, time in times):
        return None
    if times[0][1] <= 1:
        return times[0][0]
    low, high = next(pair for pair in pairwise(times) if pair[0][1] > 1 >= pair[1][1])
    return low[0] + (high[0] - low[0]) * (low[1] - 1) / (low[1] - high[1])


def markdown(rows: Iterable[Row]) -> str:
    """Every row of the table."""
    lines = ["| | | batch x threads | ms | against the best dense engine | against ours at density 1 | GFLOP/s | of FMA peak "
             "| of copy bandwidth | peak MB | error |",
             "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in rows:
        cells = [f"{r.subject} {r.what}", r.label, f"{r.batch} x {r.threads}", f"{1e3 * r.seconds:.4g}", f"{r.speedup:.2f}x",
                 _cell(r.own, "{:.2f}x"), f"{r.gflops:.0f}", _cell(r.fma, "{:.0%}"), _cell(r.bandwidth, "{:.0%}"),
                 _cell(r.memory and r.memory / 1e6, "{:.0f}"), f"{r.error:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pivot(rows: Sequence[Row]) -> str:
    """One line per quantity, setting and pattern; a column per level with the ratio to the best dense engine."""
    levels = sorted({r.sparsity for r in rows if r.sparsity is not None})
    columns = ["", "pattern", "batch x threads", "best dense engine", *(f"{level:g}" for level in levels), "break-even"]
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- | --- | --- |" + " ---: |" * (len(levels) + 1)]
    settings = dict.fromkeys((r.what, r.subject, r.batch, r.threads) for r in rows)
    for setting in settings:
        here = [r for r in rows if (r.what, r.subject, r.batch, r.threads) == setting]
        engines = [r for r in here if r.sparsity is None]
        best = min(engines, key=lambda r: r.seconds)
        dense = {0.0: next((r for r in here if r.sparsity == 0), None)}
        for block, rule in dict.fromkeys((r.block, r.density) for r in here if r.sparsity):
            series = {**dense, **{r.sparsity: r for r in here if (r.block, r.density) == (block, rule)}}
            cells = [f"{series[level].speedup:.2f}x ({1e3 * series[level].seconds:.3g} ms)" if series.get(level) else ""
                     for level in levels]
            even, lowest = break_even([r for r in series.values() if r]), min(level for level in levels if series.get(level))
            form = "<= {:.2f}" if even == lowest > 0 else "{:.2f}"  # nothing below it was measured
            lines.append(f"| {setting[1]} {setting[0]} | {block} {rule} | {setting[2]} x {setting[3]} | {best.name} "
                         f"{1e3 * best.seconds:.4g} ms | " + " | ".join(cells) + f" | {_cell(even, form, 'never')} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str, missing: str = "") -> str:
    return missing if value is None else form.format(value)
