"""A static performance model of the GPU kernels: what each launch moves and computes at the shapes of ST-GCN, nothing measured.

Counts come from the kernels' loops, registers and shared memory from the compilers (gpu_triton.py, gpu_cuda.py), rates from
gpu_cards.py.
The floor of a product is max(bytes that must move / bandwidth, multiply-adds of live weights / peak); every row says
how far the prediction is from it, and where cuDNN's dense floor lies.
``python -m sparse_stgcn.bench --gpu-model h100`` prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import log
from statistics import median

from ..kernels.preference import kind_of, level_of
from .gpu_cards import CARDS, Card, Launch, Problem
from .gpu_cuda import Cuda
from .gpu_triton import STORED, Triton

LABEL = "prediction of a static model; nothing in this table was measured"
SHAPES = ((64, 100), (128, 50), (256, 25))  # channels, frames
LEVELS = (0.0, 0.6, 0.8, 0.95, 0.99)
BLOCKS = ((8, 1), (16, 1), (16, 16), (32, 32), (1, 1))
OPS = {"temporal_conv": 9, "graph_conv": 3}
DIRECTIONS = ("forward", "dX", "dW")
LIMIT = 2.0


@dataclass(frozen=True)
class Prediction:
    """One product of one shape on one backend. Seconds are predicted, not measured.

    Attributes:
        floor: seconds below which no kernel for these live weights can come.
        dense: the floor of a dense product of the same shape, as cuDNN's could be at best.
        ratio: seconds / floor. bound: the unit that takes longest, of the longest launch.
    """

    op: str
    direction: str
    arithmetic: str
    channels: int
    frames: int
    sparsity: float
    block: str
    backend: str
    seconds: float
    floor: float
    dense: float
    ratio: float
    bound: str
    launches: int
    resident: int


def floor(card: Card, p: Problem, weights: float | None = None) -> float:
    """max(bytes / bandwidth, flops / peak) of a product; ``weights``: of all for a dense one."""
    live = p.live if weights is None else weights
    flops = 2 * live * p.pixels
    if p.op == "graph_conv":
        flops += 2 * p.rows_of_graph * p.pixels * p.V * (2 if p.direction == "dX" else 1)
    moved = {"forward": p.I + p.O, "dX": p.I + p.O + (p.I if p.op == "graph_conv" else 0), "dW": p.I + p.O}[p.direction]
    return max((moved * p.pixels + live) * p.element / card.dram, flops / card.peak[p.arithmetic])


def predict(card: Card, p: Problem, backend: str) -> Prediction | None:
    """The prediction for one backend, or None where it has no kernel."""
    launches: Sequence[Launch] | None = (Cuda if backend == "cuda" else Triton)(card).launches(p)
    if not launches:
        return None
    seconds, least = sum(launch.seconds(card) for launch in launches), floor(card, p)
    longest = max(launches, key=lambda launch: launch.seconds(card))
    return Prediction(
        p.op,
        p.direction,
        p.arithmetic,
        p.I,
        p.T,
        p.sparsity,
        f"{p.bo}x{p.bi}",
        backend,
        seconds,
        least,
        floor(card, p, p.I * p.O * p.K),
        seconds / least,
        f"{longest.name}: {longest.bound(card)}",
        len(launches),
        longest.resident(card),
    )


def predictions(
    card: Card,
    ops: Iterable[str] = tuple(OPS),
    directions: Iterable[str] = DIRECTIONS,
    arithmetics: Iterable[str] = tuple(STORED),
    shapes: Iterable[tuple[int, int]] = SHAPES,
    levels: Iterable[float] = LEVELS,
    blocks: Iterable[tuple[int, int]] = BLOCKS,
    samples: int = 128,
) -> list[Prediction]:
    """Every combination; ``samples``: persons in all (a batch of 64 with two each)."""
    rows = []
    for op in ops:
        for direction in directions:
            for arithmetic in arithmetics:
                for channels, frames in shapes:
                    for sparsity in levels:
                        for block in blocks:
                            p = Problem(
                                op, direction, arithmetic, samples, channels, channels, frames, 25, OPS[op], *block, sparsity
                            )
                            rows += [made for backend in ("triton", "cuda") if (made := predict(card, p, backend))]
    return rows


def preferred(rows: Iterable[Prediction]) -> dict[tuple[str, ...], str]:
    """What dispatch looks at (op, direction, arithmetic, kind of block, level of density) -> the backend whose predicted times
    have the smaller geometric mean."""
    sums: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        times = sums.setdefault(_asked(row), {})
        times[row.backend] = times.get(row.backend, 0.0) + log(row.seconds)
    return {key: min(times, key=lambda name: times[name]) for key, times in sums.items()}


def dispatched(rows: Sequence[Prediction]) -> list[Prediction]:
    """Of each product, the prediction of the backend that dispatch runs: the same one for a kind of block and a level of
    density, not the faster one of every single product."""
    chosen = preferred(rows)
    return [row for row in rows if row.backend == chosen[_asked(row)]]


def _asked(row: Prediction) -> tuple[str, ...]:
    """What dispatch looks at."""
    outputs, inputs = map(int, row.block.split("x"))
    return row.op, row.direction, row.arithmetic, kind_of((outputs, inputs)), level_of(1 - row.sparsity)


def summary(card: Card, rows: Sequence[Prediction]) -> str:
    """One line per op, direction, arithmetic and block: what dispatch runs against the floor and cuDNN's, by level."""
    levels = sorted({row.sparsity for row in rows})
    chosen = dispatched(rows)
    missed = [row for row in chosen if row.ratio > LIMIT]
    head = ["op", "direction", "arithmetic", "block", "backend", *(f"{level:g}" for level in levels), "bound"]
    lines = [
        f"{card.name}: **{LABEL}**. Cells: predicted time / floor, median over the shapes (predicted time / "
        f"cuDNN's dense floor). Within {LIMIT:g}x of the floor: {len(chosen) - len(missed)} of {len(chosen)} products.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- | --- | --- | --- | --- |" + " ---: |" * len(levels) + " --- |",
    ]
    for key in dict.fromkeys((r.op, r.direction, r.arithmetic, r.block) for r in chosen):
        here = [r for r in chosen if (r.op, r.direction, r.arithmetic, r.block) == key]
        cells = []
        for level in levels:
            at = [r for r in here if r.sparsity == level]
            ratio, dense = median(r.ratio for r in at), median(r.seconds / r.dense for r in at)
            cells.append(f"{ratio:.1f}{'' if ratio <= LIMIT else ' !'} ({dense:.2f})")
        bound = max((r.bound for r in here), key=lambda b: sum(r.bound == b for r in here))
        lines.append("| " + " | ".join([*key, "/".join(sorted({r.backend for r in here})), *cells, bound]) + " |")
    return "\n".join([*lines, "", "`!` marks what is predicted to miss the goal of twice the floor."])


def report(name: str, rows: Sequence[Prediction]) -> dict:
    """What the JSON file holds: ``columns`` and, one list each, the ``rows``; ``load`` reads them."""
    chosen = dispatched(rows)
    columns = [field.name for field in fields(Prediction)]
    return {
        "basis": LABEL,
        "card": asdict(CARDS[name]),
        "samples": 128,
        "vertices": 25,
        "goal": f"at most {LIMIT:g} x the floor",
        "products": len(chosen),
        "within": sum(row.ratio <= LIMIT for row in chosen),
        "columns": columns,
        "rows": [[_short(getattr(row, name)) for name in columns] for row in rows],
    }


def load(report: dict) -> list[Prediction]:
    """The rows of a report."""
    return [Prediction(**dict(zip(report["columns"], row, strict=True))) for row in report["rows"]]


def to_json(report: dict) -> str:
    """The report with one line a row."""
    head = json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1)
    return head[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in report["rows"]) + "\n ]\n}\n"


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
