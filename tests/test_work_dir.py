"""Work directories: one process at a time trains in one, and what a message says of one that is not a finished run."""
from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from sparse_stgcn import checkpoint, ensemble, evaluate, report
from sparse_stgcn.config import parse
from sparse_stgcn.errors import Stopped, TrainingError, UserError, run
from sparse_stgcn.multilevel import MultiLevelConfig
from sparse_stgcn.training import multilevel_run
from sparse_stgcn.training.kept import writing
from sparse_stgcn.training.run import Run, new_work_dir, prepare, resolve
from sparse_stgcn.training.tickets import Lottery, Recipe
from sparse_stgcn.work_dir import TRAIN, is_taken, occupy, take


def start(folder: Path, **changed: object) -> Run:
    data = tiny.write_npz(folder / "tiny.npz")
    return prepare(tiny.config(data=str(data), work_dir=str(folder / "run"), epochs=2, warmup_epochs=1, **changed))


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path: Path) -> None:
    job = start(tmp_path)
    assert is_taken(job.work_dir / TRAIN) and not is_taken(job.work_dir / "lock")  # which a sweep holds meanwhile
    again = prepare(parse(["--resume", str(job.work_dir)]))  # by this process itself
    assert again.lock is job.lock
    job.fit()
    job.finish()
    assert not is_taken(job.work_dir / TRAIN)
    other = take(job.work_dir / TRAIN)
    before = sorted(job.work_dir.iterdir())
    with pytest.raises(UserError, match="Expected --resume of a run that nobody continues. Got .*run, which another process"):
        prepare(parse(["--resume", str(job.work_dir)]))
    assert other is not None and sorted(job.work_dir.iterdir()) == before
    other.release()
    assert prepare(parse(["--resume", str(job.work_dir)])).lock is not None


@pytest.mark.parametrize("call", ["_flock", "os.open"])
def test_a_file_system_without_locks_or_writing_breaks_nothing(call: str, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.ENOLCK if call == "_flock" else errno.EROFS, "no")

    with monkeypatch.context() as patch:
        patch.setattr(f"sparse_stgcn.work_dir.{call}", fails)
        lock = occupy(tmp_path)
    assert (lock is None) == (call == "os.open")


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = occupy(tmp_path)
    assert lock is not None
    child = os.fork()
    if not child:
        os._exit(int(lock.release.alive))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_taken(tmp_path / TRAIN)


def levels(folder: Path) -> None:
    (folder / "config.yaml").write_text("levels: [0.6, 0.8]\n")
    (folder / "ensemble.safetensors").touch()
    for name in ("0.6", "0.8"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").touch()


@pytest.mark.parametrize(("make", "said"), [
    (levels, "several levels of sparsity; name one of them as {}: {}/0.6, {}/0.8."),
    (lambda folder: (folder / "config.yaml").write_text("levels: [0.6, 0.8]\n"), "sparse_stgcn.multilevel --resume {1}, then"),
    (lambda folder: (folder / "ensemble.safetensors").touch(), "it holds an ensemble, tested already"),
    (lambda folder: (folder / "config.yaml").write_text("seed: 1\n"), "the run with python -m sparse_stgcn.train --resume"),
    (lambda folder: None, "train first"),
], ids=["levels", "unfinished levels", "ensemble", "unfinished", "empty"])
@pytest.mark.parametrize(("main", "argument"), [(evaluate.main, "work_dir"), (report.main, "SOURCE")], ids=["one", "two"])
def test_what_is_no_finished_run_is_told_apart(main: Callable[[list[str]], int], argument: str, make: Callable[[Path], object],
                                               said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    make(folder)
    assert run(main, [str(folder)]) == 2
    err = capsys.readouterr().err
    words = said.format(argument, folder, folder)
    assert words in err and ("sparse_stgcn.train --resume" in err) == ("sparse_stgcn.train --resume" in said)


def test_a_stopped_command_names_itself(tmp_path: Path) -> None:
    data = str(tiny.write_npz(tmp_path / "tiny.npz"))
    job = start(tmp_path)
    nested = multilevel_run.prepare(MultiLevelConfig(**{
        **vars(tiny.config(data=data, method="nested", work_dir=str(tmp_path / "nested"))), "levels": (0.5, 0.8)}))
    base = resolve(tiny.config(data=data, sparsity=0.0, warmup_epochs=0), job.archive)
    lottery = Lottery(base, job.archive, None, Recipe(), tmp_path / "lottery")
    ticket = lottery._trainer(base, tmp_path / "lottery" / "point", lambda: lottery._initial("random", 0))
    for trainer, words in ((job.trainer, f"continue with --resume {tmp_path / 'run'}"),
                           (nested.trainer, f"python -m sparse_stgcn.multilevel --resume {tmp_path / 'nested'}"),
                           (ticket, "repeat the command")):
        with pytest.raises(Stopped, match=words):
            trainer._stop(saved=True)
        assert trainer.states is not None
        with pytest.raises(TrainingError, match=words), writing(trainer.states):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_other_names_of_classes_and_joints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = start(tmp_path)
    job.fit()
    job.finish()
    for seed in ("a", "b"):
        (tmp_path / seed).mkdir()
        for name in ("config.yaml", "model.safetensors"):
            (tmp_path / seed / name).write_bytes((job.work_dir / name).read_bytes())
    joints = tiny.SKELETON.joints

    def said(main: Callable[[list[str]], int] = evaluate.main, source: tuple[str, ...] = (), **changed: object) -> str:
        data = tiny.write_npz(tmp_path / "other.npz", **changed)
        code = run(main, [*(source or (str(job.work_dir),)), "--data", str(data)])
        err = capsys.readouterr().err
        assert (code, err == "") in ((0, True), (2, False)), err
        return err

    swapped = ["one", "three", "two"]
    assert "--data with class 1 'two', as the network was trained on. Got 'three'" in said(label_names=swapped)
    assert "class 1 'two'" in said(ensemble.main, (str(tmp_path / "a"), str(tmp_path / "b")), label_names=swapped)
    assert "--data with joint 3 'left_hand', as" in said(joint_names=[*joints[:3], joints[4], joints[3]])
    assert said() == said(label_names=["0", "1", "2"]) == said(label_names=None) == ""
    assert said(joint_names=[f"joint{i}" for i in range(5)]) == said(joint_names=list("01234")) == ""
    model = checkpoint.load(job.work_dir / "model.safetensors")
    checkpoint.save(model, job.work_dir / "model.safetensors")  # which has no names
    assert said(label_names=swapped) == ""


def test_a_score_file_says_both_parts_of_the_split(tmp_path: Path) -> None:
    job = start(tmp_path)
    job.fit()
    assert job.finish()["test"]["protocol"]["split"] == "train/test"
    assert json.loads((job.work_dir / "result.json").read_text())["test"]["protocol"]["split"] == "train/test"


def test_the_name_of_a_data_set_is_no_path() -> None:
    """It comes from a file, perhaps of a stranger."""
    data = replace(tiny.archive(), name="x/../../../elsewhere")
    assert new_work_dir(parse([]), data).parent == Path("runs")
