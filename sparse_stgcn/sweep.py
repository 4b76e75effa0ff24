"""python -m sparse_stgcn.sweep GRID.yaml: run what is missing of an experiment, and write its tables and figures."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .errors import TrainingError, UserError, run, validating
from .options import OptionalFloat, OptionalInt, OptionalStr

if TYPE_CHECKING:
    from .sweeps.collect import Entry
    from .sweeps.grid import Grid, Run

__all__ = ["SweepConfig", "main"]

DATA = "SPARSE_STGCN_DATA"


@dataclass
class SweepConfig:
    """Run what is missing of a grid of trainings, then write results, tables and figures.

    Each run is one process of sparse_stgcn.train in a directory of its own. A run that was killed goes on from its last
    epoch when the sweep is called again.
    """

    grid: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GRID.yaml")]
    """File that lists the runs."""
    data: OptionalStr = None
    """Directory of the data sets that the grid names. Default: the environment variable SPARSE_STGCN_DATA, or here."""
    runs: OptionalStr = None
    """Directory of the work directories. Default: runs/ and the name of the grid."""
    out: str = "results"
    """Directory of the results: NAME.json, NAME.md, NAME_TABLE.csv, NAME_FIGURE.png, and NAME_scores/ for combinations."""
    time_limit: OptionalFloat = None
    """Minutes after which runs are stopped; the next call goes on with them."""
    jobs: OptionalInt = None
    """Runs at a time. Default: one per device, or per processor."""
    threads: OptionalInt = None
    """CPU threads per run. Default: the processors divided by the jobs."""
    devices: tuple[str, ...] = ()
    """Devices that the runs take in turn, e.g. cuda:0 cuda:1. Default: all CUDA devices, or the CPU."""
    only: OptionalStr = None
    """Names of the runs to run, with * and ?, e.g. 'stgcn*seed0'."""
    again: bool = False
    """Also run what is recorded in NAME.json but has no work directory here."""
    list: bool = False
    """Show the state of every run, and stop."""
    report: bool = False
    """Run nothing: make tables and figures from NAME.json and the runs that are finished."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(SweepConfig, args=argv, prog="python -m sparse_stgcn.sweep")
    from .sweeps.grid import Grid

    grid = Grid.read(asked.grid)
    root = Path(asked.runs or Path("runs") / grid.name)
    chosen = [r for r in grid.runs if asked.only is None or fnmatch(r.name, asked.only)]
    if not chosen:
        raise UserError(f"Expected --only to match a run of {asked.grid}. Got {asked.only!r}; --list shows their names.")
    known = recorded(grid, chosen, Path(asked.out))
    if asked.list:
        print("\n".join(listing(chosen, root, known)))
        return 0
    for name, value in (("--jobs", asked.jobs), ("--threads", asked.threads)):
        if value is not None and value < 1:
            raise UserError(f"Expected {name} >= 1. Got {value}.")
    if asked.time_limit is not None and not asked.time_limit > 0:
        raise UserError(f"Expected --time-limit to be minutes above 0. Got {asked.time_limit:g}.")
    wanted = [r for r in chosen if asked.again or r.name not in known or (root / r.name).exists()]
    if len(wanted) < len(chosen):
        print(f"recorded  {len(chosen) - len(wanted)} of {len(chosen)} runs in {asked.out}; --again runs them here as well")
    failed = [] if asked.report else train(asked, wanted, root)
    report(grid, root, Path(asked.out))
    print("\n".join(listing(chosen, root, known)[-1:]))
    if failed:
        raise TrainingError(f"Expected all runs to succeed. Got {len(failed)} that failed, {failed[0].name} first; see "
                            f"{root / failed[0].name / 'train.log'}, mend it, and call the sweep again.")
    return 0


