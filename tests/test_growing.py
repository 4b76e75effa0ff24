"""Levels that grow: the sparsest is what it is alone, wider ones leave it so, and an interrupted run goes on."""
from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import pytest
import tiny
import torch
from test_multilevel import batch, everything, interrupted, nested, start
from test_resume import STEPS, assert_equal

from sparse_stgcn import checkpoint, compact, masks, multilevel, train
from sparse_stgcn.config import TrainConfig
from sparse_stgcn.errors import TrainingError, UserError, run
from sparse_stgcn.scores import Scores
from sparse_stgcn.sparsity import mask_layers, maskable_convs, summary
from sparse_stgcn.training.levels import Levels
from sparse_stgcn.training.multilevel_run import MultiLevelRun, has_patterns
from sparse_stgcn.training.run import prepare

GROWING = {"schedule": "growing", "levels": (0.5, 0.8, 0.9), "growth": 0.5}  # epochs 0-3 train 0.9, 4 and 5 0.8, 6 and 7 0.5


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> MultiLevelRun:
    job = start(tmp_path_factory.mktemp("grown"), "grown", **GROWING)
    job.fit()
    return job


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    job = start(tmp_path_factory.mktemp("whole"), "whole", **GROWING)
    job.fit()
    return everything(job)


@pytest.mark.parametrize("name", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
def test_a_wider_level_begins_as_the_one_inside_it(name: str) -> None:
    levels, (keypoint, _) = nested(name, levels=(0.5, 0.8, 0.9)), batch()
    inner, patterns = list(levels.members)[1:], {key: conv.pattern for key, conv in maskable_convs(levels.widest).items()}
    before = [copy.deepcopy(member).eval() for member in inner]
    again = Levels.around(inner, patterns, scale=0.0)
    assert has_patterns(again.widest, patterns) and len(again.members) == 3
    assert summary(again.widest).kept == summary(levels.widest).kept > summary(inner[0]).kept
    with torch.no_grad():
        torch.testing.assert_close(again.widest.eval()(keypoint), before[0](keypoint), rtol=1e-5, atol=1e-5)
        for member, expected in zip(inner, before, strict=True):
            assert torch.equal(member.eval()(keypoint), expected(keypoint))


def test_new_weights_have_the_scale_of_those_that_are_there() -> None:
    levels = nested(levels=(0.5, 0.9))
    inner, patterns = levels.members[1], {key: conv.pattern for key, conv in maskable_convs(levels.widest).items()}
    wider = Levels.around([inner], patterns, scale=0.5).widest
    for key, conv in maskable_convs(wider).items():
        held = maskable_convs(inner)[key]
        place = held.pattern.within(conv.pattern)
        assert torch.equal(conv.values[place], held.values)
        new = torch.ones(conv.pattern.num_blocks, dtype=torch.bool)
        new[place] = False
        values, expected = conv.values.detach(), 0.5 * float(held.values.detach().square().mean().sqrt())
        assert new.sum() < 50 or float(values[new].square().mean().sqrt()) == pytest.approx(expected, rel=0.2)


def test_new_blocks_hold_nothing_beyond_a_ragged_edge() -> None:
    narrow = tiny.model(0.8, block=(3, 1))  # 8 outputs in rows of 3
    patterns = masks.draw_levels(mask_layers(narrow, (3, 1)), (0.5, 0.8), "nested")
    for key, conv in maskable_convs(narrow).items():
        conv.pattern = patterns[0.8][key]
    wider = Levels.around([compact(narrow)], patterns[0.5], scale=1.0).widest
    for conv in maskable_convs(wider).values():
        assert torch.equal(conv.pattern.gather(conv.pattern.scatter(conv.values)), conv.values)


def test_the_sparsest_level_is_what_it_is_alone(grown: MultiLevelRun, tmp_path: Path) -> None:
    given = {key: value for key, value in vars(grown.config).items() if key in vars(TrainConfig())}
    plain = prepare(TrainConfig(**{**given, "sparsity": 0.9, "work_dir": str(tmp_path / "alone")})).trainer
    history = plain.fit()
    sparsest = grown.trainer.levels.members[-1]
    for key, value in plain.model.state_dict().items():
        assert torch.equal(sparsest.state_dict()[key], value), key
    assert [record["loss"] for record in grown.trainer.history[:4]] == [record["loss"] for record in history]
    assert summary(sparsest).kept == summary(plain.model).kept


def test_a_wider_level_leaves_what_is_inside_it(whole: dict[str, object], tmp_path: Path) -> None:
    job = start(tmp_path, "half", **GROWING)
    job.trainer.fit(until=6)
    inner = [copy.deepcopy(member.state_dict()) for member in job.trainer.levels.members]
    assert len(inner) == 2
    job.fit()
    widest, *held = job.trainer.levels.members
    for member, before in zip(held, inner, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in member.state_dict().items())
    moved = 0
    for key, conv in maskable_convs(widest).items():
        inside = maskable_convs(held[0])[key]
        place = inside.pattern.within(conv.pattern)
        assert torch.equal(conv.values[place], inside.values)
        new = torch.ones(conv.pattern.num_blocks, dtype=torch.bool)
        new[place] = False
        moved += int(conv.values[new].count_nonzero())
        assert conv.bias is None or torch.equal(conv.bias, inside.bias)
    # With two frames left at the end, most taps see nothing but padding.
    assert moved > 0.5 * (summary(widest).kept - summary(held[0]).kept)
    assert widest.backbone.gcn[0].gcn.PA is held[0].backbone.gcn[0].gcn.PA
    assert not torch.equal(widest.backbone.gcn[0].gcn.bn.weight, held[0].backbone.gcn[0].gcn.bn.weight)
    assert_equal(everything(job), whole)


@pytest.mark.parametrize("name", ["aagcn", "ctrgcn", "dgstgcn"])
def test_other_backbones_grow_around_what_they_share(name: str, tmp_path: Path) -> None:
    job = start(tmp_path, name, backbone=name, **{**GROWING, "levels": (0.5, 0.8), "epochs": 2, "warmup_epochs": 1})
    job.trainer.fit(until=2)
    before = copy.deepcopy(job.trainer.model.state_dict())
    job.fit()
    wide, inner = job.trainer.levels.members
    assert all(torch.equal(value, before[key]) for key, value in inner.state_dict().items())
    parameters = dict(inner.named_parameters())
    shared = [key for key, parameter in wide.named_parameters() if parameter is parameters[key]]
    assert any("gcn" in key and not key.endswith(".values") for key in shared)
    moved = [key for key, parameter in wide.named_parameters() if key not in shared and not key.endswith(".values")
             and not torch.equal(parameter, parameters[key])]
    assert len(moved) > 20 and len(job.trainer.history) == 3


def test_every_level_has_its_epochs_and_its_cosine(grown: MultiLevelRun) -> None:
    history = grown.trainer.history
    assert [record["level"] for record in history] == [0.9] * 4 + [0.8] * 2 + [0.5] * 2
    assert [record["stage"] for record in history] == ["warm-up"] * 2 + ["fine-tune"] * 6
    rates = [record["learning_rate"] for record in history]
    assert rates[0] > rates[1] > rates[2] > rates[3] < rates[4] > rates[5] < rates[6] > rates[7]
    assert rates[4:6] == rates[6:8]
    assert all(len(record["test_accuracy_levels"]) == n for record, n in ((history[5], 2), (history[7], 3)))


# Interrupted in the warm-up, in the first level, at the switch to the second, inside it, and in the last.
@pytest.mark.parametrize("after", [STEPS + 1, 3 * STEPS + 1, 4 * STEPS + 1, 5 * STEPS + 2, 7 * STEPS + 1])
def test_interrupted_and_resumed_equals_whole(after: int, whole: dict[str, object], tmp_path: Path) -> None:
    assert_equal(everything(interrupted(after, tmp_path, save_every_steps=1, **GROWING)), whole)


def test_the_state_of_other_masks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, "cut", **GROWING).trainer.fit(until=5)
    text = (tmp_path / "cut" / "config.yaml").read_text()
    (tmp_path / "cut" / "config.yaml").write_text(text.replace("- 0.8\n", "- 0.7\n"))
    assert run(multilevel.main, ["--resume", str(tmp_path / "cut")]) == 2
    assert "Got another network, or other levels" in capsys.readouterr().err


