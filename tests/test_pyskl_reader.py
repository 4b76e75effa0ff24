"""PYSKL pickles: the reader, and `convert`."""
from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import convert
from sparse_stgcn.data import Archive, SkeletonDataset
from sparse_stgcn.data import transforms as tf
from sparse_stgcn.data.pyskl import PysklSource
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
