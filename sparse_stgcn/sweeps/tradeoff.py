"""Accuracy against size or latency: networks of sweeps and runs, with the timings of benchmarks."""
from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..plots import Point
from .collect import Entry
from .grid import DENSE_ANYWAY

__all__ = ["Results", "latency", "names", "points", "read_results", "size"]

# What two runs of one network may differ in: they are averaged over these, and where they ran does not count.
_AVERAGED = ("seed", "fold", "work_dir", "device", "threads", "workers", "tensorboard")

_ROW = ("what", "subject", "batch", "threads", "sparsity", "block", "density", "seconds")  # what is read of a timing

Cost = Callable[[Entry], "float | None"]


@dataclass
class Results:
    """What some files hold.

    Attributes:
        entries: networks with their ``config``, ``test`` and ``bytes``.
        rows: timings, as ``benchmark.table.Row`` has them.
        setting: of the benchmark: ``persons`` and ``frames`` of a sample, and the ``processor``.
    """

    entries: list[Entry] = field(default_factory=list)
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    setting: Mapping[str, Any] = field(default_factory=dict)


def read_results(paths: Sequence[str | Path]) -> Results:
    """Results of sweeps (NAME.json), of runs (work directories or their result.json) and of benchmarks, in any mixture.

    Entries of a sweep that are marked ``former`` are left out, as they are of its tables.

    Raises:
        UserError: a file that is none of these, or benchmarks of different persons, frames or processors.
    """
    results = Results()
    first: Path | None = None
    for given in map(Path, paths):
        path = given / "result.json" if given.is_dir() else given
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if "entries" in content:
                results.entries += [_checked(entry) for entry in content["entries"] if not entry.get("former")]
            elif "rows" in content:
                results.rows += [{key: row[key] for key in _ROW} for row in content["rows"]]
                setting = {"persons": content["config"]["persons"], "frames": content["config"]["frames"],
                           "processor": content["environment"]["processor"]}
                first = first or path
                results.setting = results.setting or setting
                _same_setting(results.setting, setting, first, path)
            else:
                results.entries.append(_checked({**content, "bytes": content["file"]["bytes"]}))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"Expected {path} to hold results of sparse_stgcn.sweep, train or bench. Got: "
                            f"{' '.join(str(error).split())}.") from error
    return results


def points(entries: Sequence[Entry], cost: Cost) -> list[Point]:
    """A point per network: the mean over its runs, seeds and folds. Networks whose cost is None are left out."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry, name in zip(entries, names(entries), strict=True):
        price = cost(entry)
        if price is not None:
            groups.setdefault(name, []).append((price, entry["test"]["top1"]))
    return [Point(group, level, statistics.fmean(price for price, _ in runs), statistics.fmean(top1 for _, top1 in runs),
                  statistics.stdev([top1 for _, top1 in runs]) if len(runs) > 1 else 0.0)
            for (group, level), runs in groups.items()]


def names(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """(group, level) of each entry, equal for runs that differ in seed and fold only.

    The group is the backbone and the values of all else that differs between the entries; a dense run has none of what it
    does not depend on, a combination none of what its members differ in. The level is the sparsity.
    """
    if not entries:
        return []
    varied = ["backbone", *(key for key in entries[0]["config"] if key not in ("backbone", "sparsity", *_AVERAGED)
                            and len({str(entry["config"].get(key)) for entry in entries if _has(entry, key)}) > 1)]
    found = []
    for entry in entries:
        config, level = entry["config"], entry["config"]["sparsity"]
        values = [config.get(key) for key in varied if _has(entry, key)]
        # A combination of seeds or folds is no run of its members' network.
        values += [config[key] for key in ("seed", "fold") if isinstance(config.get(key), str)]
        found.append((", ".join(str(value) for value in values if value is not None),
                      level if isinstance(level, str) else f"{level:g}" if level else "dense"))
    return found


def _has(entry: Entry, key: str) -> bool:
    """Whether the entry has one value of ``key``: a dense run has any of what it does not depend on."""
    config = entry["config"]
    mixed = "members" in entry and config.get(key) is None
    return not mixed and (config["sparsity"] != 0 or key not in DENSE_ANYWAY)


def size(entry: Entry) -> float:
    """Kilobytes (1000 bytes) of the network's file."""
    return entry["bytes"] / 1e3


def latency(results: Results, batch: int = 1) -> tuple[Cost, str]:
    """(milliseconds per sample of an entry's network, or None where it was not timed; how and where they were measured).

    A sparse network takes the time of this package at its backbone, sparsity, block and density; a dense one that of the
    fastest dense engine. The benchmark's samples and classes need not be those of the run.

    Raises:
        UserError: no timing of inference at this batch size.
    """
    rows = [row for row in results.rows if row["what"] == "inference"]
    batches = sorted({row["batch"] for row in rows})
    if batch not in batches:
        raise UserError(f"Expected --batch to be one of the benchmark's batch sizes, {', '.join(map(str, batches)) or 'none'}. "
                        f"Got {batch}; time it with python -m sparse_stgcn.bench.")
    threads = max(row["threads"] for row in rows if row["batch"] == batch)
    rows = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads)]

    def milliseconds(entry: Entry) -> float | None:
        if "members" in entry:  # several networks
            return None
        config = entry["config"]
        mine = [row for row in rows if row["subject"] == config["backbone"] and (
            not row["sparsity"] if config["sparsity"] == 0 else
            all(row[key] == config[key] for key in ("sparsity", "block", "density")))]
        return min((1e3 * row["seconds"] / batch for row in mine), default=None)

    setting = results.setting
    return milliseconds, (f"latency (ms per sample of {setting['persons']} x {setting['frames']} frames; batch {batch}, "
                          f"{threads} threads, {setting['processor']})")


def _same_setting(first: Mapping[str, Any], other: Mapping[str, Any], first_path: Path, path: Path) -> None:
    # One axis has the latencies of all: those of another machine or another input do not belong on it.
    for key, value in first.items():
        if other[key] != value:
            raise UserError("Expected benchmarks of the same persons, frames and processor in one figure. Got "
                            f"{key} {value} in {first_path} and {other[key]} in {path}; draw a figure of each.")


def _checked(entry: Mapping[str, Any]) -> Entry:
    """The entry, if it has what points are made of; KeyError or TypeError otherwise."""
    found = dict(entry)
    config, _ = found["config"], (float(found["test"]["top1"]), float(found["bytes"]))
    if config["backbone"] is None or config["sparsity"] is None:
        raise TypeError("a network without backbone or sparsity")
    return found
