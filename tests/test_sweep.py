"""The sweep command and its parts: what a grid lists, how its runs are driven, and what becomes of their results."""
from __future__ import annotations

import fcntl
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from sparse_stgcn import sweep
from sparse_stgcn.config import TrainConfig
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.scores import Scores
from sparse_stgcn.sweeps import collect, tables
from sparse_stgcn.sweeps.grid import Combine, Grid, Run, Table
from sparse_stgcn.sweeps.runner import Machine, check, drive, status

TRAIN = {"data": "tiny.npz", "base_channels": 8, "block": "4x1", "epochs": 2, "warmup_epochs": 1, "batch_size": 8,
         "clip_len": 8, "eval_clips": 2, "lr": 0.01}

# A training without a network: an epoch takes 0.2 s, is logged and saved, and the work goes on where it was left.
FAKE = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "config.yaml").write_text("epochs: 4")
log = folder / "log.jsonl"
done = len(log.read_text().splitlines()) if log.exists() else 0
if folder.name.endswith("seed1") and not (folder / "mended").exists():
    sys.exit("error: broken")
for epoch in range(done, 4):
    time.sleep(0.2)
    with log.open("a") as file:
        file.write(json.dumps({"epoch": epoch, "seconds": 0.2}) + "\\n")
    (folder / "resume.safetensors").write_text(str(epoch))
history = [json.loads(line) for line in log.read_text().splitlines()]
(folder / "result.json").write_text(json.dumps({"test": {"top1": 0.5}, "history": history}))
"""


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """In a background job of a shell SIGINT is ignored, and processes started from there would ignore it, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def grid(path: Path, **content) -> Grid:
    path.write_text(yaml.safe_dump({"train": TRAIN, **content}, sort_keys=False))
    return Grid.read(path)


def fake(tmp_path: Path, seeds: list[int], jobs: int = 1) -> tuple[tuple[Run, ...], Machine, dict]:
    (tmp_path / "fake.py").write_text(FAKE)
    runs = grid(tmp_path / "g.yaml", runs=[{"seed": seeds}]).runs
    command = lambda run, slot: [sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "runs" / run.name)]
    return runs, Machine(tmp_path / "runs", jobs=jobs), {"command": command, "poll": 0.02, "say": lambda text: None}


# ---- grids -----------------------------------------------------------------------------------------------------

def test_a_grid_is_the_product_of_its_lists_each_configuration_once(tmp_path):
    runs = grid(tmp_path / "g.yaml", runs=[
        {"backbone": "stgcn", "sparsity": [0, 0.95], "seed": [0, 1]},
        {"backbone": "stgcn", "block": ["4x1", "1x1"], "sparsity": [0, 0.95], "seed": 0}]).runs
    assert [r.name for r in runs] == ["stgcn_dense_seed0", "stgcn_dense_seed1", "stgcn_0.95_seed0", "stgcn_0.95_seed1",
                                      "stgcn_1x1_0.95_seed0"]
    assert runs[-1].config == TrainConfig(**{**TRAIN, "block": "1x1", "sparsity": 0.95})
    assert runs[0].config.warmup_epochs is None, "a dense run has no warm-up"


@pytest.mark.parametrize(("change", "words"), [
    ({"runs": [{"sparsty": 0.5}]}, "did you mean sparsity"),
    ({"runs": [{"sparsity": [0.5, 2]}]}, "--sparsity in"),
    ({"runs": [{"threads": 2}]}, "without threads"),
    ({"runs": []}, "at least one entry"),
    ({"combine": [{"name": "e", "over": "sparsity", "values": [0.5, 0.7]}]}, "a sparsity of some run. Got 0.7"),
    ({"combine": [{"name": "e", "over": "sparsity", "values": [0.5], "weights": "pyskl4"}]}, "numbers"),
    ({"tables": {"t": {"rows": ["colour"], "columns": "sparsity"}}}, "colour"),
    ({"figures": {"f": {"kind": "pie"}}}, "lines, curves, violins"),
    ({"charts": {}}, "each part of"),
])
def test_a_bad_grid_is_named_before_any_work(change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        grid(tmp_path / "g.yaml", **{"runs": [{"sparsity": 0.5}], **change})


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("experiments/*.yaml")), ids=lambda p: p.stem)
def test_shipped_grids_can_be_read(path):
    found = Grid.read(path)
    assert len(found.runs) >= 5 and found.tables
    for run_ in found.runs:
        assert not Path(run_.config.data).is_absolute()


