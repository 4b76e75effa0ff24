"""What the runs of a grid gave, in one JSON file: every table and figure is made from it alone.

An entry is one run, or one combination of runs (an ensemble of levels, a fusion of streams). Its ``config`` has every
option; a combination has its own name as the value of the key that it goes over, so that tables need not tell the two
apart.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import fusion
from ..checkpoint import write_atomically
from ..config import TrainConfig
from ..errors import UserError
from ..metrics import expected_calibration_error
from ..options import read_mapping
from ..scores import Scores
from .grid import DENSE_ANYWAY, Combine, Grid, Run
from .runner import data_name, differences, status

__all__ = ["Entry", "collect", "columns", "confidence", "matches", "read", "read_history", "recorded", "write"]

Entry = dict[str, Any]
FORMAT = 1
QUANTILES = 1000
# Where a run was computed; of "data" the name of the file alone is kept.
_LEFT_OUT = ("work_dir", "device", "threads", "workers", "tensorboard")
_NOTHING = ("ema", "init", "fold", "budget", "mask_file")  # None of these is a choice of its own, not one left to the data set


def collect(grid: Grid, root: Path, before: Sequence[Entry] = (), kept: Path | None = None) -> list[Entry]:
    """Entries of all finished runs under ``root`` and of the combinations whose members are finished: runs first.

    Args:
        before: entries of an earlier call: those that cannot be made again here are kept. Those of runs that the grid does not
            have any more, or has with other options, are marked ``former``, and belong into no table.
        kept: directory of the scores of runs that a combination may use: those of finished runs are copied to it, and those
            of runs in ``before`` are read from it, so that members may be trained in different places.
    """
    made: dict[str, Entry] = {}
    scores: dict[str, Scores] = {}
    for run in grid.runs:
        needed = kept is not None and any(run.config.to_dict()[c.over] in c.values for c in grid.combine)
        if status(run, root).state == "finished":
            made[run.name], scores[run.name] = _entry(run, root / run.name)
            if needed and kept is not None:
                kept.mkdir(parents=True, exist_ok=True)
                write_atomically(kept / f"{run.name}.npz", (root / run.name / "scores.npz").read_bytes())
        elif entry := recorded(run, before):
            made[run.name] = _current(entry)
            if needed and kept is not None and (kept / f"{run.name}.npz").exists():
                scores[run.name] = _own_scores(kept / f"{run.name}.npz", entry,
                                               f"remove the file, or run {run.name} again with --again")
    for combine in grid.combine:
        for members in _groups(combine, list(made.values())):
            names = [member["name"] for member in members]
            name = f"{combine.name}({'+'.join(names)})"
            if scores.keys() >= set(names):
                made[name], scores[name] = _combined(name, combine, members, [scores[member] for member in names])
            elif entry := _combined_before(name, combine, members, before):  # the scores of its members are elsewhere
                made[name] = _current(entry)
    place = {run.name: index for index, run in enumerate(grid.runs)}
    # An entry of the same name with other options stays, too: nothing that was measured is lost.
    former = [{**entry, "former": True} for entry in before
              if entry["name"] not in made or _whole(entry["config"]) != made[entry["name"]]["config"]]
    return [*sorted(made.values(), key=lambda entry: place.get(entry["name"], len(place))), *former]


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration with every option that there is now.

    What it does not name came after it, and did not change what the default is: an older version ran with that.
    """
    return {**{key: value for key, value in TrainConfig().to_dict().items() if key not in _LEFT_OUT}, **config}


def _current(entry: Entry) -> Entry:
    return {**{key: value for key, value in entry.items() if key != "former"}, "config": _whole(entry["config"])}


def _own_scores(path: Path, entry: Entry, remedy: str) -> Scores:
    """The scores of a run's own test, which another test may have overwritten; the same test elsewhere may round otherwise."""
    try:
        scores = Scores.load(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    top1, protocol = scores.metrics()["top1"], entry["test"].get("protocol")
    again = protocol is not None and {**protocol, "data": ""} == {**scores.protocol, "data": ""}
    if abs(top1 - entry["test"]["top1"]) > 1e-9 and not again:
        raise UserError(f"Expected {path} to hold the scores of the recorded run, top-1 {entry['test']['top1']:.4f}. "
                        f"Got top-1 {top1:.4f}; {remedy}.")
    return scores


def matches(entry: Entry, wanted: Mapping[str, Any]) -> bool:
    """Whether the entry has these options. What a dense run does not depend on, it has in every value."""
    config = entry["config"]
    dense = config["sparsity"] == 0
    return all(config[key] == value or (dense and key in DENSE_ANYWAY) for key, value in wanted.items())


def recorded(run: Run, entries: Sequence[Entry]) -> Entry | None:
    """The entry of a run that was finished here or elsewhere, if its options and its data set are still those of the grid."""
    return next((e for e in entries if e["name"] == run.name and "members" not in e and _is_of(run, e)), None)


def _is_of(run: Run, entry: Entry) -> bool:
    if (options := entry.get("options")) is not None:
        return not differences(options, run, Path(entry["name"]))
    # An older version wrote down what the options came to, not what was asked for.
    wanted = {key: value for key, value in run.config.to_dict().items()
              if key not in _LEFT_OUT and (value is not None or key in _NOTHING)}
    wanted["data"] = data_name(run.config.data)
    return wanted.items() <= _whole(entry["config"]).items()


def confidence(scores: Scores) -> dict[str, Any]:
    """How sure a network is: ECE, the share of samples whose largest probability is under 0.5, and its distribution.

    ``max_probability`` has the values themselves in ascending order, or 1000 quantiles of more.
    """
    largest = np.sort(scores.probability.max(1).astype(np.float64))
    if len(largest) > QUANTILES:
        largest = np.quantile(largest, np.linspace(0, 1, QUANTILES))
    return {"expected_calibration_error": expected_calibration_error(scores.probability, scores.label),
            "under_half": float((scores.probability.max(1) < 0.5).mean()),
            "max_probability": [round(value, 4) for value in largest.tolist()]}


def columns(history: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A run's history (see ``training.loop.Trainer``) by column, shortened: what the figures show."""
    return {"stage": [record["stage"] for record in history],
            "loss": [round(record["loss"], 4) for record in history],
            "masked_norm": [round(sum(record["masked_norms"]), 4) for record in history],
            "train_accuracy": [round(record["train_accuracy"], 4) for record in history],
            "test_accuracy": [record.get("test_accuracy") for record in history]}


def read_history(path: Path) -> list[dict[str, Any]]:
    """The history of a run, finished or not: of its work directory, its ``result.json`` or its ``log.jsonl``.

    Raises:
        UserError: no such file, not such a file, or no epoch in it.
    """
    if path.is_dir():
        path = next((file for name in ("result.json", "log.jsonl") if (file := path / name).is_file()), path / "log.jsonl")
    try:
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)["history"]
        if not records or not all("loss" in record and "stage" in record for record in records):
            raise ValueError("no epochs")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"Expected {path} to hold the history of a run. Got: {error}.") from error
    return records


