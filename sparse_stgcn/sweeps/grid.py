"""Grid: the YAML file that lists the runs of an experiment, how they are combined, and its tables and figures.

    train: {data: nw_ucla.npz, epochs: 70}        # options of every run: keys of python -m sparse_stgcn.train
    runs:                                         # each entry is the product of its lists
    - {backbone: stgcn, sparsity: [0, 0.95], seed: [0, 1, 2]}
    - {backbone: stgcn, sparsity: 0.95, block: 1x1, seed: [0, 1, 2]}
    combine:                                      # weighted mean of the scores over the values of one key
    - {name: ensemble, over: sparsity, values: [0.6, 0.8, 0.95, 0.99]}
    tables:
      accuracy: {rows: [backbone, block], columns: sparsity}
    figures:
      figure3: {kind: lines, x: sparsity, lines: block}

A relative ``data`` is looked up under the directory that ``--data`` or SPARSE_STGCN_DATA names.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import TrainConfig
from ..errors import UserError, one_of
from ..fusion import KINDS, parse_weights

__all__ = ["DENSE_ANYWAY", "Combine", "Grid", "Run", "Table"]

# The parts of a file, and what stands for one that is left empty.
PARTS: Mapping[str, Any] = {"train": {}, "runs": [], "combine": [], "tables": {}, "figures": {}}
FIGURES = {"lines": {"x", "lines"}, "curves": {"lines"}, "violins": {"over"}}
# What a dense run does not depend on, so that one dense run serves all values of these keys.
DENSE_ANYWAY = ("block", "method", "density", "scope", "lasso", "lasso_schedule", "lasso_step", "lasso_group",
                "warmup_epochs")
_SET_ELSEWHERE = ("work_dir", "config", "resume", "device", "threads", "workers")
# How a value stands in the name of a run; any other key stands before its value.
_NAMED_BY_VALUE = ("backbone", "stream", "block", "density", "method", "split")


@dataclass(frozen=True)
class Run:
    """One training: its name, which is also its directory, and its options."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Combine:
    """Scores averaged over ``values`` of the key ``over``, everything else equal; in tables the value ``name``."""

    name: str
    over: str
    values: tuple[Any, ...]
    weights: tuple[float, ...] | None = None
    on: str = "probability"


