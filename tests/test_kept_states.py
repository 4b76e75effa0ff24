"""Resume files: the last few are kept, the newest good one is used, and a run stops and goes on inside an epoch."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import STEPS, Stopping, assert_equal, everything, resume, start, whole

from sparse_stgcn import create_model, errors, sparsify, train
from sparse_stgcn.config import parse
from sparse_stgcn.errors import Stopped, TrainingError, UserError
from sparse_stgcn.training.checkpoint import read_position, save_state
from sparse_stgcn.training.kept import KeptStates
from sparse_stgcn.training.run import Run, prepare


class Signalled(Stopping):
    """A report that sends SIGTERM to its own process after some steps."""

    def step(self, **values: float) -> None:
        try:
            super().step(**values)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)


def said(run: Run) -> str:
    return " ".join(run.trainer.report.console.file.getvalue().split())  # its lines are cut at 80 characters


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*resume*"))


def cut(folder: Path, after: int, **changed: object) -> None:
    run = start(folder, "cut", after, **changed)
    with pytest.raises(KeyboardInterrupt):
        run.fit()


@pytest.mark.parametrize("after", [2, STEPS + 2, 2 * STEPS + 2], ids=["warm-up", "second epoch", "live blocks"])
def test_a_run_goes_on_inside_an_epoch(after: int, tmp_path: Path) -> None:
    expected = whole(tmp_path, ema=0.8, accumulate=2)
    cut(tmp_path, after, ema=0.8, accumulate=2, save_every_steps=1)
    run = resume(tmp_path, "cut")
    # What is saved last lies before the step in which the run was interrupted.
    assert (run.trainer.epoch, run.trainer.totals.step) == divmod(after - 1, STEPS)
    run.fit()
    assert_equal(everything(run), expected)
    average = run.trainer.network.state_dict()
    other = prepare(parse(["--resume", str(tmp_path / "whole")]), Stopping(None)).trainer.network.state_dict()
    assert all(torch.equal(average[name], other[name]) for name in other)
    assert not torch.equal(average["cls_head.fc_cls.weight"], run.model.state_dict()["cls_head.fc_cls.weight"])


@pytest.mark.parametrize(("keep", "expected"), [
    (1, ["resume.safetensors"]),
    (3, ["resume.1.safetensors", "resume.2.safetensors", "resume.safetensors"]),
])
def test_the_last_ones_are_kept(keep: int, expected: list[str], tmp_path: Path) -> None:
    run = start(tmp_path, "cut", keep=keep, save_every_steps=2)
    run.fit()
    folder = tmp_path / "cut"
    assert names(folder) == expected
    epochs = [(path.name, read_position(path)) for path in KeptStates(folder).files()]
    assert [position and position["step"] for _, position in epochs] == [None, 2, None][:keep]
    cheaper = prepare(parse(["--resume", str(folder), "--keep", "1"]), Stopping(None))
    cheaper.trainer._save()
    assert names(folder) == ["resume.safetensors"]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "one bit":
        content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("how", "reason"), [("truncated", "Got: "), ("empty", "Got: "), ("one bit", "the file is damaged")])
def test_a_damaged_file_is_passed_over_and_named(how: str, reason: str, tmp_path: Path) -> None:
    expected = whole(tmp_path)
    cut(tmp_path, 2 * STEPS + 1)
    damage(tmp_path / "cut" / "resume.safetensors", how)
    run = resume(tmp_path, "cut")
    text = said(run)
    assert "resume.safetensors is not used: Expected" in text
    assert reason in text
    assert "resume resume.1.safetensors: 1 epochs and 0 steps are done" in text
    run.fit()
    assert_equal(everything(run), expected)


def test_the_state_of_another_network_is_named(tmp_path: Path) -> None:
    cut(tmp_path, 2 * STEPS + 1)
    other = sparsify(create_model("stgcn", 4, layout=tiny.SKELETON, base_channels=8), 0.8, (4, 1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    save_state(tmp_path / "cut" / "resume.safetensors", other, optimizer, 1, [])
    assert "Got another network: stgcn with 4 classes." in said(resume(tmp_path, "cut"))
    damage(tmp_path / "cut" / "resume.1.safetensors", "truncated")
    with pytest.raises(UserError, match=r"can be used. Got none in .*cut: resume.safetensors is not used: .*another network.*; "
                                        r"resume.1.safetensors is not used: "):
        resume(tmp_path, "cut")


def test_a_file_that_was_not_moved_to_its_place_is_found(tmp_path: Path) -> None:
    """As after a kill between writing the new file and moving the older ones."""
    expected = whole(tmp_path)
    cut(tmp_path, 2 * STEPS + 1)
    folder = tmp_path / "cut"
    (folder / "resume.safetensors").rename(folder / "resume.next.safetensors")
    (folder / ".resume.safetensors.abc.part").write_bytes(b"half")
    run = resume(tmp_path, "cut")
    assert run.trainer.epoch == 2
    assert not list(folder.glob(".*.part"))
    run.fit()
    assert_equal(everything(run), expected)
    assert names(folder) == ["resume.1.safetensors", "resume.safetensors"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_no_room_for_the_state(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path, "cut")
    run.trainer.fit(until=2)
    folder = tmp_path / "cut"
    before = {path.name: path.read_bytes() for path in folder.glob("resume*")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr("sparse_stgcn.training.kept.save_state", full)
        else:
            patch.setattr(f"os.{call}", full)
        with pytest.raises(TrainingError, match=r"take another file. Got: No space left on device; make room, then continue "
                                                r"with --resume .*cut. Whole as before: resume.safetensors, resume.1."):
            run.fit()
    assert {path.name: path.read_bytes() for path in folder.glob("resume*")} == before
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize(("signalled", "where", "done"), [
    (1, "step 2 of epoch 1", (0, 2)),  # the report is told after a step, so the signal falls into the next one
    (2, "step 3 of epoch 1", (0, 3)),
    (3, "epoch 1", (1, 0)),
])
def test_sigterm_saves_and_ends(signalled: int, where: str, done: tuple[int, int], tmp_path: Path) -> None:
    expected = whole(tmp_path)
    run = start(tmp_path, "cut")
    run.trainer.report = Signalled(signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"SIGTERM came; stopped after {where}; continue with --resume .*cut"):
        run.fit()
    assert signal.getsignal(signal.SIGTERM) is before
    run = resume(tmp_path, "cut")
    assert (run.trainer.epoch, run.trainer.totals.step) == done
    run.fit()
    assert_equal(everything(run), expected)


def test_sigterm_in_a_test_saves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(tmp_path)
    run = start(tmp_path, "cut")

    def slow(*_: object) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not noticed")

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 3 of epoch 2"):
        patch.setattr("sparse_stgcn.training.loop.accuracy", slow)
        run.fit()
    run = resume(tmp_path, "cut")
    run.fit()
    assert_equal(everything(run), expected)


def test_sigterm_is_exit_code_143(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_stgcn.training.run.Report", lambda epochs: Signalled(1))
    data = tiny.write_npz(tmp_path / "tiny.npz")
    argv = ["--data", str(data), "--work-dir", str(tmp_path / "run"), "--base-channels", "8", "--block", "4x1", "--epochs", "2",
            "--warmup-epochs", "1", "--batch-size", "8", "--clip-len", "8", "--threads", "1"]
    assert errors.run(train.main, argv) == 143
    assert capsys.readouterr().err.startswith("stopped: SIGTERM came; stopped after step 2 of epoch 1; continue with --resume")
