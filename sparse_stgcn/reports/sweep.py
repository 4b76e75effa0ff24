"""What the page of a sweep says: from its results, and from the scores of its runs where they are at hand."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import fusion, plots
from ..errors import UserError
from ..scores import Scores
from ..sweeps import tradeoff
from ..sweeps.collect import Entry, read
from .figures import embedded
from .page import Headline, Image, Page, Section, Table
from .run import settings
from .samples import archive_of, label_names, playback

__all__ = ["build"]

INPUT = ("data", "split", "fold", "layout")  # runs with the same have the same test sequences
LINES = 6  # more names than colours cannot be told apart in one figure


def build(path: Path, runs: Path | None = None, samples: int = 16, megabytes: float = 4.0) -> Page:
    """The page of a sweep's NAME.json.

    Args:
        runs: directory of the work directories; None: no sequences to play.
        samples: the test sequences that most runs get wrong; see ``run.build``.

    Raises:
        UserError: no results in it, or no scores under ``runs``.
    """
    if not path.is_file():
        raise UserError(f"Expected SOURCE to be a work directory, or the results of a sweep. Got {path}, which does not exist.")
    entries = [entry for entry in read(path) if not entry.get("former")]  # runs of another grid, which no table has either
    if not entries:
        raise UserError(f"Expected {path} to hold the results of a sweep. Got none yet.")
    points = tradeoff.points(entries, tradeoff.size)
    sections = [_accuracy(entries, points), _curves(entries), _sureness(entries), _table(entries)]
    if runs is not None and samples:
        sections.append(_hardest(entries, runs, samples, megabytes))
    shared = _shared(entries)
    sections.append(Section("Shared configuration", [Table(("key", "value"), settings(shared))], folded=True))
    machines = {text: None for entry in entries if "environment" in entry
                for text in [", ".join(f"{key} {value}" for key, value in settings(entry["environment"]))]}
    if machines:
        sections.append(Section("Environment", [Table(("of at least one run",), [(text,) for text in machines])], folded=True))
    return Page(path.stem, f"{len(entries)} results of a sweep", _headlines(entries), [s for s in sections if s is not None])


def _headlines(entries: Sequence[Entry]) -> list[Headline]:
    best = max(entries, key=lambda entry: entry["test"]["top1"])
    smallest = min(entries, key=lambda entry: entry["bytes"])
    hours = sum(sum(entry.get("seconds", {}).values()) for entry in entries) / 3600
    return [Headline("best top-1 accuracy", f"{best['test']['top1']:.2%}", best["name"]),
            Headline("smallest network", f"{smallest['bytes'] / 1e3:,.0f} kB",
                     f"{smallest['name']}, top-1 {smallest['test']['top1']:.2%}"),
            Headline("median top-1 accuracy", f"{statistics.median(entry['test']['top1'] for entry in entries):.2%}"),
            Headline("time", f"{hours:,.1f} h", "of all runs together")]


def _accuracy(entries: Sequence[Entry], points: Sequence[plots.Point]) -> Section:
    lines: dict[str, dict[float, list[float]]] = {}
    dense: list[float] = []
    single = len({entry["config"]["backbone"] for entry in entries}) == 1
    for entry, (group, _) in zip(entries, tradeoff.names(entries), strict=True):
        level = entry["config"]["sparsity"]
        if level == 0 and single:
            dense.append(entry["test"]["top1"])
        elif isinstance(level, (int, float)):
            lines.setdefault(group, {}).setdefault(level, []).append(entry["test"]["top1"])
    parts = []
    if 0 < len(lines) <= LINES:
        said = {name: ", ".join(f"{statistics.fmean(values):.1%} at {level:g}" for level, values in sorted(line.items()))
                for name, line in lines.items()}
        words = "Top-1 accuracy over sparsity. " + " ".join(f"{name}: {text}." for name, text in said.items())
        parts.append(Image(embedded(plots.lines(lines, "sparsity", dense=dense)), words))
    on_front = ", ".join(f"{p.group} {p.name} ({p.cost:,.0f} kB, {p.accuracy:.1%})" for p in plots.front(points))
    parts.append(Image(embedded(plots.pareto(points, "size of the file (kB)")),
                       f"Top-1 accuracy over the size of the file. No other network is better in both than: {on_front}."))
    return Section("Accuracy", parts, "Means over seeds and folds, with their standard deviation.")


def _curves(entries: Sequence[Entry]) -> Section | None:
    parts = []
    for group, histories in _by_level([entry for entry in entries if "history" in entry], lambda e: [e["history"]]).items():
        words = f"{group}: cross entropy, test accuracy and norm of the masked weights over the epochs. " + " ".join(
            f"At {level} the cross entropy ends at {statistics.fmean(run['loss'][-1] for run in runs):.3f}."
            for level, runs in histories.items())
        parts.append(Image(embedded(plots.curves(histories, group)), words))
    return Section("Training", parts, "Means over seeds and folds.") if parts else None


def _sureness(entries: Sequence[Entry]) -> Section | None:
    parts = []
    for group, values in _by_level(entries, lambda e: e["confidence"]["max_probability"]).items():
        words = f"{group}: distribution of the largest probability. " + " ".join(
            f"At {level} its median is {statistics.median(found):.2f}." for level, found in values.items())
        parts.append(Image(embedded(plots.violins(values, group)), words))
    return Section("Sureness", parts) if parts else None


def _by_level(entries: Sequence[Entry], value: Callable[[Entry], Sequence[Any]]) -> dict[str, dict[str, list[Any]]]:
    """Group -> level -> values of its entries, of the groups whose levels one figure can tell apart."""
    found: dict[str, dict[str, list[Any]]] = {}
    for entry, (group, level) in zip(entries, tradeoff.names(entries), strict=True):
        found.setdefault(group, {}).setdefault(level, []).extend(value(entry))
    return {group: levels for group, levels in found.items() if len(levels) <= LINES}


def _table(entries: Sequence[Entry]) -> Section:
    rows = []
    for entry in sorted(entries, key=lambda e: -e["test"]["top1"]):
        test, weights, sure = entry["test"], entry["weights"], entry["confidence"]
        rows.append((entry["name"], f"{test['top1']:.2%}", f"{test['mean_class']:.2%}",
                     f"{sure['expected_calibration_error']:.3f}", f"{sure['under_half']:.1%}",
                     f"{weights['maskable_kept_fraction']:.2f}", f"{weights['all_kept_fraction']:.2f}",
                     f"{entry['bytes'] / 1e3:,.0f}", f"{sum(entry['seconds'].values()):,.0f}" if "seconds" in entry else ""))
    head = ("run", "top-1", "mean class", "calibration error", "under 0.5", "kept, maskable", "kept, all", "kB", "seconds")
    return Section("Runs", [Table(head, rows)],
                   "Kept weights over those of one dense network, so that an ensemble can have more than 1.")


def _hardest(entries: Sequence[Entry], root: Path, samples: int, megabytes: float) -> Section:
    """The sequences that most runs get wrong, of the runs that have the input of the first one that is there."""
    there = [entry for entry in entries if (root / entry["name"] / "scores.npz").is_file()]
    if not there:
        raise UserError(f"Expected --runs to hold the work directories of the sweep, such as {root / entries[0]['name']}. Got "
                        "none with scores.npz.")
    alike = [entry for entry in there if all(entry["config"][key] == there[0]["config"][key] for key in INPUT)]
    found = [Scores.load(root / entry["name"] / "scores.npz") for entry in alike]
    mean = fusion.fuse([fusion.Member(entry["name"], s.sample, s.label, s.probability, s.logit)
                        for entry, s in zip(alike, found, strict=True)])
    wrong = dict.fromkeys(mean.sample.tolist(), 0)
    for scores in found:
        for name in scores.sample[scores.probability.argmax(1) != scores.label].tolist():
            wrong[name] += 1
    count = np.array([wrong[name] for name in mean.sample.tolist()])
    own = mean.probability[np.arange(len(mean.label)), mean.label]
    chosen = [(i, f"Wrong in {count[i]} of {len(found)} runs; the probabilities are their mean.")
              for i in np.lexsort((own, -count))[:samples].tolist()]
    folder = root / alike[0]["name"]
    return playback("Hardest sequences", f"those that most of {len(found)} runs get wrong.", archive_of(folder), mean, chosen,
                    label_names(folder, mean), megabytes)


def _shared(entries: Sequence[Entry]) -> dict[str, Any]:
    first = entries[0]["config"]
    return {key: value for key, value in first.items() if all(entry["config"].get(key) == value for entry in entries)}
