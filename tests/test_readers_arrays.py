"""Plain arrays with a layout file."""
from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import convert
from sparse_stgcn.data import Archive, SkeletonDataset
from sparse_stgcn.data.arrays import ArraysSource
from sparse_stgcn.data.writer import write_archive
from sparse_stgcn.errors import UserError, run

LAYOUT = {"joints": ["root", "head", "left_hand", "right_hand"], "edges": [[1, 0], [2, 0], [3, 0]], "root": 0}


def sequence(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape or (4 + seed % 5, 4, 3)).astype(np.float32)


def tree(path: Path, parts: tuple[str, ...] = ("",), count: int = 3) -> Path:
    for p, part in enumerate(parts):
        for c, name in enumerate(("bow", "wave")):
            (path / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                np.save(path / part / name / f"s{i}.npy", sequence(10 * p + 3 * c + i))
    return path


def layout_file(path: Path) -> Path:
    path.write_text(yaml.safe_dump(LAYOUT))
    return path


def test_folder_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tree(tmp_path / "mine", count=6)
    layout = layout_file(tmp_path / "robot.yaml")
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--layout", str(layout)]) == 0
    assert "12 sequences, 2 classes, M=1, V=4, C=3, float32" in capsys.readouterr().out
    a = write_archive(ArraysSource(path, layout), tmp_path / "again")
    assert a.label_names == ("bow", "wave") and a.skeleton.name == "robot"
    assert a.sample_ids[7] == "wave/s1"
    np.testing.assert_array_equal(a[7][:, 0], sequence(4))
    assert a.splits["test"].tolist() == [i % 6 == 4 for i in range(12)], "every fifth of each class is the test"
    assert SkeletonDataset(a, "train", clip_len=5)[0][0].shape == (1, 5, 4, 3)


def test_layout_and_splits_from_the_folder(tmp_path: Path) -> None:
    path = tree(tmp_path / "mine", ("train", "test"))
    layout_file(path / "layout.yaml")
    a = write_archive(ArraysSource(path), tmp_path / "out")
    assert len(a) == 12 and a.with_split().train.sum() == 6
    assert {s.split("/")[0] for s in a.sample_ids[a.train]} == {"train"}


def test_json_file_of_sequences(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", sequence(1, 5, 2, 4, 3))
    (tmp_path / "b.json").write_text(json.dumps(sequence(2, 6, 4, 3).tolist()))
    content = {"layout": LAYOUT, "label_names": ["bow", "wave"], "sequences": [
        {"file": "a.npy", "label": "wave", "split": "train"}, {"file": "b.json", "label": 0, "split": "val", "sample": "bee"},
        {"keypoint": sequence(3, 3, 4, 3).tolist(), "label": 1, "split": "train"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    a = write_archive(ArraysSource(tmp_path / "set.json"), tmp_path / "out")
    assert a.num_persons == 2 and a.lengths.tolist() == [5, 6, 3] and a.label.tolist() == [1, 0, 1]
    assert a.sample_ids.tolist() == ["a.npy", "bee", "000002"]
    np.testing.assert_array_equal(a[0], sequence(1, 5, 2, 4, 3))
    np.testing.assert_array_equal(a[1][:, 0], sequence(2, 6, 4, 3))
    assert not a[1][:, 1].any() and a.with_split("train").train.tolist() == [True, False, True]


@pytest.mark.parametrize(("splits", "found"), [
    ((None, None), "0 and 1 of it, with split none"), (("train", "test"), "'train' and 'test'"),
    (("a_train", "a_val"), "'a_train' and 'a_val'"), (("train", ""), "'train' and ''"),
    (("train", "train"), ""), (("a_train", "b_val"), "")])
def test_a_file_that_is_listed_twice(tmp_path: Path, splits: tuple[str | None, ...], found: str) -> None:
    np.save(tmp_path / "a.npy", sequence(0))
    entries = [{"file": file, "label": 0} | ({} if split is None else {"split": split})
               for file, split in zip(("a.npy", "./a.npy"), splits, strict=True)]
    (tmp_path / "set.json").write_text(json.dumps({"layout": LAYOUT, "sequences": entries}))
    with pytest.raises(UserError, match=found) if found else nullcontext():
        assert len(ArraysSource(tmp_path / "set.json")) == 2


@settings(max_examples=40, deadline=None)
@given(order=st.permutations("TMVC").map("".join) | st.permutations("TVC").map("".join), frames=st.integers(1, 6),
       persons=st.integers(1, 3), flat=st.booleans())
def test_any_order_of_axes(tmp_path_factory: pytest.TempPathFactory, order: str, frames: int, persons: int,
                           flat: bool) -> None:
    folder = tmp_path_factory.mktemp("order")
    sizes = {"T": frames, "M": persons if "M" in order else 1, "V": 4, "C": 2 if flat else 3}
    x = sequence(0, *(sizes[axis] for axis in "TMVC"))
    if "M" in order:
        y = x.transpose(["TMVC".index(axis) for axis in order])
    else:
        y = x[:, 0].transpose(["TVC".index(axis) for axis in order])
    (folder / "in" / "bow").mkdir(parents=True)
    np.save(folder / "in" / "bow" / "a.npy", y)
    a = write_archive(ArraysSource(folder / "in", LAYOUT, order), folder / "out")
    np.testing.assert_array_equal(a[0], x)
    assert a.is_2d == flat


@pytest.mark.parametrize("name", ["../secret.npy", "/secret.npy", "a/../../secret.npy", "."])
def test_a_list_reads_nothing_above_its_folder(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "secret.npy", sequence(0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "set.json").write_text(json.dumps({"layout": LAYOUT, "sequences": [{"file": name, "label": 0}]}))
    with pytest.raises(UserError, match="below its folder" if name != "." else "Got"):
        ArraysSource(tmp_path / "in" / "set.json").record(0)


@pytest.mark.parametrize("name", ["../layout.yaml", "{above}/layout.yaml", "/etc/passwd"])
def test_a_list_takes_no_layout_from_above_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(LAYOUT))
    (tmp_path / "in").mkdir()
    content = {"layout": name.format(above=tmp_path), "sequences": [{"keypoint": sequence(0).tolist(), "label": 0}]}
    (tmp_path / "in" / "set.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="Expected layout in .* below its folder"):
        ArraysSource(tmp_path / "in" / "set.json")
    ArraysSource(tmp_path / "in" / "set.json", layout=tmp_path / "layout.yaml")  # of the one who calls, from anywhere


def test_third_channel_as_score(tmp_path: Path) -> None:
    tree(tmp_path / "mine")
    a = write_archive(ArraysSource(tmp_path / "mine", LAYOUT, score_channel=True), tmp_path / "out")
    np.testing.assert_array_equal(a.read(0)[1][0], sequence(0)[..., 2])  # type: ignore[index]
    np.testing.assert_array_equal(a.read(0)[0][0], sequence(0)[..., :2])


def flat_tree(path: Path, scale: float) -> Path:
    (path / "bow").mkdir(parents=True)
    for i in range(3):
        x = scale * np.random.default_rng(i).random((6, 4, 2), np.float32)
        x[0, 0] = np.nan
        np.save(path / "bow" / f"s{i}.npy", x)
    return path


def test_the_image_and_the_frame_rate_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layout = str(layout_file(tmp_path / "robot.yaml"))
    argv = [str(flat_tree(tmp_path / "parts", 1)), "--layout", layout]
    assert run(convert.main, [*argv, str(tmp_path / "out"), "--image", "1x1", "--fps", "25"]) == 0
    assert not capsys.readouterr().err
    a = Archive.open(tmp_path / "out")
    assert a.info["fps"] == 25 and a.fields["img_shape"].tolist() == [[1, 1]] * 3
    kept = SkeletonDataset(a, "train", clip_len=6, missing="zero", train=False)[0][0].numpy()[..., 1:, :2]
    assert np.ptp(kept) > 1, "parts of the image span the range of the network"
    assert run(convert.main, [*argv, str(tmp_path / "wide"), "--image", "720x1280"]) == 0
    b = Archive.open(tmp_path / "wide")
    assert b.fields["img_shape"].tolist() == [[720, 1280]] * 3 and "fps" not in b.info
    first, second = (ArraysSource(tmp_path / "parts", LAYOUT, image=image) for image in (None, (1, 1)))
    assert first.fingerprint() != second.fingerprint(), "a stopped conversion does not go on with another image"


def test_parts_of_an_image_that_nobody_gave_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    layout = ["--layout", str(layout_file(tmp_path / "robot.yaml"))]
    for scale in (1, 400):
        source = flat_tree(tmp_path / f"flat{scale}", scale)
        assert run(convert.main, [str(source), str(tmp_path / f"out{scale}"), *layout]) == 0
        err = capsys.readouterr().err
        assert err.startswith("warning: Expected pixels") == ("--image 1x1" in err) == (scale == 1)
    assert run(convert.main, [str(tree(tmp_path / "deep")), str(tmp_path / "out3"), *layout]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("extra", "words"), [
    (["--image", "1080"], "--image to be HEIGHTxWIDTH"), (["--image", "0x1"], "--image to be HEIGHTxWIDTH"),
    (["--image", "1x1"], "image with arrays of 2D joints. Got C = 3"), (["--fps", "0"], "fps to be a positive number"),
    (["--fps", "inf"], "fps to be a positive number")])
def test_a_bad_image_or_frame_rate(tmp_path: Path, extra: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    layout = str(layout_file(tmp_path / "robot.yaml"))
    assert run(convert.main, [str(tree(tmp_path / "mine")), str(tmp_path / "out"), "--layout", layout, *extra]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_dtypes(tmp_path: Path, dtype: type) -> None:
    (tmp_path / "mine" / "bow").mkdir(parents=True)
    x = (10 * sequence(0)).astype(dtype)
    np.save(tmp_path / "mine" / "bow" / "a.npy", x)
    a = write_archive(ArraysSource(tmp_path / "mine", LAYOUT), tmp_path / "out")
    assert a.keypoint.dtype == (np.float32 if dtype is np.int32 else dtype)
    np.testing.assert_array_equal(a[0][:, 0], x)


def put(value: Any, name: str = "a.npy") -> Any:
    def write(path: Path) -> None:
        file = path / "bow" / name
        if isinstance(value, np.ndarray):
            np.save(file, value, allow_pickle=True)
        else:
            file.write_bytes(value.encode() if isinstance(value, str) else value)
    return write


BAD = {
    "empty file": (put(b""), "bow/a"), "text": (put("hello"), "bow/a"), "objects": (put(np.array([{}])), "bow/a"),
    "letters": (put(np.array([["a"]])), "bow/a"), "one axis": (put(np.zeros(5)), "bow/a"),
    "no frame": (put(np.zeros((0, 4, 3))), "bow/a"),
    "other V": (put(np.zeros((5, 7, 3))), "V = 4"), "other C": (put(np.zeros((5, 4, 5))), "C = 2 or 3"),
    "mixed C": (put(np.zeros((5, 4, 2))), "same C"), "complex": (put(np.zeros((5, 4, 3), complex)), "bow/a"),
    "ragged json": (put("[[1], [2, 3]]", "a.json"), "bow/a"), "cut json": (put("[[[1, 2", "a.json"), "bow/a"),
    "json of texts": (put('[[["a"]]]', "a.json"), "bow/a"), "deep json": (put("[" * 100_000, "a.json"), "bow/a"),
    "json object": (put("{}", "a.json"), "bow/a"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_named(tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    path = tree(tmp_path / "mine")
    write, words = BAD[case]
    write(path)
    layout = layout_file(tmp_path / "robot.yaml")
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--layout", str(layout)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: Expected") and err.count("\n") == 1


@pytest.mark.parametrize("content, words", [
    ("{", "readable JSON"), ("[]", "sequences"), ('{"sequences": 3}', "sequences"), ('{"sequences": [{}]}', "sequences"),
    ('{"sequences": []}', "Got none"), ('{"sequences": [{"file": "no.npy", "label": 0}]}', "layout"),
], ids=["cut", "a list", "a number", "an empty entry", "nothing", "no layout"])
def test_bad_json_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(UserError, match=words):
        ArraysSource(tmp_path / "set.json")


@pytest.mark.parametrize("entry, words", [
    ({"file": "no.npy", "label": 0}, "no.npy"), ({"keypoint": [[[0, 0, 0]] * 4], "label": "sit"}, "label of sequence 1"),
    ({"keypoint": [[[0, 0, 0]] * 4], "label": 9}, "label of sequence 1"),
    ({"keypoint": [[[0, 0, 0]] * 4]}, "label of sequence 1"),
    ({"keypoint": [[[0, 0, 0]] * 4], "label": True}, "label of sequence 1"), ({"keypoint": 3, "label": 0}, "sequence 1"),
], ids=["no file", "unknown class", "number too large", "no label", "label true", "a number"])
def test_bad_entries_are_named(tmp_path: Path, entry: dict, words: str) -> None:
    good = {"keypoint": [[[1, 0, 0]] * 4], "label": "bow"}
    content = {"layout": LAYOUT, "label_names": ["bow", "wave"], "sequences": [good, entry]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        write_archive(ArraysSource(tmp_path / "set.json"), tmp_path / "out")


@pytest.mark.parametrize("order", ["TV", "TVCC", "NTVC", "tvc", ""])
def test_bad_orders_are_refused(tmp_path: Path, order: str) -> None:
    with pytest.raises(UserError, match="order"):
        ArraysSource(tree(tmp_path / "mine"), LAYOUT, order)


def test_other_folders_above_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Got 'part1'"):
        ArraysSource(tree(tmp_path / "mine", ("part1", "test")), LAYOUT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="Got none"):
        ArraysSource(tmp_path / "empty", LAYOUT)


def test_a_sequence_as_npy_and_json_is_listed_twice(tmp_path: Path) -> None:
    path = tree(tmp_path / "mine")
    (path / "bow" / "s0.json").write_text(json.dumps(sequence(0).tolist()))
    with pytest.raises(UserError, match="'bow/s0' in one part"):
        ArraysSource(path, LAYOUT)


def test_a_stopped_conversion_goes_on_with_the_same_files_and_labels_only(tmp_path: Path) -> None:
    path = tree(tmp_path / "mine")
    first = ArraysSource(path, LAYOUT, label_names=("bow", "wave")).fingerprint()
    assert ArraysSource(path, LAYOUT, label_names=("bow", "wave")).fingerprint() == first
    assert ArraysSource(path, LAYOUT, label_names=("wave", "bow")).fingerprint() != first
    np.save(path / "bow" / "s0.npy", sequence(9, 20, 4, 3))
    assert ArraysSource(path, LAYOUT, label_names=("bow", "wave")).fingerprint() != first
