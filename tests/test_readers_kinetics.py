"""Kinetics-skeleton JSON files, and K400 pickles with pose files."""
from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import convert
from sparse_stgcn.data import SkeletonDataset
from sparse_stgcn.data.kinetics import K400Source, KineticsSource, LeftOut, stack_detections
from sparse_stgcn.data.writer import write_archive
from sparse_stgcn.errors import UserError, run

# ---- Kinetics-skeleton -------------------------------------------------------------------------------------------

def person(seed: int, scale: float = 1.0) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {"pose": rng.uniform(0.1, 0.9, 36).round(3).tolist(), "score": (scale * rng.uniform(0.5, 1, 18)).round(3).tolist()}


def clip(frames: int = 4, persons: int = 1, label: int = 0) -> dict[str, Any]:
    return {"data": [{"frame_index": t + 1, "skeleton": [person(10 * t + m, 1 / (m + 1)) for m in range(persons)]}
                     for t in range(frames)], "label": f"class {label}", "label_index": label}


def folder(path: Path) -> Path:
    labels: dict[str, dict] = {"train": {}, "val": {}}
    for i in range(6):
        part = "train" if i < 4 else "val"
        (path / f"kinetics_{part}").mkdir(parents=True, exist_ok=True)
        (path / f"kinetics_{part}" / f"clip{i}.json").write_text(json.dumps(clip(3 + i, 1 + i % 3, i % 2)))
        labels[part][f"clip{i}"] = {"has_skeleton": True, "label": f"class {i % 2}", "label_index": i % 2}
    for part, content in labels.items():
        (path / f"kinetics_{part}_label.json").write_text(json.dumps(content))
    return path


def test_folder_becomes_an_archive(tmp_path: Path) -> None:
    a = write_archive(KineticsSource(folder(tmp_path / "k")), tmp_path / "out")
    assert len(a) == 6 and a.label_names == ("class 0", "class 1") and a.skeleton.name == "openpose"
    assert a.lengths.tolist() == [3, 4, 5, 6, 7, 8] and a.num_persons == 2 and a.is_2d
    assert a.with_split("k400").train.tolist() == [True] * 4 + [False] * 2
    x, score = a.read(1)
    want = person(10 * 2 + 1, 0.5)
    np.testing.assert_allclose(x[1, 2].ravel(), want["pose"], rtol=1e-6)
    np.testing.assert_allclose(score[1, 2], want["score"], rtol=1e-6)  # type: ignore[index]
    assert a.fields["img_shape"][1].tolist() == [1, 1]
    data = SkeletonDataset(a.with_split(), "train", clip_len=4)
    keypoint, got, _ = data[0]
    assert keypoint.shape == (2, 4, 18, 3) and got == 0 and keypoint[..., :2].abs().max() <= 1
    # x in parts of the image: 0.5 is its centre.
    np.testing.assert_allclose(data.sequence(0)[0, 0, :, 0], 2 * np.array(person(0)["pose"][::2]) - 1, atol=1e-6)


def test_best_scored_persons_come_first_and_joints_without_score_are_lost(tmp_path: Path) -> None:
    content = clip(1, 3)
    content["data"][0]["skeleton"].reverse()
    content["data"][0]["skeleton"][2]["score"][5] = 0.0
    (tmp_path / "a.json").write_text(json.dumps(content))
    record = KineticsSource(tmp_path).record(0)
    np.testing.assert_allclose(record.score[0, 0, :5], person(0)["score"][:5])
    np.testing.assert_allclose(record.score[0, 1], person(1, 0.5)["score"])
    assert not record.keypoint[0, 0, 5].any() and record.keypoint[0, 0, 6].any()


def test_frames_without_anybody_stay_and_files_without_anybody_go(tmp_path: Path) -> None:
    content = clip(5)
    content["data"][2]["skeleton"] = []
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "b.json").write_text(json.dumps(clip(3, 0)))
    (tmp_path / "c.json").write_text(json.dumps({"data": [], "label": "unknown", "label_index": -1}))
    a = write_archive(KineticsSource(tmp_path), tmp_path / "out")
    assert len(a) == 1 and not a[0][2].any() and a[0][3].any()
    assert a.info["left_out"] == {"b": "nobody in it", "c": "nobody in it"}


def test_the_folder_of_a_file_is_its_split(tmp_path: Path) -> None:
    folder(tmp_path / "k")
    (tmp_path / "k" / "kinetics_val" / "clip1.json").write_text(json.dumps(clip(9)))
    inner = tmp_path / "k" / "kinetics_train" / "testifying"
    inner.mkdir()
    (inner / "clip7.json").write_text(json.dumps(clip(2)))
    a = write_archive(KineticsSource(tmp_path / "k"), tmp_path / "out")
    assert a.sample_ids.tolist() == ["clip0", "clip1", "clip2", "clip3", "clip7", "clip1", "clip4", "clip5"]
    assert {name: a.members(name).tolist() for name in a.splits} == {"train": [0, 1, 2, 3, 4], "val": [5, 6, 7]}
    assert a.with_split("k400").members("test").tolist() == [5, 6, 7] and a.lengths[[1, 5]].tolist() == [4, 9]
    assert a.fields["folder"][4] == "kinetics_train/testifying"


