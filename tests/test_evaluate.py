"""The evaluate command: which sequences it tests on, and what it finds out before it does."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from sparse_stgcn import checkpoint, evaluate
from sparse_stgcn.errors import run
from sparse_stgcn.scores import Scores
from sparse_stgcn.training.run import prepare

FOLD = np.arange(30) // 3 % 5
TRAIN = tiny.arrays()["train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that fold 0 was held out of, on an archive that has a split as well."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = tiny.write_npz(folder / "tiny.npz", fold=FOLD, sample=np.array([f"s{i:02d}" for i in range(30)]))
    job = prepare(tiny.config(data=str(data), fold=0, work_dir=str(folder / "run"), epochs=2, warmup_epochs=1))
    job.fit()
    job.finish()
    return folder / "run"


def tested(trained: Path, *argv: str) -> tuple[list[str], str]:
    """The ids of the sequences that evaluate tests on, and the name of their split."""
    out = trained.parent / "again.npz"
    assert run(evaluate.main, [str(trained), "--out", str(out), *argv]) == 0
    scores = Scores.load(out)
    return scores.sample.tolist(), scores.protocol["split"]


def ids(mask: np.ndarray) -> list[str]:
    return [f"s{i:02d}" for i in np.flatnonzero(mask)]


def test_a_split_or_another_fold_replaces_the_one_of_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tested(trained) == (ids(FOLD == 0), "fold0")
    assert "warning" not in capsys.readouterr().err
    assert tested(trained, "--split", "train") == (ids(~TRAIN), "train/test")
    seen = (~TRAIN & (FOLD != 0)).sum()
    assert capsys.readouterr().err == (f"warning: {seen} of the {(~TRAIN).sum()} sequences of split train/test are in the "
                                       "training split of the run; its accuracy on them says nothing about new ones\n")
    assert tested(trained, "--fold", "2") == (ids(FOLD == 2), "fold2")
    assert "warning: 6 of the 6 sequences of split fold2" in capsys.readouterr().err


def test_the_same_archive_by_another_path_is_known(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(trained.parent)
    tested(trained, "--data", "tiny.npz", "--fold", "2")
    assert "warning: 6 of the 6" in capsys.readouterr().err
    tested(trained, "--data", str(tiny.write_npz(trained.parent / "other.npz", fold=FOLD)), "--fold", "2")
    assert "warning" not in capsys.readouterr().err


def refused(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``argv`` ends with one line that has ``words``, before anything is tested."""
    monkeypatch.setattr("sparse_stgcn.scores.predict", lambda *_: pytest.fail("tested"))
    assert run(evaluate.main, argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: Expected") and err.count("\n") == 1 and words in err


def test_a_split_and_a_fold_together_are_refused(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    refused([str(trained), "--split", "train", "--fold", "0"], "--split or --fold", monkeypatch, capsys)


@pytest.mark.parametrize(("out", "words"), [
    ("none/x.npz", "create"), ("folder", "folder/scores.npz"), ("x" * 255, "name another")],
    ids=["missing", "directory", "long name"])
def test_an_out_that_cannot_be_written_is_refused_before_the_test(
        trained: Path, tmp_path: Path, out: str, words: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    refused([str(trained), "--out", str(tmp_path / out)], words, monkeypatch, capsys)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


def test_a_disk_that_fills_up_does_not_cost_the_figures(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Scores, "save", full)
    assert run(evaluate.main, [str(trained)]) == 2
    out, err = capsys.readouterr()
    assert "test      top-1" in out and err == "error: --out: No space left on device\n"


def test_a_broken_network_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    model = checkpoint.load(trained / "model.safetensors")
    with torch.no_grad():
        model.cls_head.fc_cls.bias.fill_(np.nan)
    checkpoint.save(model, tmp_path / "model.safetensors")
    assert run(evaluate.main, [str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: Expected scores without NaN. Got NaN for 6 of 6 samples") and err.count("\n") == 1
    assert not (tmp_path / "scores.npz").exists()
