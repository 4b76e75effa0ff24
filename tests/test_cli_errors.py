"""Bad input to the commands: one sentence on stderr, exit code 2, no traceback, and nothing is written."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from sparse_stgcn import cli, evaluate, fuse, info, train
from sparse_stgcn.errors import TrainingError, UserError, run, validating


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


def nan(a: np.ndarray) -> np.ndarray:
    a[3, 0, 2, 1] = np.nan
    return a


def foreign_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"split": {}, "annotations": Bomb()}))
    return path


KEYPOINT = tiny.arrays()["keypoint"]
LABEL = tiny.arrays()["label"]

# name -> (how the file is made, what the sentence says)
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "none.npz", "--data .*none.npz"),
    "wrong V": (lambda p: tiny.write_npz(p / "a.npz", keypoint=KEYPOINT[:, :, :4]), "V = 5 joints.* Got V = "
                                                                                    "4"),
    "wrong C": (lambda p: tiny.write_npz(p / "a.npz", keypoint=np.repeat(KEYPOINT, 2, 3)), "C = 2 or 3"),
    "wrong shape": (lambda p: tiny.write_npz(p / "a.npz", keypoint=KEYPOINT[:, 0]), "keypoint"),
    "NaN": (lambda p: tiny.write_npz(p / "a.npz", keypoint=nan(KEYPOINT.copy())), "NaN or infinity in "
                                                                                  "sequence 0"),
    "empty class": (lambda p: tiny.write_npz(p / "a.npz", label=np.where(LABEL == 1, 0, LABEL)),
                    r"class 1 \(two"),
    "label above the classes": (lambda p: tiny.write_npz(p / "a.npz", label=LABEL + 7), "label"),
    "no labels": (lambda p: tiny.write_npz(p / "a.npz", label=None), "'label'"),
    "no split": (lambda p: tiny.write_npz(p / "a.npz", train=None), "split"),
    "offset": (lambda p: tiny.write_npz(p / "a.npz", offset=np.arange(31)), "offset"),
    "text": (lambda p: (p / "a.npz").write_text("hello") and p / "a.npz", "a.npz"),
    "empty file": (lambda p: (p / "a.npz").write_bytes(b"") or p / "a.npz", "a.npz"),
    "empty directory": (lambda p: (p / "d").mkdir() or p / "d", "meta.json"),
    "foreign pickle": (lambda p: foreign_pickle(p / "a.pkl"), "make one with python -m sparse_stgcn.convert"),
    "pickle named npz": (lambda p: foreign_pickle(p / "a.npz"), "a.npz"),
    "object array": (lambda p: tiny.write_npz(p / "a.npz", subject=np.array([Bomb()] * 30)), "a.npz"),
}

FLAGS = {
    "sparsity 1": ("--sparsity 1.0", r"--sparsity in \[0, 1\)"),
    "sparsity negative": ("--sparsity -0.5", r"--sparsity in \[0, 1\)"),
    "unknown backbone": ("--backbone resnet", "--backbone to be one of stgcn"),
    "block text": ("--block eight", "--block"),
    "block taller than every layer": ("--block 64x1", "at most 32 outputs x 32 inputs"),
    "block wider than every layer": ("--block 1x64", "at most 32 outputs x 32 inputs"),
    "warm-up without fine-tuning": ("--epochs 3 --warmup-epochs 3", "--warmup-epochs below --epochs"),
    "layout with other joints": ("--layout coco", "V = 17 joints.* Got V = 5"),
    "unknown layout": ("--layout centaur", "layout"),
    "unknown split": ("--split xset", "split"),
    "no folds": ("--fold 2", "fold2"),
    "config missing": ("--config none.yaml", "--config"),
    "resume nothing": ("--resume none", "--resume"),
    "clip length 0": ("--clip-len 0", "--clip-len >= 1"),
}


def refused(main: Callable[..., int], argv: list[str], message: str,
            capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(main, argv) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: .*\n", err), err
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert "epoch" not in out


def small(tmp_path: Path, data: Path) -> list[str]:
    return ["--data", str(data), "--base-channels", "8", "--work-dir", str(tmp_path / "run")]


@pytest.mark.parametrize("case", FILES)
def test_bad_file(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = FILES[case]
    refused(train.main, small(tmp_path, make(tmp_path)), message, capsys)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flag(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    flags, message = FLAGS[case]
    argv = small(tmp_path, tiny.write_npz(tmp_path / "a.npz"))
    refused(train.main, [*argv, *flags.split()], message, capsys)
    assert not (tmp_path / "run").exists()


def test_a_used_work_directory_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = small(tmp_path, tiny.write_npz(tmp_path / "a.npz"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    refused(train.main, argv, "new or empty directory.* --resume", capsys)
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize(("main", "argv", "message"), [
    (evaluate.main, ["none"], "work_dir to hold a finished run"),
    (info.main, ["none"], "Expected a checkpoint, or a work directory"),
    (info.main, ["--backbone", "x"], "--backbone"),
    (info.main, ["--sparsity", "1"], "sparsity"),
    (fuse.main, ["none.npz"], "does not exist"),
    (fuse.main, ["none.npz", "--weights", "best"], "--weights"),
], ids=["evaluate", "info", "info backbone", "info sparsity", "fuse", "fuse weights"])
def test_other_commands(main: Callable[..., int], argv: list[str], message: str, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    refused(main, argv, message, capsys)


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == (f"error: Expected the command to be one of {', '.join(cli.VERBS)}. "
                                       "Got 'trian'; did you mean train?\n")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"sparse_stgcn.{verb}" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["sparse_stgcn.train", "sparse_stgcn"])
def test_as_a_process(module: str, tmp_path: Path) -> None:
    verb = ["train"] if module == "sparse_stgcn" else []
    result = subprocess.run([sys.executable, "-m", module, *verb, "--sparsity", "1.0"], cwd=tmp_path,
                            text=True,
                            capture_output=True,
                            env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: Expected --sparsity")
    assert result.stderr.count("\n") == 1


def test_installation_report(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from sparse_stgcn import __version__
    from sparse_stgcn.kernels import backends

    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for part in (f"sparse_stgcn {__version__}", torch.__version__, "instruction set", "threads", "triton",
                 *cli.VERBS,
                 *backends(), *backends().values()):
        assert part in text


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: BaseException) -> Callable[[object], int]:
        def main(_: object) -> int:
            raise error
        return main

    assert run(lambda _: None) == 0
    assert run(lambda _: 3) == 3
    assert run(raises(UserError("two\nlines"))) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert run(raises(TrainingError("lower --lr"))) == 1
    assert capsys.readouterr().err == "error: lower --lr\n"
    assert run(raises(KeyboardInterrupt())) == 130
    capsys.readouterr()
    assert run(lambda _: warnings.warn("look\nout", stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: look out\n"
    for error in (ValueError("a fault of the program"), TypeError("x"), RuntimeError("x")):
        with pytest.raises(type(error)):
            run(raises(error))


def test_validating_names_the_argument() -> None:
    with pytest.raises(UserError, match=r"^--data: Expected 2$"), validating("--data"):
        raise ValueError("Expected 2")
    with pytest.raises(UserError, match=r"^--data: No such file or directory: x$"), validating("--data"):
        open("x")  # noqa: SIM115
    with pytest.raises(UserError, match=r"^as it was$"), validating("--data"):
        raise UserError("as it was")
    with pytest.raises(KeyError), validating("--data"):
        raise KeyError("a fault")
