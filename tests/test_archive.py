"""Archive: the native format, `.npz` files, splits, and what a bad file says."""
from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn.data import Archive
from sparse_stgcn.data.protocols import protocols_in
from sparse_stgcn.errors import UserError
from sparse_stgcn.skeleton import Skeleton

JOINTS = ["root", "chest", "head", "left_hand", "right_hand"]
EDGES = [[1, 0], [2, 1], [3, 1], [4, 1]]


def content(**change: object) -> dict[str, np.ndarray]:
    """The arrays of a small valid archive; None removes a key."""
    rng = np.random.default_rng(0)
    arrays: dict = {
        "keypoint": rng.normal(size=(12, 2, 5, 3)).astype(np.float32),
        "offset": np.array([0, 3, 4, 9, 12]),
        "label": np.array([0, 1, 1, 0]),
        "label_names": np.array(["wave", "bow"]),
        "train": np.array([True, True, False, False]),
        "joint_names": np.array(JOINTS), "edges": np.array(EDGES), "root": np.array(0),
        "fps": np.float32(30), "unit": np.array("m"), "subject": np.arange(4), "sample": np.array(list("abcd")),
    }
    arrays |= change
    return {key: value for key, value in arrays.items() if value is not None}


def npz(path: Path, compressed: bool = True, **change: object) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **content(**change))
    return path


def same(a: Archive, b: Archive) -> None:
    np.testing.assert_array_equal(a.keypoint, b.keypoint)
    np.testing.assert_array_equal(a.offset, b.offset)
    np.testing.assert_array_equal(a.label, b.label)
    assert a.label_names == b.label_names and a.skeleton == b.skeleton
    for name in ("splits", "fields"):
        left, right = getattr(a, name), getattr(b, name)
        assert set(left) == set(right)
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


# ---- reading and writing ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("compressed", [True, False])
def test_npz_is_read(tmp_path: Path, compressed: bool) -> None:
    a = Archive.open(npz(tmp_path / "x.npz", compressed))
    assert len(a) == 4 and a.num_classes == 2 and a.num_persons == 2 and a.skeleton.joints == tuple(JOINTS)
    assert a[1].shape == (1, 2, 5, 3) and a.lengths.tolist() == [3, 1, 5, 3]
    np.testing.assert_array_equal(a[-1], a.keypoint[9:12])
    assert a.read(2)[0].shape == (2, 5, 5, 3) and a.read(2)[1] is None
    assert a.info["fps"] == 30 and a.info["unit"] == "m" and a.sample_ids.tolist() == list("abcd")
    assert a.train.tolist() == [True, True, False, False]
    assert "4 sequences, 2 classes, M=2, V=5, C=3" in repr(a)


def test_uncompressed_member_is_memory_mapped(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(30000, 2, 5, 3)).astype(np.float32)
    path = npz(tmp_path / "x.npz", False, keypoint=x, offset=np.array([0, 3, 4, 9, 30000]))
    a = Archive.open(path)
    assert isinstance(a.keypoint, np.memmap)
    np.testing.assert_array_equal(a.keypoint, x)
    assert isinstance(Archive.open(npz(tmp_path / "y.npz")).keypoint, np.ndarray)


def test_save_and_open_is_the_identity(tmp_path: Path) -> None:
    a = Archive.open(npz(tmp_path / "x.npz"))
    b = Archive.open(a.save(tmp_path / "native"))
    same(a, b)
    assert isinstance(b.keypoint, np.memmap) and b.info["finite"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "x.npz"], "no temporary file stays"
    same(b, Archive.open(b.save(tmp_path / "again")))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_archive_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    persons, joints = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    flat = draw(st.booleans())
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    offset = np.concatenate([[0], np.cumsum(lengths)])
    x = rng.normal(size=(offset[-1], persons, joints, 2 if flat else 3)).astype(dtype)
    skeleton = Skeleton.load({"joints": [f"j{i}" for i in range(joints)], "edges": [[i, 0] for i in range(1, joints)],
                              "root": 0})
    a = Archive(x, offset, rng.integers(0, 3, len(lengths)), skeleton, ("a", "b", "ü ö"),
                {"xsub_train": rng.uniform(size=len(lengths)) < 0.5}, x[..., 0] if flat else None,
                {"sample": np.array([f"s{i}" for i in range(len(lengths))])})
    path = tmp_path_factory.mktemp("archive") / "a"
    b = Archive.open(a.save(path))
    same(a, b)
    assert b.keypoint.dtype == dtype and (b.score is None) == (not flat)


