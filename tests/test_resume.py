"""A run that is interrupted and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console

from sparse_stgcn.config import parse
from sparse_stgcn.errors import UserError
from sparse_stgcn.training.report import Report
from sparse_stgcn.training.run import Run, prepare

STEPS = 3  # per epoch: 20 sequences in batches of 8


class Stopping(Report):
    """A report that interrupts the run after some steps, as Ctrl-C does."""

    def __init__(self, after: int | None) -> None:
        super().__init__(4, Console(file=io.StringIO()))
        self.left = after

    def step(self, **values: float) -> None:
        super().step(**values)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def start(folder: Path, name: str, after: int | None = None, **changed: object) -> Run:
    data = folder / "tiny.npz"
    if not data.exists():
        tiny.write_npz(data)
    return prepare(tiny.config(data=str(data), rotate=0.2, scale=0.1, work_dir=str(folder / name), **changed),
                   Stopping(after))


def resume(folder: Path, name: str, after: int | None = None) -> Run:
    return prepare(parse(["--resume", str(folder / name)]), Stopping(after))


def everything(run: Run) -> dict[str, object]:
    """All that a run leaves behind except times."""
    names = {p: n for n, p in run.model.named_parameters()}
    momentum = {names[p]: state["momentum_buffer"] for p, state in run.trainer.optimizer.state.items()}
    timed = ("seconds", "samples_per_second", "test_seconds")
    history = [{k: v for k, v in record.items() if k not in timed} for record in run.trainer.history]
    return {"state": run.model.state_dict(), "momentum": momentum, "history": history,
            "random": torch.get_rng_state()}


def assert_equal(a: dict[str, object], b: dict[str, object]) -> None:
    assert a["history"] == b["history"]
    assert torch.equal(a["random"], b["random"])  # type: ignore[arg-type]
    for key in ("state", "momentum"):
        ours, theirs = a[key], b[key]
        assert set(ours) == set(theirs)  # type: ignore[call-overload]
        for name in ours:  # type: ignore[attr-defined]
            assert torch.equal(ours[name], theirs[name]), (key, name)  # type: ignore[index]


def whole(folder: Path, **changed: object) -> dict[str, object]:
    run = start(folder, "whole", **changed)
    run.fit()
    return everything(run)


# Steps until the interruption: in the first epoch, in the second, on the last step before the switch, on the
# first one after it (so that the run resumes at the switch), in the last epoch.
@pytest.mark.parametrize("after", [2, STEPS + 1, 2 * STEPS, 2 * STEPS + 1, 4 * STEPS - 1])
def test_interrupted_and_resumed_equals_whole(after: int, tmp_path: Path) -> None:
    expected = whole(tmp_path)
    run = start(tmp_path, "cut", after)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    torch.rand(7)  # a new process would have another random state
    run = resume(tmp_path, "cut")
    run.fit()
    assert_equal(everything(run), expected)
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 4


def test_interrupted_twice(tmp_path: Path) -> None:
    expected = whole(tmp_path)
    run = start(tmp_path, "cut", STEPS + 2)
    for after in (STEPS + 2, STEPS + 1, None):
        try:
            run.fit()
        except KeyboardInterrupt:
            run = resume(tmp_path, "cut", after)
    run.fit()
    assert_equal(everything(run), expected)


def test_dense_run(tmp_path: Path) -> None:
    expected = whole(tmp_path, sparsity=0.0, warmup_epochs=0)
    run = start(tmp_path, "cut", STEPS + 1, sparsity=0.0, warmup_epochs=0)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    run = resume(tmp_path, "cut")
    run.fit()
    assert_equal(everything(run), expected)


def test_a_finished_run_is_only_tested_again(tmp_path: Path) -> None:
    run = start(tmp_path, "done")
    run.fit()
    first = run.finish()
    run = resume(tmp_path, "done")
    run.fit()
    assert run.finish()["test"] == first["test"]
    assert len(run.trainer.history) == 4


def test_a_moved_run_resumes(tmp_path: Path) -> None:
    run = start(tmp_path, "here", STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    (tmp_path / "here").rename(tmp_path / "there")
    run = resume(tmp_path, "there")
    run.fit()
    assert run.work_dir == tmp_path / "there"
    assert len(run.trainer.history) == 4


IDS = np.array([f"a{i}" for i in range(30)])
NEW_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "sequences": ({**tiny.arrays(33), "sample": None},
                  r"33 sequences instead of 30, \d+ frames instead of \d+, other lengths, other labels, other training split;"),
    "lengths": ({"offset": tiny.arrays()["offset"] + np.r_[0, 1, np.zeros(29, int)]}, "other lengths;"),
    "labels": ({"label": 2 - tiny.arrays()["label"]}, "other labels;"),
    "split": ({"train": np.roll(tiny.arrays()["train"], 1)}, "other training split;"),
    "ids": ({"sample": np.char.add(IDS, "b")}, "other sample ids;"),
    "precision": ({"keypoint": tiny.arrays()["keypoint"].astype(np.float64)}, "other type of coordinates;"),
    "persons": ({"keypoint": tiny.arrays()["keypoint"].repeat(2, 1)}, "2 persons instead of 1;"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after its first epoch, on sequences with ids."""
    folder = tmp_path_factory.mktemp("begun")
    tiny.write_npz(folder / "tiny.npz", sample=IDS)
    run = start(folder, "cut")
    run.trainer.fit(until=1)
    return run.work_dir


def elsewhere(run: Path, folder: Path, **changed: object) -> Run:
    """The run continued with an archive in another directory."""
    data = tiny.write_npz(folder / "tiny.npz", **{"sample": IDS, **changed})
    return prepare(parse(["--resume", str(run), "--data", str(data)]), Stopping(None))


@pytest.mark.parametrize("changed", [{}, {"sample": None}], ids=["same", "no ids"])
def test_the_same_data_may_lie_elsewhere(changed: dict[str, Any], begun: Path, tmp_path: Path) -> None:
    assert elsewhere(begun, tmp_path, **changed).trainer.epoch == 1


@pytest.mark.parametrize("name", NEW_DATA)
def test_other_data_are_refused(name: str, begun: Path, tmp_path: Path) -> None:
    changed, message = NEW_DATA[name]
    said = "Expected --data to be what the run in .*cut was trained on. Got .*tiny.npz with "
    with pytest.raises(UserError, match=said + message):
        elsewhere(begun, tmp_path, **changed)


def test_a_state_that_does_not_say_which_data_goes_on(tmp_path: Path) -> None:
    run = start(tmp_path, "cut")
    run.trainer.data = None
    run.trainer.fit(until=1)
    assert elsewhere(run.work_dir, tmp_path, label=2 - tiny.arrays()["label"]).trainer.epoch == 1


@pytest.mark.parametrize("content", [b"", b"rubbish" * 20], ids=["empty", "rubbish"])
def test_a_broken_state_is_named(content: bytes, tmp_path: Path) -> None:
    run = start(tmp_path, "cut", STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    (tmp_path / "cut" / "resume.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"resume\.safetensors"):
        resume(tmp_path, "cut")


def test_a_checkpoint_is_not_a_state(tmp_path: Path) -> None:
    run = start(tmp_path, "cut", keep=1)
    run.fit()
    run.finish()
    (tmp_path / "cut" / "model.safetensors").rename(tmp_path / "cut" / "resume.safetensors")
    with pytest.raises(UserError, match="without training state"):
        resume(tmp_path, "cut")