def train(asked: SweepConfig, chosen: Sequence[Run], root: Path) -> list[Run]:
    """Run what is missing; the runs that failed."""
    from .sweeps import runner

    devices = asked.devices or _cuda_devices()
    jobs = asked.jobs or len(devices) or runner.processors()
    threads = asked.threads or max(1, runner.processors() // jobs)
    data = asked.data or os.environ.get(DATA)
    machine = runner.Machine(root, Path(data) if data else None, jobs, threads, devices)
    runner.check(chosen, machine)
    with validating("--runs"):
        root.mkdir(parents=True, exist_ok=True)
    print(f"machine   {jobs} at a time, {threads} threads each; work directories in {root}")
    # A shell's background job ignores Ctrl-C and would hand that on to the runs, which are to be stopped by it; and an
    # end by SIGTERM has to stop the runs as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return runner.drive(chosen, machine, None if asked.time_limit is None else 60 * asked.time_limit)


def recorded(grid: Grid, runs: Sequence[Run], out: Path) -> dict[str, Entry]:
    """Name -> entry of the runs that the results hold already, wherever they were trained."""
    from .sweeps import collect

    entries = collect.read(out / f"{grid.name}.json")
    found = {run.name: collect.recorded(run, entries) for run in runs}
    return {name: entry for name, entry in found.items() if entry is not None}


def report(grid: Grid, root: Path, out: Path) -> None:
    """Write the results so far, their tables and their figures."""
    from .checkpoint import write_atomically
    from .sweeps import collect, tables
    from .sweeps.figures import draw

    with validating("--out"):
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{grid.name}.json"
        entries = collect.collect(grid, root, collect.read(path), out / f"{grid.name}_scores")
        if not entries:
            print("results   none yet")
            return
        collect.write(grid, entries, path)
        entries, recorded = [entry for entry in entries if not entry.get("former")], len(entries)
        if recorded > len(entries):
            print(f"former    {recorded - len(entries)} entries of runs that the grid has not, or has with other options: "
                  f"they stay in {path} and are in no table")
        text = [f"# {grid.name}\n"]
        for table in grid.tables:
            found = tables.cells(table, entries)
            text.append(f"## {table.name}\n\n{tables.to_markdown(table, found)}")
            write_atomically(out / f"{grid.name}_{table.name}.csv", tables.to_csv(table, found).encode())
        write_atomically(out / f"{grid.name}.md", "\n".join([*text, confidence_table(entries)]).encode())
        drawn = draw(grid, entries, out)
    print("\n".join([*text[1:], f"results   {path}, with {grid.name}.md, CSV tables and {len(drawn)} figures beside it"]))


def confidence_table(entries: Sequence[Entry]) -> str:
    """How sure each run and each combination is: expected calibration error, and samples under 0.5."""
    rows = [f"| {entry['name']} | {entry['test']['top1']:.2%} | {entry['confidence']['expected_calibration_error']:.3f} | "
            f"{entry['confidence']['under_half']:.1%} |" for entry in entries]
    return "\n".join(["## confidence\n", "| run | top-1 | expected calibration error | largest probability under 0.5 |",
                      "| --- | ---: | ---: | ---: |", *rows]) + "\n"


def listing(runs: Sequence[Run], root: Path, known: Mapping[str, Entry]) -> list[str]:
    """One line per run, and the totals; ``known`` are the entries of runs that the results hold."""
    from .sweeps.runner import Status, status

    found: dict[str, Status] = {r.name: status(r, root) for r in runs}
    for name, entry in known.items():
        if found[name].state in ("missing", "other"):
            found[name] = Status("recorded", top1=entry["test"]["top1"])
    width = max(len(name) for name in found)
    lines = []
    for name, now in found.items():
        detail = (f"top-1 {now.top1:.2%}" if now.top1 is not None else
                  f"{now.done} of {now.epochs} epochs" if now.epochs else "")
        error = now.error.splitlines()[-1] if now.error else ""
        lines.append(f"{now.state:<9} {name:<{width}}  {detail}  {error}".rstrip())
    states = [now.state for now in found.values()]
    order = ("finished", "recorded", "running", "stopped", "failed", "other", "missing")
    return [*lines, "runs      " + ", ".join(f"{states.count(s)} {s}" for s in order if s in states) + f" of {len(states)}"]


def _cuda_devices() -> tuple[str, ...]:
    import torch

    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))


if __name__ == "__main__":
    sys.exit(run(main))