def write(grid: Grid, entries: Sequence[Entry], path: Path) -> None:
    """Write the file, one entry a line."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    text = f'{{"format": {FORMAT}, "grid": {json.dumps(grid.name)}, "entries": [\n{lines}\n]}}\n'
    write_atomically(path, text.encode())


def read(path: Path) -> list[Entry]:
    """The entries of a file written by :func:`write`; none if there is no file.

    Raises:
        UserError: not such a file.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return list(content["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Expected {path} to hold the results of a sweep. Got: {error}.") from error


def _entry(run: Run, work_dir: Path) -> tuple[Entry, Scores]:
    result = json.loads((work_dir / "result.json").read_text())
    config = _whole({key: value for key, value in result["config"].items() if key not in _LEFT_OUT})
    config["data"] = data_name(config["data"])
    scores = _own_scores(work_dir / "scores.npz", result, f"python -m sparse_stgcn.evaluate {work_dir} makes them again")
    test = {key: result["test"][key] for key in ("top1", "top5", "mean_class", "samples")}
    file = work_dir / "options.yaml"
    options = {"options": read_mapping(file)} if file.exists() else {}
    entry = {"name": run.name, **options, "config": config, "test": test,
             "confidence": confidence(scores), "weights": result["weights"], "bytes": result["file"]["bytes"],
             "seconds": result["seconds"], "environment": result["environment"], "history": columns(result["history"])}
    return entry, scores


def _groups(combine: Combine, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries with all the values, in their order, and everything else equal; a dense run fits to any warm-up and mask."""
    anchor = next((value for value in combine.values if value != 0), combine.values[0])
    for entry in entries:
        if entry["config"][combine.over] != anchor:
            continue
        same = {key: value for key, value in entry["config"].items() if key != combine.over}
        found = [entry if value == anchor else next((e for e in entries if matches(e, {**same, combine.over: value})), None)
                 for value in combine.values]
        members = [member for member in found if member is not None]
        # A dense run has any value of what it does not depend on, but is no company for itself.
        if len({member["name"] for member in members}) == len(combine.values):
            yield members


def _shown(combine: Combine, members: Sequence[Entry]) -> dict[str, Any]:
    """What all members of a combination have, under its own name where they differ."""
    like = next((member for member in members if member["config"]["sparsity"] != 0), members[0])
    return {**like["config"], combine.over: combine.name}


def _combined_before(name: str, combine: Combine, members: Sequence[Entry], before: Sequence[Entry]) -> Entry | None:
    """The entry of such a combination of such members that was made where their scores are."""
    fused = _fused(combine)
    return next((entry for entry in before if entry["name"] == name and _whole(entry["config"]) == _shown(combine, members)
                 and entry.get("fused", fused) == fused), None)


def _fused(combine: Combine) -> dict[str, Any]:
    return {"weights": None if combine.weights is None else list(combine.weights), "on": combine.on}


def _combined(name: str, combine: Combine, members: Sequence[Entry], scores: Sequence[Scores]) -> tuple[Entry, Scores]:
    files = [fusion.Member(member["name"], s.sample, s.label, s.probability, s.logit)
             for member, s in zip(members, scores, strict=True)]
    fused = fusion.fuse(files, combine.weights, combine.on)
    dense, kept = members[0]["weights"], [member["weights"] for member in members]
    weights = {"maskable": dense["maskable"], "maskable_kept": sum(w["maskable_kept"] for w in kept),
               "all": dense["all"], "all_kept": sum(w["all_kept"] for w in kept)}
    weights |= {f"{key}_kept_fraction": weights[f"{key}_kept"] / weights[key] for key in ("maskable", "all")}
    entry = {"name": name, "config": _shown(combine, members), "members": [member["name"] for member in members],
             "fused": _fused(combine),
             "test": {**fused.metrics(), "samples": len(fused.label)}, "confidence": confidence(fused),
             "weights": weights, "bytes": sum(member["bytes"] for member in members)}
    return entry, fused
