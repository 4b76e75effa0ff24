"""What a sweep takes for a result of its grid, and what it combines: on work directories that hold results and no network."""
from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sparse_stgcn import sweep
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.scores import Scores
from sparse_stgcn.sweeps import collect
from sparse_stgcn.sweeps.grid import Grid
from sparse_stgcn.sweeps.runner import status

TRAIN = {"data": "some.npz", "epochs": 9}
LEVELS = {"runs": [{"sparsity": [0.5, 0.8]}], "combine": [{"name": "e", "over": "sparsity", "values": [0.5, 0.8]}]}
SAMPLES = np.array(list("abcd"))


def grid(path: Path, train: dict[str, Any] | None = None, **content: Any) -> Grid:
    content = {"train": {**TRAIN, **(train or {})}, **(content or {"runs": [{"sparsity": 0.5}]})}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return Grid.read(path)


def scores(hits: int) -> Scores:
    """Of four samples, of which the first ``hits`` are right."""
    label = np.arange(4) % 2
    answer = np.where(np.arange(4) < hits, label, 1 - label)
    probability = np.where(np.arange(2) == answer[:, None], 0.9, 0.1).astype(np.float32)
    return Scores(SAMPLES, label, probability, np.log(probability))


def finish(made: Grid, root: Path, hits: Sequence[int], **resolved: Any) -> None:
    """The directories that trainings of the grid's runs leave; ``resolved``: what the options came to."""
    for given, right in zip(made.runs, hits, strict=True):
        work_dir = root / given.name
        work_dir.mkdir(parents=True)
        options = {key: value for key, value in asdict(given.config).items() if value is not None}
        (work_dir / "options.yaml").write_text(yaml.safe_dump(options))
        kept = 1 - float(given.config.sparsity) if isinstance(given.config.sparsity, float) else 0.5
        result = {"test": {**scores(right).metrics(), "samples": 4}, "config": {**given.config.to_dict(), **resolved},
                  "weights": {"maskable": 100, "maskable_kept": 100 * kept, "maskable_kept_fraction": kept, "all": 100,
                              "all_kept": 100 * kept, "all_kept_fraction": kept},
                  "file": {"bytes": 1000}, "seconds": {}, "environment": {}, "history": []}
        (work_dir / "result.json").write_text(json.dumps(result))
        scores(right).save(work_dir / "scores.npz")


def named(entries: Sequence[collect.Entry]) -> list[tuple[str, float, bool]]:
    return [(entry["name"].split("(")[0], entry["test"]["top1"], entry.get("former", False)) for entry in entries]


@pytest.mark.parametrize("recipe", [{"ema": 0.9}, {"init": "a.safetensors"}, {"rotate": 0.1}, {"epochs": 5}])
@pytest.mark.parametrize("old", [False, True])
def test_results_of_another_recipe_are_no_results_of_the_grid(tmp_path: Path, recipe: dict[str, Any], old: bool) -> None:
    """Also where the grid leaves open what the recipe had set, and in entries without options, as older versions wrote them."""
    finish(first := grid(tmp_path / "g.yaml", recipe), tmp_path / "runs", [4])
    entries = collect.collect(first, tmp_path / "runs")
    if old:
        del entries[0]["options"]
    assert named(collect.collect(first, tmp_path / "elsewhere", entries)) == [("0.5", 1.0, False)]
    left_open = old and "rotate" in recipe  # None may have come to that value
    plain = grid(tmp_path / "g.yaml")
    assert named(collect.collect(plain, tmp_path / "elsewhere", entries)) == [("0.5", 1.0, not left_open)]
    finish(plain, tmp_path / "new", [2])
    assert named(collect.collect(plain, tmp_path / "new", entries)) == [("0.5", 0.5, False), ("0.5", 1.0, True)]


def test_results_whose_options_were_chosen_are_results_of_the_grid(tmp_path: Path) -> None:
    made = grid(tmp_path / "g.yaml", runs=[{"sparsity": "auto", "budget": "5%"}])
    finish(made, tmp_path / "runs", [3], density="auto", trial_epochs=2)
    entries = collect.collect(made, tmp_path / "runs")
    assert named(collect.collect(made, tmp_path / "elsewhere", entries)) == [("auto_budget5-", 0.75, False)]


def test_a_directory_made_with_other_options_is_in_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    finish(grid(tmp_path / "g.yaml"), tmp_path / "runs" / "g", [4])
    changed = grid(tmp_path / "g.yaml", {"epochs": 8})
    assert status(changed.runs[0], tmp_path / "runs" / "g").state == "other"
    assert run(sweep.main, ["g.yaml", "--list"]) == 0
    assert "other     0.5    runs/g/0.5 has another epochs" in capsys.readouterr().out
    assert run(sweep.main, ["g.yaml", "--report"]) == 0
    assert capsys.readouterr().out == "results   none yet\nruns      1 other of 1\n"


