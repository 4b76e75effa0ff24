"""PYSKL pickles: the restricted unpickler, the reader, and `convert`."""
from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import convert
from sparse_stgcn.data import Archive, SkeletonDataset
from sparse_stgcn.data import transforms as tf
from sparse_stgcn.data.pyskl import PysklSource, load_pickle
from sparse_stgcn.data.writer import write_archive
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.skeleton import Skeleton


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def annotations(count: int = 12, joints: int = 25, flat: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        persons, frames = 1 + i % 2, int(rng.integers(1, 20))
        item = {"frame_dir": f"S{i:03d}", "label": i % 3, "total_frames": frames,
                "keypoint": rng.normal(size=(persons, frames, joints, 2 if flat else 3)).astype(np.float16)}
        if flat:
            item |= {"keypoint_score": rng.uniform(size=(persons, frames, joints)).astype(np.float16),
                     "img_shape": (480 + i, 640), "original_shape": (480 + i, 640)}
        made.append(item)
    return made


def pickled(items: list[dict[str, Any]], key: str = "annotations") -> dict[str, Any]:
    ids = [item["frame_dir"] for item in items]
    return {"split": {"xsub_train": ids[:8], "xsub_val": ids[8:], "xview_train": ids[::2], "xview_val": ids[1::2]},
            key: items}


# ---- unpickler -------------------------------------------------------------------------------------------------

PLAIN = {
    "a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.float32(3), "c": [np.asfortranarray(np.ones((2, 3))), "q"],
    "d": {1, 2}, "e": b"xx", "f": collections.OrderedDict(a=np.zeros((0, 3))), "g": np.bool_(True), "h": bytearray(b"12"),
    "i": np.arange(3, dtype=">i4"), "n": None, "s": np.array(["ab", "c"]), "t": (1, (2.5, np.array("abc"))), "z": 1 << 90,
    "u": frozenset({3}), "v": 2j, "w": b"", "m": collections.defaultdict(list, x=[1]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_is_read(tmp_path: Path, protocol: int) -> None:
    shared_array = np.arange(4)
    got = load_pickle(write(tmp_path / "x.pkl", PLAIN | {"p": [shared_array, shared_array]}, protocol))
    assert set(got) == {*PLAIN, "p"}
    for key, want in PLAIN.items():
        if isinstance(want, (np.ndarray, np.generic)):
            assert got[key].dtype == want.dtype and got[key].shape == want.shape
            np.testing.assert_array_equal(got[key], want)
    for key in "denhzuvw":
        assert got[key] == PLAIN[key] and type(got[key]) is type(PLAIN[key])
    np.testing.assert_array_equal(got["c"][0], np.ones((2, 3)))
    assert got["c"][1] == "q" and got["t"][0] == 1 and got["t"][1][1] == "abc" and got["f"]["a"].shape == (0, 3)
    assert got["m"] == {"x": [1]} and got["p"][0] is got["p"][1]


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    # What Python 2.7 with NumPy 1.11 wrote for {'k': numpy.arange(2, dtype='i2')}: byte strings, old module names.
    raw = (b"\x80\x02}q\x01U\x01kq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq"
           b"\x06\x87q\x07Rq\x08(K\x01K\x02\x85q\tcnumpy\ndtype\nq\nU\x02i2q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03U\x01<q\x0eNNNJ"
           b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x04\x00\x00\x01\x00q\x10tq\x11bs.")
    (tmp_path / "x.pkl").write_bytes(raw)
    np.testing.assert_array_equal(load_pickle(tmp_path / "x.pkl")["k"], np.arange(2, dtype=np.int16))


class Calls:
    """Pickles to a call of any function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


MARK = "unpickled-a-call"
HOSTILE = {
    "os.system": (Calls(os.system, f"touch {MARK}"), "system"),
    "eval": (Calls(eval, f"open('{MARK}', 'w')"), "eval"),
    "exec": (Calls(exec, f"open('{MARK}', 'w')"), "exec"),
    "subprocess": (Calls(subprocess.check_call, ["touch", MARK]), "check_call"),
    "getattr": (Calls(getattr, "text", "upper"), "getattr"),
    "open": (Calls(open, MARK, "w"), "open"),
    "numpy file": (Calls(np.fromfile, "x"), "fromfile"),
    "numpy load": (Calls(np.load, "x"), "load"),
    "numpy zeros": (Calls(np.zeros, (1 << 40,)), "zeros"),
    "ndarray of any size": (Calls(bytearray, 1 << 40), "length"),
    "object array": (np.array([{}], dtype=object), "dtype 'O8'"),
    "record array": (np.zeros(2, dtype=[("a", "f4")]), "dtype 'V4'"),
    "date array": (np.zeros(2, dtype="M8[s]"), "dtype 'M8'"),
    "path": (Path("/etc"), "Path"),
    "range": (range(3), "range"),
    "own class": (Calls(Archive.open, "x"), "getattr"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str,
                                             protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    value, word = HOSTILE[case]
    with pytest.raises(UserError) as error:
        load_pickle(write(tmp_path / "x.pkl", {"annotations": [{"keypoint": value}]}, protocol))
    assert word in str(error.value) and str(error.value).startswith("Expected only NumPy arrays")
    assert not (tmp_path / MARK).exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
DTYPE = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
CRAFTED = {
    "class with a state": b"c__builtin__\nset\n}S'a'\nI1\nsb.",
    "state for a dtype class": b"cnumpy\ndtype\n}S'value'\nI1\nsb.",
    "state for a list": b"](I1\ntb.",
    "import of a module": b"cos\nsystem\n(S'true'\ntR.",
    "new object": b"\x80\x02cnumpy\nndarray\n(K\x05t\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"P1\n.",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7fh\x00.",
    "claimed bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"abc.",
    "claimed text": b"\x80\x04\x8d" + struct.pack("<Q", (1 << 63) - 1) + b"abc.",
    "claimed bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b"abc.",
    "claimed frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "negative bytes": b"\x80\x02T\xff\xff\xff\xffabc.",
    "array larger than its bytes": ARRAY + b"(I1\n(I1000000000000\nt" + DTYPE + b"I00\nS'abcd'\ntb.",
    "array of negative size": ARRAY + b"(I1\n(I-1\nI-1\nt" + DTYPE + b"I00\nS'abcd'\ntb.",
    "array without dtype": ARRAY + b"(I1\n(I1\ntS'f4'\nI00\nS'abcd'\ntb.",
    "array with a list": ARRAY + b"(I1\n(I1\nt" + DTYPE + b"I00\n(lI1\natb.",
    "empty": b"",
    "only a mark": b"(.",
    "unknown opcode": b"\x80\x04\xff.",
    "text": b"Traceback (most recent call last):\n",
    "zip": b"PK\x03\x04" + bytes(40),
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "future protocol": b"\x80\xffN.",
    "deep": b"(" * 100_000 + b"." ,
    "deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_bytes_end_in_one_sentence(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.pkl").write_bytes(CRAFTED[case])
    with pytest.raises(UserError, match="^Expected") as error:
        load_pickle(tmp_path / "x.pkl")
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_nested_sharing_stays_small(tmp_path: Path) -> None:
    value: Any = [np.arange(3)]
    for _ in range(60):
        value = [value, value]
    got = load_pickle(write(tmp_path / "x.pkl", value))
    for _ in range(60):
        assert got[0] is got[1]
        got = got[0]
    np.testing.assert_array_equal(got[0], np.arange(3))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_damaged_pickles_never_end_in_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    raw = bytearray(pickle.dumps(pickled(annotations(3, 4)), data.draw(st.sampled_from([0, 2, 4, 5]))))
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]
    for _ in range(data.draw(st.integers(0, 5))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        source = PysklSource(path, {"joints": list("abcd"), "edges": [[1, 0], [2, 0], [3, 0]], "root": 0})
        for i in range(len(source)):
            source.record(i)
    except ValueError as error:
        assert "\n" not in str(error)


# ---- reader ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["annotations", "annos"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_3d_pickle_becomes_an_archive(tmp_path: Path, key: str, protocol: int) -> None:
    items = annotations()
    a = write_archive(PysklSource(write(tmp_path / "ntu.pkl", pickled(items, key), protocol)), tmp_path / "out")
    assert a.skeleton.name == "nturgb+d" and a.num_persons == 2 and a.keypoint.dtype == np.float16
    assert a.label.tolist() == [item["label"] for item in items] and a.num_classes == 3
    assert a.sample_ids.tolist() == [item["frame_dir"] for item in items]
    for i, item in enumerate(items):
        got, score = a.read(i)
        assert score is None
        np.testing.assert_array_equal(got[:len(item["keypoint"])], item["keypoint"])
        assert not got[len(item["keypoint"]):].any()
    assert set(a.splits) == {"xsub_train", "xsub_val", "xview_train", "xview_val"}
    assert a.with_split("ntu60_xsub").members("test").tolist() == [8, 9, 10, 11]
    assert a.with_split("xview").members("train").tolist() == [0, 2, 4, 6, 8, 10]
    assert a.info["finite"] is True


def test_2d_pickle_keeps_scores_and_image_sizes(tmp_path: Path) -> None:
    items = annotations(joints=17, flat=True)
    a = write_archive(PysklSource(write(tmp_path / "gym.pkl", pickled(items))), tmp_path / "out")
    assert a.skeleton.name == "coco" and a.is_2d
    assert a.fields["img_shape"].tolist() == [[480 + i, 640] for i in range(12)]
    got, score = a.read(3)
    np.testing.assert_array_equal(got, items[3]["keypoint"])
    np.testing.assert_array_equal(score, items[3]["keypoint_score"])
    data = SkeletonDataset(a, "xsub_val", clip_len=8, train=False)
    want = tf.pre_normalize_2d(items[9]["keypoint"], items[9]["keypoint_score"], (489, 640))
    np.testing.assert_array_equal(data.sequence(1), want)


def test_reader_and_dataset_equal_the_pipeline_on_the_pickle(tmp_path: Path) -> None:
    """From file to network input: the same numbers as the transforms on the annotation itself."""
    items = annotations(seed=5)
    a = write_archive(PysklSource(write(tmp_path / "x.pkl", pickled(items))), tmp_path / "out").with_split("xsub")
    data = SkeletonDataset(a, "test", "b", clip_len=6, num_clips=4, train=False, align=False)
    for i in range(len(data)):
        item = items[8 + i]
        x = tf.skeleton_features(tf.pre_normalize_3d(item["keypoint"], spine=None, shoulders=None), ("b",),
                                 Skeleton.load("nturgb+d").bones)
        frames = tf.sample_test_clips(x.shape[1], 6, 4).ravel()
        np.testing.assert_array_equal(data[i][0], tf.split_clips(tf.format_persons(x[:, frames]), 4))


@pytest.mark.parametrize("persons, frames", [(3, 7), (5, 4)])
def test_more_persons_than_kept(tmp_path: Path, persons: int, frames: int) -> None:
    x = np.random.default_rng(0).normal(size=(persons, frames, 25, 3)).astype(np.float32)
    x[0, 1:] = 0
    items = [{"filename": "a", "label": 0, "keypoint": x}, {"filename": "b", "label": 0, "keypoint": x[1:2]}]
    path = write(tmp_path / "x.pkl", items)
    a = write_archive(PysklSource(path), tmp_path / "two")
    np.testing.assert_array_equal(a.read(0)[0], x[1:3])
    whole = write_archive(PysklSource(path, max_persons=10), tmp_path / "all")
    np.testing.assert_array_equal(whole.read(0)[0], x)
    assert a.sample_ids.tolist() == ["a", "b"] and not a.splits


def test_third_channel_of_coco_is_its_score(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(size=(1, 5, 17, 3)).astype(np.float16)
    a = write_archive(PysklSource(write(tmp_path / "x.pkl", [{"label": 0, "keypoint": x}])), tmp_path / "out")
    np.testing.assert_array_equal(a.read(0)[0], x[..., :2])
    np.testing.assert_array_equal(a.read(0)[1], x[..., 2])


def test_an_id_in_both_lists_of_a_split_is_named(tmp_path: Path) -> None:
    content = pickled(annotations())
    content["split"]["xview_val"] += content["split"]["xview_train"][1:3]
    a = write_archive(PysklSource(write(tmp_path / "ntu.pkl", content)), tmp_path / "out")
    with pytest.raises(UserError, match="part of split 'xview' of archive 'ntu'. Got 2 in both, 'S002' first"):
        a.with_split("ntu60_xview")
    assert a.with_split("xsub").members("test").tolist() == [8, 9, 10, 11]


def changed(change: dict[str, Any], index: int = 5) -> dict[str, Any]:
    items = annotations()
    items[index] |= change
    return pickled([{k: v for k, v in item.items() if v is not ...} for item in items])


BAD = {
    "no annotations": ({"split": {}}, "list of annotations"),
    "a text": ("hello", "list of annotations"),
    "no annotation": ({"split": {}, "annotations": []}, "list of annotations"),
    "annotation is no dict": ({"split": {}, "annotations": [3]}, "annotation 0"),
    "split is no dict": ({"split": [1], "annotations": annotations()}, "split"),
    "split of a number": ({"split": {"a": 3}, "annotations": annotations()}, "split"),
    "no keypoint": (changed({"keypoint": ...}), "annotation 5 ('S005')"),
    "keypoint is a list": (changed({"keypoint": [1, 2]}), "annotation 5 ('S005')"),
    "keypoint of integers": (changed({"keypoint": np.zeros((1, 4, 25, 3), int)}), "int64"),
    "keypoint without persons axis": (changed({"keypoint": np.zeros((4, 25, 3), np.float16)}), "annotation 5"),
    "other V": (changed({"keypoint": np.zeros((1, 4, 17, 3), np.float16)}), "annotation 5"),
    "other C": (changed({"keypoint": np.zeros((1, 4, 25, 2), np.float16)}), "annotation 5"),
    "no label": (changed({"label": ...}), "label of annotation 5"),
    "label is a text": (changed({"label": "wave"}), "label of annotation 5"),
    "label is negative": (changed({"label": -1}), "label of annotation 5"),
    "total_frames": (changed({"total_frames": 99}), "total_frames of annotation 5"),
    "no frame": (changed({"keypoint": np.zeros((1, 0, 25, 3), np.float16), "total_frames": 0}), "total_frames of annotation 5"),
    "unknown V": ([{"label": 0, "keypoint": np.zeros((1, 4, 9, 3), np.float16)}], "layout"),
    "huge C": ([{"label": 0, "keypoint": np.zeros((1, 4, 25, 9), np.float16)}], "C = 2 or 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pickles_name_the_annotation(tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    content, words = BAD[case]
    path = write(tmp_path / "x.pkl", content)
    code = run(convert.main, [str(path), str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.startswith("error: Expected") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_scores_of_the_wrong_shape_are_named(tmp_path: Path) -> None:
    items = annotations(joints=17, flat=True)
    items[4]["keypoint_score"] = items[4]["keypoint_score"][:, :, :3]
    source = PysklSource(write(tmp_path / "x.pkl", pickled(items)))
    with pytest.raises(UserError, match="keypoint_score of annotation 4"):
        source.record(4)


# ---- convert ---------------------------------------------------------------------------------------------------

def test_command_converts_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "ntu.pkl", pickled(annotations()))
    names = tmp_path / "names.txt"
    names.write_text("sit\nstand\nwalk\n")
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--label-names", str(names)]) == 0
    assert "12 sequences, 3 classes" in capsys.readouterr().out
    assert Archive.open(tmp_path / "out").label_names == ("sit", "stand", "walk")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["names.txt", "ntu.pkl", "out"]
    assert run(convert.main, [str(path), str(tmp_path / "out")]) == 2
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--overwrite"]) == 0
    assert Archive.open(tmp_path / "out").label_names == ("0", "1", "2")


def test_command_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(os.system, "echo pwned")))
    out = subprocess.run([sys.executable, "-m", "sparse_stgcn.convert", str(tmp_path / "x.pkl"), str(tmp_path / "out")],
                         capture_output=True, text=True)
    assert out.returncode == 2 and "Traceback" not in out.stderr and "system'" in out.stderr and not out.stdout


@pytest.mark.parametrize("arguments, words", [
    (["absent.pkl", "out"], "absent.pkl"), (["x.pkl", "out", "--format", "hdf5"], "hdf5"),
    (["x.pkl", "out", "--layout", "robot"], "robot"), (["x.pkl", "out", "--layout", "coco"], "25"),
    (["x.pkl", "out", "--max-persons", "0"], "max_persons"), (["x.pkl", "out", "--label-names", "none.txt"], "none.txt"),
    (["x.pkl", "x.pkl"], "does not exist"), (["odd.bin", "out"], "odd.bin"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_command_names_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                     arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.pkl", pickled(annotations()))
    (tmp_path / "odd.bin").write_bytes(b"1")
    assert run(convert.main, arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


class Stops(PysklSource):
    """A source whose reading is interrupted."""

    stop = 10**9

    def record(self, index: int) -> Any:
        if index >= self.stop:
            raise KeyboardInterrupt
        self.read = [*getattr(self, "read", []), index]
        return super().record(index)


@settings(max_examples=20, deadline=None)
@given(stop=st.integers(0, 11), cut=st.integers(0, 3000), junk=st.booleans())
def test_half_written_conversion_resumes(tmp_path_factory: pytest.TempPathFactory, stop: int, cut: int, junk: bool) -> None:
    folder = tmp_path_factory.mktemp("resume")
    items = annotations(joints=17, flat=True)
    path = write(folder / "x.pkl", pickled(items))
    first = Stops(path)
    first.stop = stop
    with pytest.raises(KeyboardInterrupt):
        write_archive(first, folder / "out")
    assert not (folder / "out").exists()
    part = folder / ".out.partial"
    for name in ("keypoint.npy", "score.npy", "records.jsonl"):
        file = part / name
        os.truncate(file, max(0, file.stat().st_size - cut % (file.stat().st_size + 1) // 3))
    if junk:
        with open(part / "records.jsonl", "a") as log:
            log.write('{"sample": "S0')
    again = Stops(path)
    a = write_archive(again, folder / "out")
    if not cut:
        assert getattr(again, "read", []) == list(range(stop, 12)), "finished records are not read again"
    same = write_archive(PysklSource(path), folder / "fresh")
    for name in sorted(p.name for p in (folder / "fresh").iterdir()):
        assert (folder / "out" / name).read_bytes() == (folder / "fresh" / name).read_bytes(), name
    np.testing.assert_array_equal(a.keypoint, same.keypoint)
    assert not part.exists()


def test_changed_source_starts_over(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", pickled(annotations()))
    first = Stops(path)
    first.stop = 6
    with pytest.raises(KeyboardInterrupt):
        write_archive(first, tmp_path / "out")
    items = annotations(seed=9)
    write(path, pickled(items))
    os.utime(path, (1, 1))
    a = write_archive(PysklSource(path), tmp_path / "out")
    np.testing.assert_array_equal(a.read(0)[0][:1], items[0]["keypoint"])


def test_damaged_record_keeps_what_was_done(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", changed({"label": None}, index=9))
    with pytest.raises(UserError, match="annotation 9"):
        write_archive(PysklSource(path), tmp_path / "out")
    assert (tmp_path / ".out.partial" / "records.jsonl").read_text().count("\n") == 9
    assert not (tmp_path / "out").exists()


def test_a_third_coordinate_is_no_confidence(tmp_path: Path) -> None:
    items = annotations(joints=21)
    assert items[0]["keypoint"].shape[2:] == (21, 3) and items[0]["keypoint"].min() < 0
    source = PysklSource(write(tmp_path / "a.pkl", pickled(items)), "handmp")
    assert source.channels == 3 and not source.has_score
    for item in items:
        item["keypoint"][..., 2] = np.abs(item["keypoint"][..., 2]) % 1
    source = PysklSource(write(tmp_path / "b.pkl", pickled(items)), "handmp")
    assert source.channels == 2 and source.has_score


@pytest.mark.parametrize(("split", "message"), [
    ({"fold/1_train": ["f0"]}, "names of splits .* 'fold/1_train'"), ({"train": ["nobody"]}, "Got none of them, but 'nobody'")])
def test_splits_that_would_fail_at_the_end_or_be_empty(tmp_path: Path, split: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PysklSource(write(tmp_path / "a.pkl", {**pickled(annotations()), "split": split}))


def test_splits_may_list_file_names(tmp_path: Path) -> None:
    items = annotations(4)
    for i, item in enumerate(items):
        item["frame_dir"], item["filename"] = f"dir{i}", f"file{i}.avi"
    content = {"annotations": items, "split": {"train": ["file0.avi", "file1.avi"], "val": ["dir2", "dir3"]}}
    a = write_archive(PysklSource(write(tmp_path / "a.pkl", content)), tmp_path / "out")
    assert a.splits["train"].tolist() == [True, True, False, False] and a.splits["val"].tolist() == [False, False, True, True]