def test_existing_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    a = Archive.open(npz(tmp_path / "x.npz"))
    a.save(tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        a.save(tmp_path / "out")
    a.save(tmp_path / "out", overwrite=True)
    same(a, Archive.open(tmp_path / "out"))
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="something else"):
        a.save(tmp_path / "precious", overwrite=True)


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    a = Archive.open(npz(tmp_path / "x.npz"))
    a.fields["bad"] = np.array([object()] * 4)  # type: ignore[index]
    with pytest.raises(ValueError):
        a.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_archive_goes_to_another_process_without_its_frames(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(30000, 2, 5, 3)).astype(np.float32)
    arrays = content(keypoint=x, offset=np.array([0, 3, 4, 9, 30000]))
    np.savez(tmp_path / "x.npz", **arrays)
    for a in (Archive.open(tmp_path / "x.npz"), Archive.open(Archive.open(tmp_path / "x.npz").save(tmp_path / "n"))):
        wire = pickle.dumps(a.with_split())
        assert len(wire) < 20_000
        same(a, pickle.loads(wire))


def test_layout_can_be_named(tmp_path: Path) -> None:
    x = np.zeros((12, 1, 25, 3), np.float32)
    path = npz(tmp_path / "x.npz", keypoint=x, joint_names=None, edges=None, root=None)
    assert Archive.open(path, layout="nturgb+d").skeleton.name == "nturgb+d"
    with pytest.raises(UserError, match="no 'joint_names'.*layout"):
        Archive.open(path)


# ---- splits ----------------------------------------------------------------------------------------------------

def with_splits(names: list[str], **more: object) -> Archive:
    arrays = content()
    masks = {name: np.arange(4) % 2 == (0 if "train" in name else 1) for name in names}
    skeleton = Skeleton.load({"joints": JOINTS, "edges": EDGES, "root": 0})
    return Archive(arrays["keypoint"], arrays["offset"], arrays["label"], skeleton, ("a", "b"), masks, **more)


@pytest.mark.parametrize("names, protocol, found", [
    (["train", "test"], None, "train/test"), (["train", "val"], "k400", "train/val"), (["train", "val"], "gym", "train/val"),
    (["train", "test"], "train", "train/test"), (["train", "val"], "train/val", "train/val"),
    (["xsub_train", "xsub_val"], None, "xsub"), (["xsub_train", "xsub_val"], "ntu60_xsub", "xsub"),
    (["xview_train", "xview_val", "xsub_train", "xsub_val"], "ntu60_xview", "xview"),
    (["xset_train", "xset_val", "xsub_train", "xsub_val"], "ntu120_xset", "xset"),
    (["xset_train", "xset_val", "xsub_train", "xsub_val"], "xsub", "xsub"),
    (["train1", "test1", "train2", "test2"], "2", "2"),
], ids=lambda value: str(value))
def test_protocols_by_their_names(names: list[str], protocol: str | None, found: str) -> None:
    a = with_splits(names).with_split(protocol)
    assert a.info["split"] == found and set(a.splits) == {"train", "test"}
    assert a.train.tolist() == [True, False, True, False] and a.members("test").tolist() == [1, 3]


@pytest.mark.parametrize("names, protocol", [
    (["xview_train", "xview_val", "xsub_train", "xsub_val"], None), (["train"], None), ([], None),
    (["train", "test"], "xsub"), (["xsub_train", "xsub_val"], "fold0"),
])
def test_unknown_protocol_says_what_there_is(names: list[str], protocol: str | None) -> None:
    with pytest.raises(UserError, match="Expected split to be one of") as error:
        with_splits(names).with_split(protocol)
    for known in protocols_in({name: np.zeros(0) for name in names}):
        assert (known or "train") in str(error.value)


def test_a_sequence_that_trains_is_not_tested() -> None:
    a = with_splits(["xsub_train", "xsub_val", "train", "test"], fields={"sample": np.array(list("abcd"))})
    a.splits["xsub_val"][2] = True
    with pytest.raises(UserError, match="both the training and the test part of split 'xsub' .* Got 1 in both, 'c' first"):
        a.with_split("xsub")
    assert a.with_split().members("test").tolist() == [1, 3], "what another protocol has does not matter"


@pytest.mark.parametrize("parts, want", [
    ({"test": [0, 0, 1, 0]}, {"test": [2]}), ({"val": [0, 0, 0, 1]}, {"test": [3]}), ({}, {"test": [2, 3]}),
    ({"val": [0, 0, 0, 1], "test": [0, 0, 1, 0]}, {"test": [2], "val": [3]}),
], ids=["test", "val", "neither", "both"])
def test_npz_names_its_test_split(tmp_path: Path, parts: dict[str, list[int]], want: dict[str, list[int]]) -> None:
    a = Archive.open(npz(tmp_path / "x.npz", **{name: np.array(mask, bool) for name, mask in parts.items()}))
    assert {name: a.members(name).tolist() for name in a.splits} == {"train": [0, 1], **want}
    assert not {"test", "val"} & set(a.fields) and a.with_split().members("test").tolist() == want["test"]
    same(a, Archive.open(a.save(tmp_path / "native")))