def test_scores_of_another_test_are_not_combined(tmp_path: Path) -> None:
    made = grid(tmp_path / "g.yaml", **LEVELS)
    finish(made, tmp_path / "runs", [4, 3])
    scores(1).save(tmp_path / "runs" / "0.8" / "scores.npz")
    with pytest.raises(UserError, match=r"recorded run, top-1 0.7500. Got top-1 0.2500; python -m sparse_stgcn.evaluate"):
        collect.collect(made, tmp_path / "runs", kept=tmp_path / "kept")
    assert not (tmp_path / "kept" / "0.8.npz").exists()
    file = tmp_path / "runs" / "0.8" / "result.json"
    result = json.loads(file.read_text())
    result["test"]["protocol"] = {"clips": 10, "data": "some"}
    file.write_text(json.dumps(result))
    for clips in (1, 10):  # the same test again, on another machine say
        replace(scores(1), protocol={"clips": clips, "data": "moved"}).save(tmp_path / "runs" / "0.8" / "scores.npz")
        with pytest.raises(UserError, match="recorded run") if clips == 1 else nullcontext():
            assert len(collect.collect(made, tmp_path / "runs")) == 3


def test_a_combination_made_elsewhere_is_kept_while_it_is_that_of_the_grid(tmp_path: Path) -> None:
    made = grid(tmp_path / "g.yaml", **LEVELS)
    finish(made, tmp_path / "runs", [4, 2])
    entries = collect.collect(made, tmp_path / "runs")
    assert named(entries)[2][0] == "e"
    for entry in entries:  # as before an option existed
        del entry["config"]["box"]
    kept = collect.collect(made, tmp_path / "elsewhere", entries)
    assert [former for *_, former in named(kept)] == [False] * 3 and all(e["config"]["box"] is False for e in kept)
    weighted = {**LEVELS, "combine": [{**LEVELS["combine"][0], "weights": [1, 9], "on": "logit"}]}
    other = grid(tmp_path / "g.yaml", **weighted)
    assert other.combine[0].weights == (1, 9) and other.combine[0].on == "logit"
    assert [former for *_, former in named(collect.collect(other, tmp_path / "elsewhere", entries))] == [False, False, True]
    retrained = grid(tmp_path / "g.yaml", {"epochs": 8}, **LEVELS)
    finish(retrained, tmp_path / "again", [1, 1])
    found = collect.collect(retrained, tmp_path / "again", entries)
    assert named(found)[:3] == [("0.5", 0.25, False), ("0.8", 0.25, False), ("e", 0.25, False)]
    assert named(found)[3:] == [(name, top1, True) for name, top1, _ in named(entries)], "nothing that was measured is lost"


def test_a_dense_run_is_combined_with_no_copy_of_itself(tmp_path: Path) -> None:
    made = grid(tmp_path / "g.yaml", runs=[{"sparsity": [0, 0.5], "block": ["8x1", "1x1"]}],
                combine=[{"name": "both", "over": "block", "values": ["8x1", "1x1"]}])
    finish(made, tmp_path / "runs", [4, 3, 2])
    combined = [entry["members"] for entry in collect.collect(made, tmp_path / "runs") if "members" in entry]
    assert combined == [["0.5_8x1", "0.5_1x1"]]


@pytest.mark.parametrize(("change", "words"), [
    ({"combine": [{"name": "e", "over": "sparsity", "values": []}]}, "a list of sparsity. Got an empty one"),
    ({"combine": [{"name": "e", "over": "sparsity", "values": [0.5], "weights": "-1"}]}, "numbers >= 0, not all 0. Got -1"),
    ({"combine": [{"name": "e", "over": "sparsity", "values": [0.5], "weights": 7321}]}, "in quotes, or in brackets"),
    ({"combine": [{"name": "e", "over": "sparsity", "values": [0.5], "on": "rank"}]}, "on of combine e"),
    ({"combine": [{"name": "e", "over": "seed", "values": [0]}], "tables": {"t": {"rows": [], "columns": "sparsity"}}},
     "t in .* not to average over seed, which e combines"),
    ({"runs": [{"sparsity": 0.5, "seed": []}]}, "values of seed in .* an empty list")])
def test_a_grid_that_no_report_could_be_made_of(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        grid(tmp_path / "g.yaml", **{"runs": [{"sparsity": 0.5}], **change})


def test_figures_without_conditions_or_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    made = grid(tmp_path / "g.yaml", runs=[{"sparsity": [0.5, 0.8], "lasso": [0.0, 1.0]}],
                figures={"f": {"kind": "lines", "x": "sparsity", "lines": "lasso", "where": None, "names": None}})
    finish(made, tmp_path / "runs" / "g", [1, 2, 3, 4])
    lines: dict[str, Any] = {}
    monkeypatch.setattr("sparse_stgcn.plots.save", lambda figure, path: lines.update(
        {line.get_label(): line for line in figure.axes[0].containers}))
    assert run(sweep.main, ["g.yaml", "--report"]) == 0
    assert set(lines) == {"0", "1"}, "a run without penalty is no dense one"
