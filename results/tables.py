"""Writes the tables of README and docs/ from the results beside this file: python results/tables.py.

A table stands between ``<!-- NAME: command that made the results -->`` and ``<!-- /NAME -->``; a test says whether all are
up to date.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparse_stgcn.benchmark.table import OURS, Row, pivot

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/results.md")
BACKBONES = {"stgcn": "ST-GCN", "aagcn": "AA-GCN", "ctrgcn": "CTR-GCN", "dgstgcn": "DG-STGCN"}
LEVELS = (0.6, 0.8, 0.95, 0.99)
SEEDS = (0, 1, 2)
MARKED = re.compile(r"(<!-- (\w+)(?:: .*?)? -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[Row]:
    """Rows of a benchmark; an output that was not the reference's is an error."""
    found = [Row(**row) for row in read(name)["rows"]]
    wrong = [row.label for row in found if not row.error < 1e-3]
    if wrong:
        raise ValueError(f"Expected rows whose error is below 1e-3 in {name}.json. Got {wrong}. Run that benchmark again.")
    return found


def benchmark(name: str) -> str:
    """The first table of a benchmark."""
    return pivot(rows(name))


def grid(name: str, table: str = "accuracy") -> str:
    """A table of a sweep's report."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    return text.split(f"## {table}\n\n")[1].split("\n\n")[0]


def summary() -> str:
    """What 0.95 in blocks of 8x1 buys: a column for each backbone."""
    def ratio(name: str, backbone: str, what: str) -> str:
        wanted = (OURS, backbone, what, 0.95, "8x1")
        row, = (r for r in rows(name) if (r.name, r.subject, r.what, r.sparsity, r.block) == wanted)
        return f"{row.speedup:.1f}x ({1e3 * row.seconds:.3g} ms)"

    def file(backbone: str) -> str:
        small, large = (read(f"synthetic_{backbone}_{level}")["file"]["bytes"] / 1e6 for level in ("0.95", "dense"))
        return f"{large:.1f} → {small:.2f} MB"

    accuracy = {entry["name"]: entry["test"]["top1"] for entry in read("nw_ucla_box")["entries"] if not entry.get("former")}

    def mean(names: Sequence[str]) -> str:
        found = [accuracy[name] for name in names if name in accuracy]
        return f"{100 * sum(found) / len(found):.1f}" if found else "?"

    def reached(backbone: str) -> str:
        members = ["+".join(f"{backbone}_{level:g}_seed{seed}" for level in LEVELS) for seed in SEEDS]
        return " → ".join(mean(names) for names in (
            [f"{backbone}_dense_seed{seed}" for seed in SEEDS], [f"{backbone}_0.95_seed{seed}" for seed in SEEDS],
            [f"ensemble({names})" for names in members])) + " %"

    lines = {"inference, against the best dense engine (Zen 5)": lambda b: ratio("bench_networks", b, "inference"),
             "fine-tuning step, against PyTorch's best (Xeon)": lambda b: ratio("bench_training_xeon", b, "training step"),
             "checkpoint, dense → 0.95": file,
             "NW-UCLA, top-1, mean of the seeds, dense → 0.95 → four levels together": reached}
    return "\n".join([f"| | {' | '.join(BACKBONES.values())} |", f"| --- |{' ---: |' * len(BACKBONES)}",
                      *(f"| {name} | {' | '.join(cell(b) for b in BACKBONES)} |" for name, cell in lines.items())])


def levels() -> str:
    """ST-GCN's levels, prepared clips: trained apart, inside each other by growing, and by steps that train several."""
    def line(name: str, top1: dict[str, float], together: float, kept: float) -> str:
        cells = [*(f"{100 * top1[f'{level:g}']:.1f}" for level in LEVELS), f"{100 * together:.1f}", f"{kept:.2f}"]
        return f"| {name} | {' | '.join(cells)} |"

    def nested(name: str, file: str) -> str:
        result = read(file)
        top1 = {member["name"]: member["test"]["top1"] for member in result["members"]}
        return line(name, top1, result["test"]["top1"], result["weights"]["maskable_kept_fraction"])

    apart = {entry["name"]: entry for entry in read("nw_ucla_box")["entries"]}
    names = {f"{level:g}": f"stgcn_{level:g}_seed0" for level in LEVELS}
    ensemble = apart[f"ensemble({'+'.join(names.values())})"]
    single = {level: apart[name]["test"]["top1"] for level, name in names.items()}
    return "\n".join([
        f"| | {' | '.join(f'{level:g}' for level in LEVELS)} | all four | weights kept |", f"| --- |{' ---: |' * 6}",
        line("trained apart", single, ensemble["test"]["top1"], ensemble["weights"]["maskable_kept_fraction"]),
        nested("`--schedule growing`", "nw_ucla_box_growing_seed0"),
        nested("`--schedule together`", "nw_ucla_box_levels_seed0")])


def lottery() -> str:
    """Top-1 of tickets on frozen weights over sparsity."""
    result = read("nw_ucla_lottery/lottery")
    found = {(point["init"], point["sparsity"]): f"{100 * point['top1']:.1f}" for point in result["points"]}
    dense = {"pretrained": f"{100 * result['pretrained']['test']['top1']:.1f}"}
    return "\n".join([f"| frozen weights | dense | {' | '.join(f'{level:g}' for level in LEVELS)} |", f"| --- |{' ---: |' * 5}",
                      *(f"| {init} | {dense.get(init, '–')} | {' | '.join(found.get((init, level), '–') for level in LEVELS)} |"
                        for init in ("pretrained", "random"))])


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary, "nw_ucla_box_nested": levels, "nw_ucla_lottery": lottery,
    **{name: partial(benchmark, name) for name in ("bench_networks", "bench_training_xeon", "bench_ops")},
    **{name: partial(grid, name) for name in ("nw_ucla_box", "nw_ucla", "sbu", "auto_nw_ucla", "auto_ui_prmd")},
    "nw_ucla_box_ablations": partial(grid, "nw_ucla_box", "ablations"),
}


def render(text: str) -> str:
    """The page with every marked table as the results have it."""
    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[4]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