def test_a_field_called_test_stays_one(tmp_path: Path) -> None:
    a = Archive.open(npz(tmp_path / "x.npz", test=np.array([3, 1, 2, 0])))
    assert a.fields["test"].tolist() == [3, 1, 2, 0] and a.members("test").tolist() == [2, 3]
    assert "test" in Archive.open(npz(tmp_path / "y.npz", train=None, test=np.array([True] * 4))).fields


def test_folds_partition_the_sequences() -> None:
    a = with_splits([], fields={"fold": np.array([0, 1, 2, 1])})
    held = sum(a.fold(k).splits["test"].astype(int) for k in range(3))
    assert held.tolist() == [1, 1, 1, 1]
    assert a.fold(1).train.tolist() == [True, False, True, False]
    with pytest.raises(UserError, match="no such fold"):
        a.fold(7)


def test_real_folds(shared: Path) -> None:
    a = Archive.open(shared / "data" / "sbu.npz")
    for k in range(5):
        fold = a.fold(k)
        np.testing.assert_array_equal(fold.train, a.fields["fold"] != k)
        fold.check_classes()


def test_empty_class_is_named() -> None:
    with pytest.raises(UserError, match="no sequence of class 1 \\(b; one class is empty\\)"):
        with_splits(["train"]).check_classes([0, 3])
    with_splits(["train"]).check_classes([0, 1])


def test_not_finite_sequence_is_named(tmp_path: Path) -> None:
    arrays = content()
    arrays["keypoint"][8, 1, 2, 0] = np.inf
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match="sequence 2 \\('c'\\)"):
        Archive.open(tmp_path / "x.npz").check_finite()
    native = Archive.open(Archive.open(tmp_path / "x.npz").save(tmp_path / "n"))
    assert native.info["finite"] is False
    with pytest.raises(UserError, match="sequence 2"):
        native.check_finite()


# ---- bad files -------------------------------------------------------------------------------------------------