def test_a_run_leaves_an_ensemble_and_ordinary_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tiny.write_npz(tmp_path / "tiny.npz"), tmp_path / "levels"
    flags = tiny.flags(epochs=2, warmup_epochs=1, eval_every=1)
    assert run(multilevel.main, [*flags, "--data", str(data), "--work-dir", str(out), "--levels", "0.8", "0.5", "0.9"]) == 0
    said = capsys.readouterr().out
    assert "0.9 0.8 0.5 one after the other, 1 epochs for each after the first" in said and "0.50 of one network's" in said
    result = json.loads((out / "result.json").read_text())
    together = checkpoint.load(out / "ensemble.safetensors")
    description = checkpoint.read_metadata(out / "ensemble.safetensors")
    assert [member.get("values_of") for member in description["members"]] == [None, 0, 0]
    assert result["weights"]["maskable_kept"] == summary(together.members[0]).kept
    for index, (name, epochs) in enumerate({"0.5": [3], "0.8": [2], "0.9": [0, 1]}.items()):
        alone, own = checkpoint.load(out / name / "model.safetensors"), json.loads((out / name / "result.json").read_text())
        with torch.no_grad():
            assert torch.equal(alone(batch()[0][:, :1]), together.members[index](batch()[0][:, :1]))
        assert own["config"]["sparsity"] == float(name)
        tested = {record["epoch"]: record["test_accuracy"] for record in own["history"] if "test_accuracy" in record}
        assert list(tested) == epochs
        assert [record["epoch"] for record in own["history"]] == list(range(epochs[-1] + 1)), "not those of wider levels"
        assert tested[epochs[-1]] == result["history"][3]["test_accuracy_levels"][index]