# ---- driving ---------------------------------------------------------------------------------------------------

def epochs(machine: Machine, run_: Run) -> list[int]:
    return [json.loads(line)["epoch"] for line in (machine.root / run_.name / "log.jsonl").read_text().splitlines()]


def test_a_time_limit_stops_after_a_saved_epoch_and_the_next_call_goes_on(tmp_path):
    runs, machine, options = fake(tmp_path, [0, 2])
    start = time.monotonic()
    assert drive(runs, machine, 0.55, **options) == []
    assert time.monotonic() - start < 3
    first = status(runs[0], machine.root)
    assert first.state == "stopped" and 0 < first.done < 4
    log = machine.root / runs[0].name / "log.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["epoch"] == int((log.parent / "resume.safetensors").read_text())
    assert status(runs[1], machine.root).state == "missing"
    drive(runs, machine, **options)
    assert [status(r, machine.root).state for r in runs] == ["finished"] * 2
    assert epochs(machine, runs[0]) == [0, 1, 2, 3], "no epoch was trained twice"


def test_jobs_run_at_the_same_time(tmp_path):
    runs, machine, options = fake(tmp_path, [0, 2, 3], jobs=3)
    seen = []
    options["say"] = seen.append
    drive(runs, machine, **options)
    assert [text.split()[0] for text in seen] == ["start"] * 3 + ["finished"] * 3


def test_a_failure_is_kept_and_tried_again(tmp_path):
    runs, machine, options = fake(tmp_path, [1, 0])
    assert drive(runs, machine, **options) == [runs[0]]
    found = status(runs[0], machine.root)
    assert (found.state, found.error) == ("failed", "error: broken")
    assert status(runs[1], machine.root).state == "finished"
    (machine.root / runs[0].name / "mended").touch()
    assert drive(runs, machine, **options) == []
    assert status(runs[0], machine.root).state == "finished"