BAD = {
    "no keypoint": ({"keypoint": None}, "no 'keypoint'"),
    "no offset": ({"offset": None}, "no 'offset'"),
    "no label": ({"label": None}, "no 'label'"),
    "no edges": ({"edges": None}, "no 'edges'"),
    "keypoint dtype": ({"keypoint": np.zeros((12, 2, 5, 3), np.int32)}, "float16, float32 or float64"),
    "keypoint complex": ({"keypoint": np.zeros((12, 2, 5, 3), complex)}, "float16, float32 or float64"),
    "keypoint rank": ({"keypoint": np.zeros((12, 5, 3), np.float32)}, "(F, M, V, C)"),
    "V": ({"keypoint": np.zeros((12, 2, 6, 3), np.float32)}, "V = 5 joints"),
    "C": ({"keypoint": np.zeros((12, 2, 5, 4), np.float32)}, "C = 2 or 3"),
    "no person": ({"keypoint": np.zeros((12, 0, 5, 3), np.float32)}, "at least one person"),
    "offset end": ({"offset": np.array([0, 3, 4, 9, 13])}, "from 0 to F = 12"),
    "offset start": ({"offset": np.array([1, 3, 4, 9, 12])}, "from 0 to F = 12"),
    "offset falls": ({"offset": np.array([0, 5, 4, 9, 12])}, "for sequence 1"),
    "offset repeats": ({"offset": np.array([0, 3, 3, 9, 12])}, "Got 0 frames for sequence 1"),
    "offset length": ({"offset": np.array([0, 3, 12])}, "offset (N + 1,)"),
    "offset dtype": ({"offset": np.array([0, 3, 4, 9, 12.0])}, "offset"),
    "label dtype": ({"label": np.array([0.0, 1, 1, 0])}, "label"),
    "label too big": ({"label": np.array([0, 1, 2, 0])}, "Got 2 for sequence 2"),
    "label negative": ({"label": np.array([0, -1, 1, 0])}, "Got -1 for sequence 1"),
    "label rank": ({"label": np.array([[0, 1, 1, 0]])}, "label (N,)"),
    "nothing": ({"label": np.zeros(0, int), "offset": np.array([0]), "keypoint": np.zeros((0, 2, 5, 3), np.float32),
                 "train": np.zeros(0, bool), "subject": None, "sample": None}, "N of at least 1"),
    "train dtype": ({"train": np.array([1, 1, 0, 0])}, "split 'train'"),
    "train length": ({"train": np.array([True])}, "split 'train'"),
    "score shape": ({"score": np.zeros((12, 2, 5), np.float32)}, "score"),
    "edges shape": ({"edges": np.arange(4)}, "edges (V - 1, 2)"),
    "edges dtype": ({"edges": np.zeros((4, 2))}, "edges (V - 1, 2)"),
    "edges circle": ({"edges": np.array([[1, 2], [2, 1], [3, 1], [4, 1]])}, "edges"),
    "root": ({"root": np.array(9)}, "root"),
    "joint twice": ({"joint_names": np.array(["a", "a", "b", "c", "d"])}, "joints"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    change, words = BAD[case]
    with pytest.raises(ValueError) as error:
        Archive.open(npz(tmp_path / "x.npz", **change))
    message = str(error.value)
    assert words in message and message.startswith("Expected") and "\n" not in message


@pytest.mark.parametrize("what", ["absent", "empty", "text", "object arrays", "pickle", "directory", "meta", "version"])
def test_other_files_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.npz"
    if what == "empty":
        path.touch()
    elif what == "text":
        path.write_text("hello")
    elif what == "object arrays":
        np.savez(path, **(content() | {"sample": np.array([{}, {}, {}, {}])}))
    elif what == "pickle":
        path.write_bytes(pickle.dumps({"keypoint": 1}))
    elif what == "directory":
        path.mkdir()
    elif what in ("meta", "version"):
        path = Archive.open(npz(tmp_path / "y.npz")).save(path)
        meta = json.loads((path / "meta.json").read_text())
        text = json.dumps(meta | {"version": 99}) if what == "version" else "{"
        (path / "meta.json").write_text(text)
    with pytest.raises(UserError, match="^Expected"):
        Archive.open(path)


def test_an_archive_names_no_layout_elsewhere(tmp_path: Path) -> None:
    path = Archive.open(npz(tmp_path / "y.npz")).save(tmp_path / "y")
    meta = json.loads((path / "meta.json").read_text())
    (tmp_path / "layout.json").write_text(json.dumps(meta["skeleton"]))
    (path / "meta.json").write_text(json.dumps(meta | {"skeleton": str(tmp_path / "layout.json")}))
    with pytest.raises(ValueError, match="layout in archive .* to be a mapping or one of"):
        Archive.open(path)
    assert len(Archive.open(path, layout=tmp_path / "layout.json").skeleton) == len(meta["skeleton"]["joints"])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_npz_never_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(npz(folder / "whole.npz", data.draw(st.booleans())).read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    for _ in range(data.draw(st.integers(0, 6))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "damaged.npz").write_bytes(raw)
    try:
        a = Archive.open(folder / "damaged.npz")
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert len(a) >= 1 and np.isfinite(a.offset).all()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_directory_never_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory,
                                                       data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = Archive.open(npz(folder / "x.npz")).save(folder / "a")
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    raw = bytearray(file.read_bytes())
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        Archive.open(path)
    except ValueError as error:
        assert "\n" not in str(error)


# ---- memory ----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_large_archive_stays_on_disk(tmp_path: Path) -> None:
    """Batches of a sparse archive of 10 GB: pages that were read leave the resident set again."""
    frames, count = 10 * 2**30 // (2 * 25 * 3 * 4), 20_000
    small = Archive(np.zeros((count, 2, 25, 3), np.float32), np.arange(count + 1), np.arange(count) % 60,
                    Skeleton.load("nturgb+d"), splits={"train": np.ones(count, bool)}, info={"finite": True})
    path = small.save(tmp_path / "large")
    np.save(path / "offset.npy", np.linspace(0, frames, count + 1).astype(np.int64))
    with open(path / "keypoint.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (frames, 2, 25, 3)})
        os.truncate(file.fileno(), file.tell() + frames * 600)
    script = textwrap.dedent("""
        import sys
        from sparse_stgcn.data import Archive, SkeletonDataset, storage

        def resident():
            lines = dict(line.split(":") for line in open("/proc/self/status"))
            return [int(lines[key].split()[0]) // 1024 for key in ("RssFile", "VmHWM")]

        data = SkeletonDataset(Archive.open(sys.argv[1]), "train", clip_len=16, cache_bytes=8 << 20)
        for release in (8 << 20, 1 << 40):
            storage.RELEASE_BYTES = release
            before = resident()[0]
            for first in range(0, 160, 8):
                data.batch([101 * i for i in range(first, first + 8)])
            print(resident()[0] - before, end=" ")
        print(resident()[1])
    """)
    out = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    released, kept, peak = map(int, out.stdout.split())
    read = 160 * frames // count * 600 >> 20
    assert released < read / 3 < kept and peak < 1000, out.stdout


def test_text_beyond_unicode_is_damage(tmp_path: Path) -> None:
    names = np.array(JOINTS)
    names.view(np.uint32)[3] = 0x110000
    with pytest.raises(UserError, match="beyond Unicode"):
        Archive.open(npz(tmp_path / "a.npz", joint_names=names))
