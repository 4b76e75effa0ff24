"""CTR-GCN's `.npz` files."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import convert
from sparse_stgcn.data import Archive, SkeletonDataset
from sparse_stgcn.data.ctrgcn import CtrgcnSource
from sparse_stgcn.data.writer import write_archive
from sparse_stgcn.errors import UserError, run


def content(**change: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict = {}
    for part, count in (("train", 5), ("test", 3)):
        x = rng.normal(size=(count, 12, 150)).astype(np.float32)
        for i in range(count):
            x[i, 4 + i:] = 0
        x[::2, :, 75:] = 0
        arrays[f"x_{part}"] = x
        arrays[f"y_{part}"] = np.eye(6)[rng.integers(0, 6, count)]
    return {key: value for key, value in (arrays | change).items() if value is not None}


def save(path: Path, compressed: bool = False, **change: object) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **content(**change))
    return path


@pytest.mark.parametrize("compressed", [True, False])
def test_npz_becomes_an_archive(tmp_path: Path, compressed: bool) -> None:
    want = content()
    a = write_archive(CtrgcnSource(save(tmp_path / "NTU60_CS.npz", compressed)), tmp_path / "out")
    assert len(a) == 8 and a.num_classes == 6 and a.skeleton.name == "nturgb+d" and a.keypoint.dtype == np.float32
    assert a.lengths.tolist() == [4, 5, 6, 7, 8, 4, 5, 6]
    assert a.sample_ids.tolist() == [f"train_{i}" for i in range(5)] + [f"test_{i}" for i in range(3)]
    assert a.with_split().train.tolist() == [True] * 5 + [False] * 3
    # As in feeder_ntu.py: (N, T, M, V, C) in the order of the file.
    x = want["x_train"].reshape(5, 12, 2, 25, 3)
    for i in range(5):
        np.testing.assert_array_equal(a[i], x[i, :4 + i])
    assert a.label.tolist() == [*want["y_train"].argmax(1), *want["y_test"].argmax(1)]
    assert SkeletonDataset(a.with_split(), "train", clip_len=6)[0][0].shape == (2, 6, 25, 3)


def test_class_numbers_are_read_too(tmp_path: Path) -> None:
    y = {f"y_{part}": content()[f"y_{part}"].argmax(1) for part in ("train", "test")}
    a = write_archive(CtrgcnSource(save(tmp_path / "x.npz", **y)), tmp_path / "out")
    assert a.label.tolist() == [*y["y_train"], *y["y_test"]]


def test_empty_sample_keeps_its_place(tmp_path: Path) -> None:
    x = content()["x_test"]
    x[1] = 0
    a = write_archive(CtrgcnSource(save(tmp_path / "x.npz", x_test=x)), tmp_path / "out")
    assert len(a) == 8 and a.lengths[6] == 1 and not a[6].any()


def test_command_detects_the_format(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(convert.main, [str(save(tmp_path / "x.npz")), str(tmp_path / "out")]) == 0
    assert "8 sequences, 6 classes" in capsys.readouterr().out
    assert Archive.open(tmp_path / "out").info["finite"] is True


def test_other_skeletons_need_their_layout(tmp_path: Path) -> None:
    small = {key: value[:, :, :24] for key, value in content().items() if key.startswith("x")}
    path = save(tmp_path / "x.npz", **small)
    with pytest.raises(UserError, match="4 joints"):
        CtrgcnSource(path)
    layout = {"joints": list("abcd"), "edges": [[1, 0], [2, 0], [3, 0]], "root": 0}
    assert write_archive(CtrgcnSource(path, layout), tmp_path / "out").keypoint.shape[2] == 4


BAD = {
    "no x_train": ({"x_train": None}, "no 'x_train'"), "no y_test": ({"y_test": None}, "no 'y_test'"),
    "x of integers": ({"x_train": np.zeros((5, 12, 150), int)}, "x_train"),
    "x of four axes": ({"x_train": np.zeros((5, 12, 2, 75))}, "x_train"),
    "x of odd width": ({"x_train": np.zeros((5, 12, 151))}, "x_train"),
    "x of no width": ({"x_train": np.zeros((5, 12, 0))}, "x_train"),
    "x_test of other width": ({"x_test": np.zeros((3, 12, 102))}, "x_test"),
    "y too short": ({"y_train": np.eye(6)[:4]}, "y_train"),
    "y of two classes": ({"y_train": np.ones((5, 6))}, "2 classes in row 0".replace("2", "6")),
    "y of no class": ({"y_train": np.zeros((5, 6))}, "0 classes in row 0"),
    "y of fractions": ({"y_train": np.full(5, 0.5)}, "y_train"),
    "y negative": ({"y_train": np.array([0, 1, -1, 0, 0])}, "y_train"),
    "y of texts": ({"y_train": np.array(list("abcde"))}, "y_train"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_named(tmp_path: Path, case: str) -> None:
    change, words = BAD[case]
    with pytest.raises(UserError) as error:
        CtrgcnSource(save(tmp_path / "x.npz", **change))
    assert words in str(error.value) and str(error.value).startswith("Expected")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(save(folder / "whole_ctr.npz", data.draw(st.booleans())).read_bytes())
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]
    for _ in range(data.draw(st.integers(0, 6))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged_ctr.npz"
    path.write_bytes(raw)
    try:
        source = CtrgcnSource(path)
        assert [source.record(i).sample for i in range(len(source))]
    except UserError as error:
        assert "damaged_ctr.npz" in str(error) and "\n" not in str(error)
