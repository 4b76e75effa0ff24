"""Automatic sparsity from end to end: budgets are kept, a resumed run is the same, what was seen is recorded."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_resume import STEPS, assert_equal, everything, resume, start, whole

from sparse_stgcn import masks, train
from sparse_stgcn.allocation.latency import LatencyClass, LatencyTable
from sparse_stgcn.config import TrainConfig, parse
from sparse_stgcn.errors import UserError
from sparse_stgcn.sparsity import mask_layers, maskable_convs, summary
from sparse_stgcn.training import auto, trial

AUTO: dict[str, Any] = {"sparsity": "auto", "warmup_epochs": 2, "measure_epochs": 1}
LAYERS = mask_layers(tiny.model(), "4x1")
# A layer costs a microsecond for every weight; the real table is the subject of test_allocation.py.
TABLE = LatencyTable(1e-3, tuple(LatencyClass((layer.name,), (layer.grid[0] / layer.num_blocks, 1.0),
                                              (0.0, 1e-6 * layer.num_weights)) for layer in LAYERS))


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "STEPS", 4)
    monkeypatch.setattr(auto, "BATCHES", 2)
    monkeypatch.setattr(auto, "latency_of", lambda *_, **__: TABLE)
    monkeypatch.setattr(auto, "measure_network", lambda *_: 2e-3)


def finish(folder: Path, **changed: Any) -> tuple[dict[str, Any], Any]:
    run = start(folder, "auto", **{**AUTO, **changed})
    run.fit()
    return run.finish(), run


def test_a_share_of_the_weights(tmp_path: Path) -> None:
    result, run = finish(tmp_path, budget="20%")
    kept, made = summary(run.model), result["auto"]
    erk = masks.budgets(LAYERS, 0.8, "erk") @ np.array([layer.block_weights for layer in LAYERS])
    assert abs(kept.kept - 0.2 * kept.maskable) <= 2  # half a block, as ERK at this level
    assert abs(erk - 0.2 * kept.maskable) <= 2
    assert made["measured"] == {"kept": kept.kept_fraction, "seconds": 2e-3}
    assert made["densities"] == pytest.approx({layer.name: layer.kept / layer.total for layer in kept.layers})
    assert len(set(made["densities"].values())) > 2
    for layer in LAYERS:  # the floor: one block in each row
        assert maskable_convs(run.model)[layer.name].pattern.blocks().any((1, 2)).all()
    assert [record["stage"] for record in result["history"]] == ["dense", "warm-up", "fine-tune", "fine-tune"]
    assert made["rule"] == min(made["trial_loss"], key=made["trial_loss"].get)


def test_the_front_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    result, run = finish(tmp_path, budget="20%")
    made = json.loads((run.work_dir / "auto.json").read_text())
    assert {**made, "measured": result["auto"]["measured"]} == result["auto"]
    rows = list(csv.DictReader((run.work_dir / "front.csv").open()))
    assert len(rows) == len(made["points"])
    keys = ("kept", "seconds", "damage")
    for point in made["points"]:
        beaten = any(all(other[k] <= point[k] for k in keys) and any(other[k] < point[k] for k in keys)
                     for other in made["points"])
        assert point["front"] != beaten
    assert [(point["rule"], point["kept"]) for point in made["points"] if point["chosen"]] == \
        [(made["rule"], pytest.approx(1 - made["sparsity"]))]


def test_density_auto_is_the_same_as_a_budget_in_weights(tmp_path: Path) -> None:
    level = start(tmp_path, "level", sparsity=0.8, density="auto", measure_epochs=1)
    level.fit()
    made, budget = finish(tmp_path, budget="20%")
    recorded = json.loads((level.work_dir / "auto.json").read_text())
    if recorded["rule"] == made["auto"]["rule"]:  # without a table there is no rule for latency
        for name, conv in maskable_convs(level.model).items():
            assert torch.equal(conv.pattern.blocks(), maskable_convs(budget.model)[name].pattern.blocks()), name
    assert summary(level.model).kept == summary(budget.model).kept


def test_a_size_of_the_file(tmp_path: Path) -> None:
    result, _ = finish(tmp_path, budget="40kB")
    assert 40_000 - 512 < result["file"]["bytes"] <= 40_000


@pytest.mark.parametrize(("budget", "said"), [
    ("1.6ms", "; the budget is missed by 25.0%"), ("2ms", ""), ("20%", "")])
def test_a_latency_that_is_missed_is_said(budget: str, said: str) -> None:
    chosen = {"budget": budget, "rule": "erk", "sparsity": 0.8, "points": [{"chosen": True, "seconds": 1.5e-3}],
              "measured": {"kept": 0.2, "seconds": 2e-3}}
    assert train.choice(chosen).endswith(f"sparsity 0.8; inference 2 ms, predicted 1.5 ms{said}")


def test_a_latency(tmp_path: Path) -> None:
    result, _ = finish(tmp_path, budget="2ms")
    predicted = TABLE.predict(result["auto"]["densities"])
    assert 2e-3 - 2e-5 < predicted <= 2e-3
    assert next(p for p in result["auto"]["points"] if p["chosen"])["seconds"] == pytest.approx(predicted)


def test_points_are_measured_on_training_sequences(tmp_path: Path) -> None:
    result, run = finish(tmp_path, budget="60 points", trial_epochs=1)
    made = result["auto"]
    fit, held = trial.held_out(run.trainer.train_set)
    train = set(run.trainer.train_set.members.tolist())
    assert set(fit) | set(held) == train
    assert not set(fit) & set(held)
    assert set(run.archive.label[held]) == set(range(tiny.CLASSES))
    losses = {float(level): lost for level, lost in made["lost_points"].items()}
    good = [level for level, lost in losses.items() if lost <= 0.6]
    assert [point["lost"] for point in made["points"] if point["chosen"]] == [losses[max(good)]]
    assert {point["lost"] for point in made["points"]} - {None} == set(losses.values())


def test_bisection_over_levels() -> None:
    asked = []

    def lost(level: float) -> float:
        asked.append(level)
        return level ** 8

    levels = (0.1, 0.3, 0.5, 0.6, 0.8, 0.9)
    assert trial.sparsest(levels, lost, 0.5 ** 8) == 0.5
    assert len(asked) <= 3
    assert trial.sparsest(levels, lost, 1.0) == 0.9
    with pytest.warns(UserWarning, match="held-out"):
        assert trial.sparsest(levels, lost, 0.0) == 0.1


# Steps until the interruption: before the choice, in the first epoch after it, on the last step before fine-tuning, after.
@pytest.mark.parametrize("after", [2, STEPS + 1, 2 * STEPS, 2 * STEPS + 1])
def test_interrupted_and_resumed_equals_whole(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**AUTO, "budget": "20%"}
    expected = whole(tmp_path, **options)
    run = start(tmp_path, "cut", after, **options)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    chosen = tmp_path / "cut" / "auto.json"
    before = chosen.read_text() if chosen.exists() else None
    assert (before is None) == (after < STEPS + 1)
    torch.rand(7)
    run = resume(tmp_path, "cut")
    if before is not None:  # a choice that was made is not made again: a latency could come out differently
        monkeypatch.setattr(auto, "sensitivity", lambda *_: pytest.fail("chosen again"))
    run.fit()
    assert_equal(everything(run), expected)
    assert before in (None, chosen.read_text())


def test_averaged_weights_have_the_chosen_masks(tmp_path: Path) -> None:
    result, run = finish(tmp_path, budget="20%", ema=0.5)
    averaged, trained = maskable_convs(run.trainer.network), maskable_convs(run.model)
    assert run.trainer.network is not run.model
    for name, conv in trained.items():
        assert torch.equal(averaged[name].pattern.blocks(), conv.pattern.blocks()), name
    assert result["auto"]["measured"]["kept"] == summary(run.trainer.network).kept_fraction == summary(run.model).kept_fraction


def test_a_choice_before_the_first_step(tmp_path: Path) -> None:
    result, _ = finish(tmp_path, budget="20%", measure_epochs=0, warmup_epochs=0)
    assert {record["stage"] for record in result["history"]} == {"fine-tune"}


@pytest.mark.parametrize(("changed", "message"), [
    ({"budget": "0.1%"}, "--budget to leave at least"), ({"budget": "1kB"}, "--budget to leave at least"),
    ({"budget": "1us"}, "--budget to leave at least"), ({"budget": "90MB"}, "--sparsity 0"), ({"budget": "1s"}, "--sparsity 0"),
    ({"sparsity": 0.999, "density": "auto"}, "--sparsity to leave at least"),
    ({"budget": None}, "--budget together"), ({"budget": "much"}, "--budget to be a number"),
    ({"budget": "5%", "sparsity": 0.9}, "--budget together"), ({"budget": "5%", "density": "erk"}, "--density erk"),
    ({"budget": "5%", "method": "predefined", "mask_file": "m.npz"}, "--mask-file"),
    ({"budget": "5%", "method": "magnitude"}, "Got --method magnitude; name another"),
    ({"sparsity": 0.8, "density": "auto", "method": "magnitude"}, "Got --method magnitude")])
def test_what_cannot_be_is_said_before_anything_is_written(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        start(tmp_path, "bad", **{**AUTO, **changed})
    assert not (tmp_path / "bad").exists()


def test_points_need_sequences_to_hold_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "HELD_OUT", 1000)
    with pytest.raises(UserError, match="--budget 2 points with a class of at least"):
        start(tmp_path, "bad", **{**AUTO, "budget": "2 points"})
    assert not (tmp_path / "bad").exists()


def test_a_rule_whose_trial_diverged_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([float("nan"), 2.0, 1.0])
    monkeypatch.setattr(trial, "trained_loss", lambda *_: next(losses, 3.0))
    result, _ = finish(tmp_path, budget="20%")
    assert result["auto"]["rule"] == list(result["auto"]["trial_loss"])[2]


def test_the_configuration_reads_auto(tmp_path: Path) -> None:
    config = parse(["--sparsity", "auto", "--budget", "1 point"])
    assert (config.sparsity, config.budget, config.level, config.sparse) == ("auto", "1 point", "auto", True)
    full = config.resolved("synthetic")
    assert (full.density, full.trial_epochs) == ("auto", 6)
    full.write(tmp_path / "config.yaml")
    assert TrainConfig.read(tmp_path / "config.yaml") == full
    with pytest.raises(UserError, match="sparsity"):
        TrainConfig.from_mapping({"sparsity": "some"}, "grid.yaml")