@pytest.mark.filterwarnings("ignore:.*without a weight")
def test_a_level_may_grow_around_layers_that_hold_nothing() -> None:
    narrow = tiny.model()
    layers = mask_layers(narrow, (4, 1))
    patterns = masks.draw_levels(layers, (0.5, 0.99), "iid")
    empty = [name for name, pattern in patterns[0.99].items() if not pattern.num_live]
    assert empty
    for key, conv in maskable_convs(narrow).items():
        conv.attach(patterns[0.99][key])
    wider = maskable_convs(Levels.around([compact(narrow)], patterns[0.5], scale=0.5).widest)
    assert all(bool(conv.values.isfinite().all()) for conv in wider.values())
    assert all(bool(wider[name].values.any()) for name in empty if patterns[0.5][name].num_live)


def test_a_level_does_not_begin_again_in_its_own_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = start(tmp_path, "levels", **{**GROWING, "levels": (0.5, 0.9), "epochs": 2, "warmup_epochs": 1})
    job.fit(), job.finish()
    level = tmp_path / "levels" / "0.9"
    before = (level / "model.safetensors").read_bytes()
    for command in (train.main, multilevel.main):
        assert run(command, ["--resume", str(level)]) == 2
        assert "which has result.json and no resume file" in capsys.readouterr().err
    (tmp_path / "other" / "0.9").mkdir(parents=True)
    (tmp_path / "other" / "0.9" / "config.yaml").write_text("")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "ensemble.safetensors").write_bytes(b"")
    for place, message in (("other", "without runs in the directories of the levels"), ("held", "holds ensemble.safetensors")):
        with pytest.raises(UserError, match=message):
            start(tmp_path, place, **{**GROWING, "levels": (0.5, 0.9)})
    assert (level / "model.safetensors").read_bytes() == before


def test_a_full_disk_at_the_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(tmp_path, "full", **{**GROWING, "levels": (0.5, 0.9), "epochs": 2, "warmup_epochs": 1})
    job.fit()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Scores, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        job.finish()


@pytest.mark.parametrize(("flags", "said"), [
    (["--schedule", "apart"], "Expected --schedule to be one of growing, together. Got 'apart'."),
    (["--schedule", "growing", "--growth", "0"], "Expected --growth in (0, 10]"),
    (["--schedule", "growing", "--new-weights", "-1"], "Expected --new-weights to be at least 0 and finite. Got -1."),
])
def test_errors_before_any_work(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(multilevel.main, [*flags, "--work-dir", str(out), "--sequences", "26", "--base-channels", "8"]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