def test_a_run_that_another_process_has_is_left_to_it(tmp_path):
    runs, machine, options = fake(tmp_path, [0])
    folder = machine.root / runs[0].name
    folder.mkdir(parents=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(runs[0], machine.root).state == "running"
        drive(runs, machine, **options)
        assert not (folder / "log.jsonl").exists()
    assert status(runs[0], machine.root).state == "missing"


def test_ctrl_c_stops_the_processes(tmp_path):
    runs, machine, options = fake(tmp_path, [0])
    def stop(text: str) -> None:
        raise KeyboardInterrupt
    options["say"] = stop
    with pytest.raises(KeyboardInterrupt):
        drive(runs, machine, **options)
    assert status(runs[0], machine.root).state in ("missing", "stopped")
    assert threading.active_count() == 1


def test_data_and_directories_are_checked_first(tmp_path):
    runs, machine, options = fake(tmp_path, [0])
    with pytest.raises(UserError, match="SPARSE_STGCN_DATA"):
        check(runs, Machine(machine.root, tmp_path))
    tiny.write_npz(tmp_path / "tiny.npz")
    check(runs, Machine(machine.root, tmp_path))
    drive(runs, machine, **options)
    other = grid(tmp_path / "g.yaml", runs=[{"seed": 0, "lr": 0.5}]).runs[0]
    with pytest.raises(UserError, match="another lr"):
        check([Run(runs[0].name, other.config)], Machine(machine.root, tmp_path))


def test_a_directory_of_another_data_set_is_not_gone_on_with(tmp_path):
    runs, machine, options = fake(tmp_path, [0])
    drive(runs, machine, **options)
    for name in ("tiny.npz", "elsewhere/tiny.npz", "larger.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tiny.write_npz(tmp_path / name)
    here = lambda data: [Run(runs[0].name, replace(runs[0].config, data=data))]
    check(here("elsewhere/tiny.npz"), Machine(machine.root, tmp_path))
    for data in ("larger.npz", None):
        with pytest.raises(UserError, match="another data;"):
            check(here(data), Machine(machine.root, tmp_path))
    file = machine.root / runs[0].name / "options.yaml"  # an older version's
    file.write_text(file.read_text().replace("data: tiny.npz\n", ""))
    check(here("larger.npz"), Machine(machine.root, tmp_path))


def test_a_run_that_another_sweep_has_finished_since_is_not_started_again(tmp_path):
    runs, machine, options = fake(tmp_path, [0, 2])
    said, start = [], options["command"]

    def command(run_, slot):
        if run_ is runs[0]:  # it ends between the first look and the lock
            (machine.root / run_.name).mkdir(parents=True)
            (machine.root / run_.name / "result.json").write_text(json.dumps({"test": {"top1": 0.5}, "history": [{}]}))
        return start(run_, slot)

    assert drive(runs, machine, **{**options, "command": command, "say": said.append}) == []
    assert [text.split()[:2] for text in said] == [["start", runs[1].name], ["finished", runs[1].name]]
    assert not (machine.root / runs[0].name / "log.jsonl").exists()
    assert status(runs[0], machine.root).state == "finished", "and its lock is free again"


# ---- results ---------------------------------------------------------------------------------------------------

def entry(sparsity: float, top1: float, **config) -> dict:
    options = {"backbone": "stgcn", "block": "8x1", "sparsity": sparsity, "seed": 0, "fold": None, "lr": 0.1, **config}
    return {"name": str(options), "config": options, "test": {"top1": top1},
            "weights": {"all": 3_000_000, "maskable_kept_fraction": 1 - sparsity, "all_kept_fraction": 1 - sparsity / 2}}


def test_tables_have_mean_and_sample_deviation_and_share_the_dense_run():
    entries = [entry(0.0, 0.9), entry(0.0, 0.8, seed=1), entry(0.95, 0.7, block="1x1"), entry(0.95, 0.6)]
    found = tables.cells(Table("t", ("block",), "sparsity"), entries)
    by_place = {(cell.row, cell.column): cell for cell in found}
    for block in ("8x1", "1x1"):
        dense = by_place[(block,), 0.0]
        assert dense.mean == pytest.approx(0.85) and dense.deviation == pytest.approx(np.std([0.9, 0.8], ddof=1))
    assert by_place[("1x1",), 0.95].values == (0.7,)
    text = tables.to_markdown(Table("t", ("block",), "sparsity"), found)
    assert "| 1x1 | 3.00 M | 85.0 ± 7.1 (2) | 70.0 |" in text
    assert "| 0.05 / 0.53 |" in text.replace("0.52", "0.53")
    assert "8x1,0.95,0.60000,,1,0.05000,0.52500,3000000" in tables.to_csv(Table("t", ("block",), "sparsity"), found)


def test_a_cell_never_mixes_what_is_not_averaged():
    with pytest.raises(ValueError, match="different lr"):
        tables.cells(Table("t", ("backbone",), "sparsity"), [entry(0.95, 0.9), entry(0.95, 0.8, lr=0.2)])


def test_confidence_is_that_of_the_largest_probability():
    p = np.array([[0.9, 0.1], [0.45, 0.55], [0.8, 0.2], [0.45, 0.45]], np.float32)
    found = collect.confidence(Scores(np.array(list("abcd")), np.array([0, 1, 1, 0]), p, np.log(p)))
    assert found["under_half"] == 0.25
    assert found["max_probability"] == [0.45, 0.55, 0.8, 0.9]


# ---- the command -----------------------------------------------------------------------------------------------

def test_a_sweep_trains_combines_tabulates_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tiny.write_npz(tmp_path / "data" / "tiny.npz")
    monkeypatch.setenv("SPARSE_STGCN_DATA", "data")
    found = grid(tmp_path / "small.yaml", runs=[{"sparsity": [0.5, 0.8]}],
                 combine=[{"name": "ensemble", "over": "sparsity", "values": [0.5, 0.8], "weights": "3,1"}],
                 tables={"levels": {"rows": ["backbone"], "columns": "sparsity"}},
                 figures={"violin": {"kind": "violins", "over": "sparsity"},
                          "training": {"kind": "curves", "lines": "sparsity"},
                          "levels": {"kind": "lines", "x": "sparsity", "lines": "backbone"}})
    assert run(sweep.main, ["small.yaml", "--threads", "1"]) == 0
    assert run(sweep.main, ["small.yaml", "--list"]) == 0
    assert capsys.readouterr().out.endswith("runs      2 finished of 2\n")
    entries = collect.read(tmp_path / "results" / "small.json")
    assert [e["config"]["sparsity"] for e in entries] == [0.5, 0.8, "ensemble"]
    assert {e["config"]["data"] for e in entries} == {"tiny.npz"} and str(tmp_path) not in json.dumps(entries)
    # The ensemble is the weighted mean of the probabilities, its kept weights are the sum of the members'.
    scores = [Scores.load(Path("runs/small", r.name, "scores.npz")) for r in found.runs]
    mean = (3 * scores[0].probability + scores[1].probability) / 4
    np.testing.assert_allclose(entries[2]["confidence"]["max_probability"], np.sort(mean.max(1)), atol=6e-5)
    assert entries[2]["test"]["top1"] == (mean.argmax(1) == scores[0].label).mean()
    assert entries[2]["weights"]["maskable_kept"] == sum(e["weights"]["maskable_kept"] for e in entries[:2])
    assert {p.name for p in Path("results").iterdir()} == {
        "small.json", "small.md", "small_levels.csv", "small_levels.png", "small_scores", "small_training.png",
        "small_violin.png"}
    # Without the work directories the committed JSON gives the same tables again, and nothing is lost.
    before = Path("results/small.md").read_text()
    assert run(sweep.main, ["small.yaml", "--report", "--runs", "elsewhere"]) == 0
    assert Path("results/small.md").read_text() == before
    assert collect.read(tmp_path / "results" / "small.json") == entries
    # And they are not trained again elsewhere, but for what the grid asks in another way by now.
    capsys.readouterr()
    assert run(sweep.main, ["small.yaml", "--runs", "elsewhere"]) == 0
    assert "recorded  2 of 2 runs" in capsys.readouterr().out and not list(Path("elsewhere").iterdir())
    grid(tmp_path / "small.yaml", runs=[{"sparsity": [0.5, 0.8]}, {"sparsity": 0.8, "lr": 0.02}])
    assert run(sweep.main, ["small.yaml", "--list", "--runs", "elsewhere"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs      2 recorded, 1 missing of 3"
    # Results from before an option existed: they ran with what is its default now.
    results = json.loads(Path("results/small.json").read_text())
    for entry in results["entries"]:
        del entry["config"]["precision"]
    Path("results/small.json").write_text(json.dumps(results))
    assert run(sweep.main, ["small.yaml", "--list", "--runs", "elsewhere"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs      2 recorded, 1 missing of 3"
    # Nor another data set, whose results are not those of this one.
    found = (tmp_path / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(found.replace("data: tiny.npz", "data: larger.npz"))
    assert run(sweep.main, ["small.yaml", "--list", "--runs", "elsewhere"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs      3 missing of 3"
    (tmp_path / "small.yaml").write_text(found)
    # A run that an older version finished here does not name what came later either.
    file = Path("runs/small", entries[0]["name"], "result.json")
    result = json.loads(file.read_text())
    del result["config"]["precision"]
    file.write_text(json.dumps(result))
    assert run(sweep.main, ["small.yaml", "--report"]) == 0
    again = {e["name"]: e for e in collect.read(tmp_path / "results" / "small.json")}
    assert again[entries[0]["name"]]["config"] == entries[0]["config"]
    content = (tmp_path / "small.yaml").read_text().replace("epochs: 2", "epochs: 3")
    (tmp_path / "small.yaml").write_text(content)
    assert run(sweep.main, ["small.yaml", "--list", "--runs", "elsewhere"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs      3 missing of 3"


def test_members_of_a_combination_may_be_trained_in_different_places(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_npz(tmp_path / "tiny.npz")
    monkeypatch.setenv("SPARSE_STGCN_DATA", ".")
    grid(tmp_path / "g.yaml", runs=[{"sparsity": [0.5, 0.8]}],
         combine=[{"name": "e", "over": "sparsity", "values": [0.5, 0.8]}])
    for place, runs in (("here", "*0.5*"), ("there", "*0.8*")):
        assert run(sweep.main, ["g.yaml", "--threads", "1", "--runs", place, "--only", runs]) == 0
    entries = {e["config"]["sparsity"]: e for e in collect.read(Path("results/g.json"))}
    files = sorted(Path("results/g_scores").iterdir())
    assert [f.stem for f in files] == [entries[level]["name"] for level in (0.5, 0.8)]
    mean = sum(Scores.load(f).probability for f in files) / 2
    np.testing.assert_allclose(entries["e"]["confidence"]["max_probability"], np.sort(mean.max(1)), atol=6e-5)
    # An entry from before an option existed is a member still.
    results = json.loads(Path("results/g.json").read_text())
    results["entries"] = [e for e in results["entries"] if "members" not in e]
    del results["entries"][-1]["config"]["precision"]
    Path("results/g.json").write_text(json.dumps(results))
    assert run(sweep.main, ["g.yaml", "--report", "--runs", "nowhere"]) == 0
    again = {e["config"]["sparsity"]: e for e in collect.read(Path("results/g.json"))}
    assert again["e"] == entries["e"]
    # Scores of another training under the same name are no member.
    files[0].write_bytes(files[1].read_bytes())
    results["entries"][0]["test"]["top1"] = results["entries"][1]["test"]["top1"] = 0.123
    Path("results/g.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert run(sweep.main, ["g.yaml", "--report", "--runs", "nowhere"]) == 2
    assert "to hold the scores of the recorded run, top-1 0.1230" in capsys.readouterr().err


def test_entries_of_another_version_of_the_grid_stay_but_are_in_no_table(tmp_path, capsys):
    """The recipe of a recorded run was changed, another run was dropped, a third was recorded before an option existed."""
    this = grid(tmp_path / "g.yaml", runs=[{"sparsity": 0.9, "seed": [0, 1]}],
                tables={"accuracy": {"rows": ["backbone"], "columns": "sparsity"}})

    def recorded(name, top1, **change):
        return {"name": name, "config": {**this.runs[0].config.to_dict(), **change}, "test": {"top1": top1},
                "weights": {"all": 9, "maskable_kept_fraction": 0.1, "all_kept_fraction": 0.1},
                "confidence": {"expected_calibration_error": 0.1, "under_half": 0.1, "max_probability": [0.5]}}

    old = recorded("0.9_seed1", 0.5, seed=1)
    del old["config"]["box"]
    before = [recorded("0.9_seed0", 0.25, epochs=3), recorded("0.95_seed0", 0.75, sparsity=0.95), old]
    entries = collect.collect(this, tmp_path / "runs", before)
    assert [(e["name"], e.get("former", False)) for e in entries] == [
        ("0.9_seed1", False), ("0.9_seed0", True), ("0.95_seed0", True)]
    assert entries[0]["config"]["box"] is False
    assert collect.collect(this, tmp_path / "runs", entries) == entries
    collect.write(this, entries, tmp_path / "g.json")
    sweep.report(this, tmp_path / "runs", tmp_path)
    said = capsys.readouterr().out
    assert "2 entries of runs that the grid has not" in said
    assert "| stgcn | 0.00 M | 50.0 |" in said and "75.0" not in said and "25.0" not in said
    assert len(collect.read(tmp_path / "g.json")) == 3


@pytest.mark.parametrize(("change", "values", "groups"), [
    ({"warmup_epochs": 0}, (0.5, 0.8), []),  # of two warm-ups no level of the one goes with a level of the other
    ({}, (0.5, 0.8), [[0.5, 0.8]]),
    ({"warmup_epochs": 0}, (0, 0.5), [[0, 0.5]]),  # but a dense run has none, and goes with both
    ({"warmup_epochs": 0}, (0.8, 0), [[0.8, 0]])])
def test_members_of_a_combination_agree_in_everything_else(change, values, groups):
    entries = [entry(0.5, 0.9, seed=s, warmup_epochs=3) for s in (0, 1)]
    entries += [entry(0.8, 0.8, seed=1, **{"warmup_epochs": 3, **change}), entry(0, 0.7, seed=1, warmup_epochs=0)]
    found = list(collect._groups(Combine("e", "sparsity", values), entries))
    assert [[e["config"]["sparsity"] for e in group] for group in found] == groups
    assert {e["config"]["seed"] for group in found for e in group} <= {1}