def broken(**change: Any) -> dict[str, Any]:
    content = clip(2)
    content["data"][1]["skeleton"][0] |= change
    return content


BAD = {
    "a list": ([], "data"), "no data": ({"label_index": 0}, "data"), "data is a text": ({"data": "x"}, "data"),
    "frame is a list": ({"data": [[1]], "label_index": 0}, "frame 0"),
    "frame index is a text": ({"data": [{"frame_index": "1", "skeleton": []}], "label_index": 0}, "frame 0"),
    "frame index is huge": ({"data": [{"frame_index": 1 << 60, "skeleton": []}], "label_index": 0}, "frame 0"),
    "frame index is negative": ({"data": [{"frame_index": -1, "skeleton": []}], "label_index": 0}, "frame 0"),
    "skeleton is a number": ({"data": [{"frame_index": 1, "skeleton": 3}], "label_index": 0}, "frame 0"),
    "no label": (clip() | {"label_index": None}, "label_index"),
    "label is a text": (clip() | {"label_index": "1"}, "label_index"),
    "label is true": (clip() | {"label_index": True}, "label_index"),
    "pose is short": (broken(pose=[0.1] * 35), "frame 1"), "pose of texts": (broken(pose=["x"] * 36), "frame 1"),
    "score is long": (broken(score=[1.0] * 19), "frame 1"), "score is a dict": (broken(score={}), "frame 1"),
    "person is a number": ({"data": [{"frame_index": 0, "skeleton": [5]}], "label_index": 0}, "frame 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    content, words = BAD[case]
    folder(tmp_path / "k")
    (tmp_path / "k" / "kinetics_train" / "clip2.json").write_text(json.dumps(content))
    assert run(convert.main, [str(tmp_path / "k"), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert words in err and "clip2.json" in err and err.count("\n") == 1


def test_deep_and_cut_json_are_named(tmp_path: Path) -> None:
    for text in ("[" * 200_000, '{"data": [', "\x00", "{'a': 1}"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json"):
            KineticsSource(tmp_path).record(0)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged_kinetics"
    path.mkdir(exist_ok=True)
    raw = bytearray(json.dumps(clip(2)).encode())
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]
    for _ in range(data.draw(st.integers(0, 6))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (path / "a.json").write_bytes(raw)
    try:
        record = KineticsSource(path).record(0)
        assert isinstance(record, LeftOut) or record.keypoint.shape[1:] == (2, 18, 2)
    except UserError as error:
        assert "a.json" in str(error) and "\n" not in str(error)


# ---- K400 ------------------------------------------------------------------------------------------------------

def detections(seed: int, persons: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(D, 17, 3) and the frames (D,) for so many persons in each frame."""
    frame = np.repeat(np.arange(len(persons)), persons).astype(np.int16)
    return np.random.default_rng(seed).uniform(0, 1, (len(frame), 17, 3)).astype(np.float16), frame


def k400(path: Path, files: int = 2) -> Path:
    path.mkdir()
    items = []
    poses: list[dict] = [{} for _ in range(files)]
    for i in range(5):
        x, frame = detections(i, [1, 2, 0, 3])
        poses[i % files][f"key{i}"] = {"keypoint": x}
        items.append({"frame_dir": f"v{i}", "label": i % 2, "img_shape": (240, 320), "total_frames": 4, "frame_inds": frame,
                      "box_score": np.full(len(frame), 0.9, np.float16),
                      "raw_file": f"/far/away/pose{i % files}.pkl", "key": f"key{i}"})
    for i, content in enumerate(poses):
        (path / f"pose{i}.pkl").write_bytes(pickle.dumps(content))
    content = {"split": {"train": [f"v{i}" for i in range(3)], "val": ["v3", "v4"]}, "annotations": items}
    (path / "k400.pkl").write_bytes(pickle.dumps(content))
    return path / "k400.pkl"


def test_pose_files_become_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = k400(tmp_path / "k")
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--format", "k400"]) == 0
    assert "5 sequences, 2 classes, M=2, V=17, C=2, float16" in capsys.readouterr().out
    a = write_archive(K400Source(path, path.parent), tmp_path / "again")
    assert sorted(a.sample_ids) == [f"v{i}" for i in range(5)] and a.with_split("k400").train.sum() == 3
    i = a.sample_ids.tolist().index("v3")
    x, frame = detections(3, [1, 2, 0, 3])
    assert a.lengths[i] == 3, "a frame without a detection vanishes"
    np.testing.assert_array_equal(a.read(i)[0], stack_detections(x, frame, 2)[..., :2].swapaxes(0, 1))
    assert a.label[i] == 1 and a.fields["img_shape"][i].tolist() == [240, 320]
    assert SkeletonDataset(a.with_split(), "train", clip_len=4)[0][0].shape == (2, 4, 17, 3)


def test_an_id_in_both_lists_is_named(tmp_path: Path) -> None:
    path = k400(tmp_path / "k")
    content = pickle.loads(path.read_bytes())
    content["split"]["train"].append("v4")
    path.write_bytes(pickle.dumps(content))
    a = write_archive(K400Source(path), tmp_path / "out")
    with pytest.raises(UserError, match="part of split 'train/val' of archive 'k400'. Got 1 in both, 'v4' first"):
        a.with_split("k400")


def test_each_pose_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_stgcn.data import kinetics

    opened: list[str] = []
    load = kinetics.load_pickle
    monkeypatch.setattr(kinetics, "load_pickle", lambda path: opened.append(Path(path).name) or load(path))
    path = k400(tmp_path / "k")
    write_archive(K400Source(path), tmp_path / "out")
    assert sorted(opened) == ["k400.pkl", "pose0.pkl", "pose1.pkl"]


def test_detections_are_stacked_frame_by_frame() -> None:
    x, frame = detections(0, [2, 0, 1, 3])
    out = stack_detections(x, frame, 5)
    assert out.shape == (3, 3, 17, 3)
    np.testing.assert_array_equal(out[0, :2], x[:2])
    np.testing.assert_array_equal(out[1, 0], x[2])
    np.testing.assert_array_equal(out[2], x[3:])
    assert not out[0, 2].any() and not out[1, 1:].any()
    best = stack_detections(x, frame, 2)
    order = np.argsort(-x[3:, :, 2].sum(-1, dtype=np.float64))
    np.testing.assert_array_equal(best[2], x[3:][order[:2]])


@settings(max_examples=60, deadline=None)
@given(persons=st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any), limit=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_stacking_keeps_the_best_of_every_frame(persons: list[int], limit: int, seed: int) -> None:
    x, frame = detections(seed, persons)
    out = stack_detections(x, frame, limit)
    assert len(out) == sum(n > 0 for n in persons) and out.shape[1] <= limit
    for row, number in zip(out, np.unique(frame), strict=True):
        kept = row[(row != 0).any(axis=(1, 2))]
        here = x[frame == number]
        assert len(kept) == min(limit, len(here))
        assert all((joints == here).all(axis=(1, 2)).any() for joints in kept)
        if len(here) > limit:
            best = np.sort(here[..., 2].sum(-1, dtype=np.float64))[::-1][:limit]
            np.testing.assert_allclose(kept[..., 2].sum(-1, dtype=np.float64), best)


def test_weak_boxes_do_not_count(tmp_path: Path) -> None:
    x, frame = detections(0, [2, 2])
    item = {"frame_dir": "a", "label": 0, "total_frames": 2, "frame_inds": frame, "keypoint": x,
            "box_score": np.array([0.9, 0.2, 0.1, 0.3], np.float32)}
    weak = item | {"frame_dir": "b", "box_score": np.zeros(4, np.float32)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([item, weak]))
    a = write_archive(K400Source(tmp_path / "x.pkl"), tmp_path / "out")
    assert a.lengths.tolist() == [1] and a.info["left_out"] == {"b": "no detection above the threshold"}
    np.testing.assert_array_equal(a.read(0)[0][0, 0], x[0, :, :2])


def changed(path: Path, **change: Any) -> None:
    content = pickle.loads(path.read_bytes())
    content["annotations"][2] |= change
    path.write_bytes(pickle.dumps(content))


K400_BAD = {
    "no pose file": ({"raw_file": "none.pkl"}, "none.pkl"), "no key": ({"key": "nothing"}, "keypoint of annotation 2"),
    "frame_inds too short": ({"frame_inds": np.zeros(2, int)}, "frame_inds of annotation 2"),
    "frame_inds too large": ({"frame_inds": np.full(6, 9)}, "frame_inds of annotation 2"),
    "frame_inds negative": ({"frame_inds": np.full(6, -1)}, "frame_inds of annotation 2"),
    "frame_inds float": ({"frame_inds": np.zeros(6)}, "frame_inds of annotation 2"),
    "frame_inds list": ({"frame_inds": [0] * 6}, "frame_inds of annotation 2"),
    "box_score too short": ({"box_score": np.zeros(2)}, "box_score of annotation 2"),
    "label": ({"label": None}, "label of annotation 2"),
    "total_frames": ({"total_frames": "4"}, "total_frames of annotation 2"),
    "total_frames huge": ({"total_frames": 1 << 50}, "total_frames of annotation 2"),
    "keypoint": ({"keypoint": np.zeros((6, 17, 2), np.float16)}, "keypoint of annotation 2"),
    "other joints": ({"keypoint": np.zeros((6, 25, 3), np.float16)}, "V = 17"),
    "img_shape": ({"img_shape": (0, 3)}, "img_shape of annotation 2"),
}


@pytest.mark.parametrize("case", K400_BAD)
def test_bad_annotations_are_named(tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    change, words = K400_BAD[case]
    path = k400(tmp_path / "k")
    changed(path, **change)
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--format", "k400"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("error: Expected")


def test_plain_reader_points_to_this_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = k400(tmp_path / "k")
    assert run(convert.main, [str(path), str(tmp_path / "out"), "--format", "pyskl"]) == 2
    assert "format k400" in capsys.readouterr().err