@dataclass(frozen=True)
class Table:
    """Rows, columns, and the keys averaged over; ``where`` keeps only entries with these values."""

    name: str
    rows: tuple[str, ...]
    columns: str
    average: tuple[str, ...] = ("seed", "fold")
    metric: str = "top1"
    where: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Grid:
    """What a grid file says, checked."""

    name: str
    runs: tuple[Run, ...]
    combine: tuple[Combine, ...]
    tables: tuple[Table, ...]
    figures: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> Grid:
        """Read and check a grid file; whether the data exist is checked when something is to be run.

        Raises:
            UserError: no such file, not YAML, an unknown key, a bad value, or a part that refers to nothing.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"Expected GRID to be a file that can be read. Got {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"Expected {path} to be YAML. Got: {error}.") from error
        if not isinstance(content, Mapping) or not content.get("runs"):
            raise UserError(f"Expected {path} to have a list 'runs' with at least one entry. Got none.")
        for part, value in content.items():
            one_of(f"each part of {path}", part, list(PARTS))
            _a(list if part in ("runs", "combine") else Mapping, value or PARTS[part], f"'{part}'", path)
        runs = tuple(_unique(_expand(content.get("train") or {}, content["runs"], path)))
        combine = tuple(_combine(entry, runs, path) for entry in content.get("combine") or ())
        tables = tuple(_table(name, entry, path) for name, entry in (content.get("tables") or {}).items())
        for table, mixed in itertools.product(tables, combine):
            if mixed.over in table.average:
                raise UserError(f"Expected table {table.name} in {path} not to average over {mixed.over}, which {mixed.name} "
                                f"combines. Got average: {list(table.average)}; leave {mixed.over} out, and make it a row or "
                                "the columns.")
        figures = content.get("figures") or {}
        for name, figure in figures.items():
            _check_figure(name, figure, path)
        return cls(path.stem, runs, combine, tables, figures)


def _expand(common: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Run]:
    """One run for every combination of the listed values of every entry, in the order of the file."""
    for entry in entries:
        _a(Mapping, entry, "each entry of 'runs'", path)
        for key in (*common, *entry):
            if key in _SET_ELSEWHERE:
                raise UserError(f"Expected {path} without {key}, which the sweep sets. Remove it.")
        if empty := [key for key, value in entry.items() if value == []]:
            raise UserError(f"Expected values of {empty[0]} in {path}. Got an empty list; remove the key, or the entry.")
        axes = [[(key, v) for v in (value if isinstance(value, list) else [value])] for key, value in entry.items()]
        for options in itertools.product(*axes):
            config = TrainConfig.from_mapping({**common, **dict(options)}, path)
            replace(config, data=None, fold=None).validate()
            dense = config.sparsity == 0
            parts = [_label(key, getattr(config, key)) for key, _ in options if not (dense and key in DENSE_ANYWAY)]
            if dense:
                default = TrainConfig()
                config = replace(config, **{key: getattr(default, key) for key in DENSE_ANYWAY})
            yield Run("_".join(parts) or config.backbone, config)


def _unique(runs: Iterator[Run]) -> Iterator[Run]:
    """Each configuration once, under its first name.

    Raises:
        UserError: two configurations with one name.
    """
    seen: list[TrainConfig] = []
    names: set[str] = set()
    for run in runs:
        if run.config not in seen:
            if run.name in names:
                raise UserError(f"Expected runs that differ in a listed key. Got two different runs {run.name}.")
            seen.append(run.config)
            names.add(run.name)
            yield run


def _label(key: str, value: Any) -> str:
    if key == "sparsity":
        text = value if isinstance(value, str) else f"{value:g}" if value else "dense"
    elif key == "data":
        text = Path(value).stem
    else:
        text = str(value) if key in _NAMED_BY_VALUE else f"{key}{value}"
    return re.sub(r"[^\w.+-]", "-", text)


def _combine(entry: Mapping[str, Any], runs: Sequence[Run], path: Path) -> Combine:
    given = _keys(entry, "combine", {"name", "over", "values"}, {"weights", "on"}, path)
    over = _option(given["over"], path)
    if not _a(list, given["values"], "values of 'combine'", path):
        raise UserError(f"Expected values of combine {given['name']} in {path} to be a list of {over}. Got an empty one.")
    values = tuple(getattr(TrainConfig.from_mapping({over: value}, path), over) for value in given["values"])
    known = {getattr(run.config, over) for run in runs}
    if missing := [value for value in values if value not in known]:
        raise UserError(f"Expected each value of combine {given['name']} to be a {over} of some run. Got {missing[0]!r}.")
    asked = given.get("weights", "equal")
    if isinstance(asked, int):  # 2:2:1:1 without quotes is a number to the base of 60 in YAML
        raise UserError(f"Expected weights of combine {given['name']} in {path} to be a text or a list. Got the number "
                        f"{asked}; put them in quotes, or in brackets.")
    weights, on = parse_weights(",".join(map(str, asked)) if isinstance(asked, list) else str(asked), len(values))
    if weights is not None and not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise UserError(f"Expected weights of combine {given['name']} in {path} to be numbers >= 0, not all 0. Got {asked}.")
    on = str(given.get("on", on))
    one_of(f"on of combine {given['name']} in {path}", on, KINDS)
    return Combine(str(given["name"]), over, values, weights, on)


def _table(name: str, entry: Mapping[str, Any], path: Path) -> Table:
    given = _keys(entry, "tables", {"rows", "columns"}, {"average", "metric", "where"}, path)
    rows, average = (tuple(_a(list, [v] if isinstance(v, str) else v, f"rows and average of {name}", path))
                     for v in (given["rows"], given.get("average", list(Table.average))))
    for key in (*rows, given["columns"], *average, *_a(Mapping, given.get("where") or {}, f"where of {name}", path)):
        _option(key, path)
    metric = given.get("metric", "top1")
    one_of(f"metric in {path}", metric, ("top1", "top5", "mean_class"))
    return Table(str(name), rows, given["columns"], average, metric, given.get("where"))


def _check_figure(name: str, figure: Mapping[str, Any], path: Path) -> None:
    kind = figure.get("kind") if isinstance(figure, Mapping) else None
    one_of(f"kind of figure {name} in {path}", kind, tuple(FIGURES))
    _keys(figure, f"figure {name}", {"kind", *FIGURES[str(kind)]}, {"where", "names", "title"}, path)
    for part in ("where", "names"):
        _a(Mapping, figure.get(part) or {}, f"{part} of {name}", path)
    for key in (*(figure[k] for k in FIGURES[str(kind)]), *(figure.get("where") or {})):
        _option(key, path)


def _a(kind: type, value: Any, what: str, path: Path) -> Any:
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "keys with values"
        raise UserError(f"Expected {what} in {path} to be {wanted}. Got {value!r:.80}.")
    return value


def _keys(entry: Any, where: str, needed: set[str], optional: set[str], path: Path) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping) or not needed <= set(entry) <= needed | optional:
        got = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)
        raise UserError(f"Expected {where} in {path} to have the keys {', '.join(sorted(needed))} and perhaps "
                        f"{', '.join(sorted(optional))}. Got {got}.")
    return entry


def _option(key: Any, path: Path) -> str:
    one_of(f"each key in {path}", key, [f.name for f in fields(TrainConfig)])
    return str(key)
