"""The convert command: an option that the format does not take is an error, whatever the format."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import test_pyskl_reader as pyskl
import test_readers_arrays as arrays
import test_readers_ctrgcn as ctrgcn
import test_readers_kinetics as kinetics
import test_readers_ntu as ntu
import tiny

from sparse_stgcn import convert
from sparse_stgcn.data import Archive
from sparse_stgcn.data.formats import TAKES
from sparse_stgcn.errors import run

SOURCES: dict[str, Callable[[Path], Path]] = {
    "archive": lambda p: tiny.write_npz(p / "a.npz"),
    "pyskl": lambda p: pyskl.write(p / "x.pkl", pyskl.pickled(pyskl.annotations())),
    "ctrgcn": lambda p: ctrgcn.save(p / "x.npz"), "ntu": lambda p: ntu.dataset(p / "ntu"),
    "kinetics": lambda p: kinetics.folder(p / "kinetics"), "k400": lambda p: kinetics.k400(p / "k400"),
    "arrays": lambda p: arrays.tree(p / "arrays"),
}
OPTIONS = {"layout": ["coco"], "max_persons": ["1"], "label_names": ["names.txt"], "poses": ["."], "ignore": ["list.txt"],
           "order": ["XYZ"], "score_channel": [], "image": ["1x1"], "fps": ["30"]}


@pytest.mark.parametrize("kind", SOURCES)
def test_options_that_the_format_does_not_take_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    source = SOURCES[kind](tmp_path)
    opened: list[object] = []
    monkeypatch.setattr(convert, "open_source", lambda *_: opened.append(_))
    for name, value in OPTIONS.items():
        if name in TAKES[kind]:
            continue
        flag = "--" + name.replace("_", "-")
        assert run(convert.main, [str(source), "out", "--format", kind, flag, *value]) == 2
        err = capsys.readouterr().err
        able = ", ".join(other for other, takes in TAKES.items() if name in takes)
        assert err == (f"error: Expected {flag} with a format that takes it: {able}. Got format {kind}; leave it out, or name "
                       "another --format.\n")
    assert not opened and not (tmp_path / "out").exists()


def test_what_each_format_takes() -> None:
    takers = {name: {kind for kind, takes in TAKES.items() if name in takes} for name in OPTIONS}
    assert takers == {
        "layout": {*SOURCES} - {"ntu"}, "max_persons": {"pyskl", "kinetics", "k400", "arrays"},
        "label_names": {*SOURCES} - {"archive"}, "poses": {"k400"}, "ignore": {"ntu"}, "order": {"arrays"},
        "score_channel": {"arrays"}, "image": {"arrays"}, "fps": {"arrays"}}


def test_the_options_of_a_recognised_format_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(convert.main, [str(kinetics.k400(tmp_path / "k400")), "out", "--poses", "."]) == 2
    assert "takes it: k400. Got format pyskl" in capsys.readouterr().err


def test_options_that_are_taken_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("wave\nbow\n")
    layout = arrays.layout_file(tmp_path / "robot.yaml")
    argv = [str(arrays.tree(tmp_path / "mine")), "out", "--layout", str(layout), "--label-names", "names.txt", "--order"]
    assert run(convert.main, [*argv, "XYZ"]) == 2
    assert run(convert.main, [*argv, "TVC"]) == 0
    a = Archive.open("out")
    assert a.label_names == ("wave", "bow") and a.skeleton.name == "robot" and a.keypoint.shape[2:] == (4, 3)
