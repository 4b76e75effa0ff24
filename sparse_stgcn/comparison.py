"""Levels inside each other against levels that were trained apart: accuracy, storage and training time."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError, validating

__all__ = ["lines", "read_nested", "rows", "to_markdown"]

TOGETHER, APART, AVERAGE = "inside each other, ensemble", "trained apart, ensemble", "trained apart, weight average"
_SAME = ("backbone", "base_channels", "block", "density", "scope", "split", "fold", "stream", "missing", "align", "box",
         "sampler", "sequences", "clip_len", "num_person", "eval_clips")
_NOT_TRAINING = ("evaluation", "test")


def read_nested(folder: str, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """``result.json`` of a run of ``multilevel`` that can be compared with runs of these configurations.

    Raises:
        UserError: no such finished run, or one of other levels, network or input.
    """
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise UserError(f"Expected --nested to be the work directory of a finished run of sparse_stgcn.multilevel. Got "
                        f"{folder} without result.json.")
    with validating("--nested"):
        result = json.loads(path.read_text(encoding="utf-8"))
    config = result.get("config", {})
    # As text: the level of an automatic run is no number, and no level of a run of multilevel.
    levels, apart = sorted(f"{level:g}" for level in config.get("levels", [])), sorted(c.level for c in configs)
    if levels != apart:
        raise UserError(f"Expected --nested with the levels of the work directories, {' '.join(apart)}. "
                        f"Got {folder} with {' '.join(levels) or 'none'}.")
    defaults = TrainConfig()
    for key in _SAME:
        found = config.get(key, getattr(defaults, key))  # an older version had not every option
        if found != getattr(configs[0], key):
            raise UserError(f"Expected --nested to be of the same network and input. Got {key} {found} in {folder} and "
                            f"{getattr(configs[0], key)} in the work directories.")
    return result


def rows(nested: Mapping[str, Any], apart: Mapping[str, Any], work_dirs: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each way: top-1 of each level and of all together, what is kept, the size of the file, training seconds.

    Args:
        nested: ``result.json`` of ``multilevel``.
        apart: that of ``ensemble``, with or without ``average``.
        work_dirs: of the levels trained apart, whose training times are added.
    """
    single = [json.loads((Path(folder) / "result.json").read_text(encoding="utf-8")) for folder in work_dirs]
    seconds = sum(_training(result["seconds"]) for result in single)
    found = [_row(TOGETHER, nested, nested["file"]["bytes"], _training(nested["seconds"])),
             _row(APART, apart, apart["bytes"], seconds)]
    if "average" in apart:
        found.append(_row(AVERAGE, apart["average"], apart["average"]["bytes"], seconds))
    return found


def to_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table; accuracies and kept weights in percent."""
    levels = sorted(found[0]["levels"], key=float)
    text = [f"| way | {' | '.join(levels)} | all | maskable kept | parameters kept | file | training |",
            "| --- |" + " ---: |" * (len(levels) + 5)]
    for row in found:
        own = " | ".join(f"{row['levels'][level]:.2%}" if level in row["levels"] else "" for level in levels)
        text.append(f"| {row['way']} | {own} | {row['top1']:.2%} | {row['maskable_kept_fraction']:.1%} | "
                    f"{row['all_kept_fraction']:.1%} | {row['bytes'] / 1e3:,.0f} kB | {row['seconds']:,.0f} s |")
    return "\n".join([*text, "", *lines(found)]) + "\n"


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What levels inside each other lose or gain in points, and its time as a fraction; nothing for no rows."""
    if not found:
        return []
    together, apart = found[:2]
    points = {"ensemble": 100 * (together["top1"] - apart["top1"]),
              **{level: 100 * (value - apart["levels"][level]) for level, value in together["levels"].items()}}
    best = max(found, key=lambda row: row["top1"])
    gains = ", ".join(f"{name} {value:+.2f}" for name, value in points.items())
    return [f"compared  inside each other minus trained apart, points: {gains}; "
            f"training time {together['seconds'] / apart['seconds']:.2f} of it",
            f"best      {best['way']}, {best['top1']:.2%}"]


def _row(way: str, result: Mapping[str, Any], size: int, seconds: float) -> dict[str, Any]:
    weights = result["weights"]
    return {"way": way, "levels": {member["name"]: member["test"]["top1"] for member in result.get("members", [])},
            "top1": result["test"]["top1"], "maskable_kept_fraction": weights["maskable_kept_fraction"],
            "all_kept_fraction": weights["all_kept_fraction"], "bytes": size, "seconds": seconds}


def _training(seconds: Mapping[str, float]) -> float:
    return sum(value for key, value in seconds.items() if key not in _NOT_TRAINING)
