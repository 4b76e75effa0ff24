"""TensorBoard events: what a run writes is its history, and a continued run goes on in the same log."""

from __future__ import annotations

import json

import pytest
import tiny

from sparse_stgcn.config import TrainConfig
from sparse_stgcn.errors import UserError
from sparse_stgcn.training import events
from sparse_stgcn.training.events import EventLog
from sparse_stgcn.training.run import prepare

pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'sparse-stgcn[tensorboard]'")

TAGS = {"loss": "loss/cross entropy", "lasso": "loss/lasso", "train_accuracy": "accuracy/train",
        "test_accuracy": "accuracy/test", "test_accuracy_unmasked": "accuracy/test, all weights",
        "learning_rate": "learning rate"}


def logged(folder):
    """Tag -> {step: value} of all files of a folder, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def expected(history):
    """The same from the history, as float32."""
    found = {tag: {r["epoch"] + 1: r[key] for r in history if key in r} for key, tag in TAGS.items()}
    for i in range(10):
        found[f"masked norm/block {i + 1:02d}"] = {
            r["epoch"] + 1: r["masked_norms"][i] for r in history if r["stage"] == "warm-up"}
    return found


def assert_same(found, history):
    for tag, steps in expected(history).items():
        assert found[tag] == pytest.approx(steps, rel=1e-6), tag


def start(folder, **changed):
    return prepare(tiny.config(data=str(tiny.write_npz(folder / "a.npz")), work_dir=str(folder / "run"), **changed))


def test_a_continued_run_goes_on_in_the_same_log(tmp_path):
    job = start(tmp_path, tensorboard=True, eval_every=1)
    job.trainer.fit(until=1)
    # The run died in the second epoch after its events were written and before its state was.
    stray = EventLog(tmp_path / "run" / "tensorboard", job.trainer.history)
    stray.write({**job.trainer.history[0], "epoch": 1, "loss": 99.0})
    stray.close()

    config = TrainConfig.read(tmp_path / "run" / "config.yaml")
    assert config.tensorboard
    config.resume = config.work_dir
    rest = prepare(config)
    rest.fit()
    history = rest.trainer.history
    assert [record["stage"] for record in history] == ["warm-up", "warm-up", "fine-tune", "fine-tune"]
    assert_same(logged(tmp_path / "run" / "tensorboard"), history)
    assert history == [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


def test_a_log_that_is_switched_on_later_has_the_epochs_before(tmp_path):
    job = start(tmp_path, epochs=3)
    job.trainer.fit(until=2)
    assert not (tmp_path / "run" / "tensorboard").exists()  # off by default
    config = TrainConfig.read(tmp_path / "run" / "config.yaml")
    config.resume, config.tensorboard = config.work_dir, True
    rest = prepare(config)
    rest.fit()
    assert_same(logged(tmp_path / "run" / "tensorboard"), rest.trainer.history)


def test_without_tensorboard_nothing_is_begun(tmp_path, monkeypatch):
    def missing():
        raise UserError("Expected TensorBoard")

    monkeypatch.setattr(events, "require", missing)
    with pytest.raises(UserError, match="Expected TensorBoard"):
        start(tmp_path, tensorboard=True)
    assert not (tmp_path / "run").exists()
