"""NTU `.skeleton` text files."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import convert
from sparse_stgcn.data.ntu_raw import TRAIN_SUBJECTS, LeftOut, NtuRawSource, Track, arrange, read_skeleton
from sparse_stgcn.data.source import Record
from sparse_stgcn.data.writer import write_archive
from sparse_stgcn.errors import UserError, run

Frames = list[dict[str, np.ndarray]]


def standing(frames: int, seed: int = 0, speed: float = 0.1) -> np.ndarray:
    """(T, 25, 3) of a body that is higher than wide and moves."""
    rng = np.random.default_rng(seed)
    shape = rng.uniform(-1, 1, (25, 3)) * (0.2, 0.9, 0.2)
    return (shape + speed * np.arange(frames)[:, None, None] * (1, 0, 0) + (0, 0, 3)).astype(np.float32)


def text(frames: Frames) -> str:
    lines = [str(len(frames))]
    for bodies in frames:
        lines.append(str(len(bodies)))
        for body, joints in bodies.items():
            lines += [f"{body} 0 1 1 1 1 0 0.1 -0.2 2", "25"]
            lines += [" ".join(f"{value:.7g}" for value in joint) + " 288.0 200.9 1041.6 513.5 -0.2 0.1 0.9 0 2"
                      for joint in joints]
    return "\n".join(lines) + "\n"


def solo(body: str, joints: np.ndarray) -> Frames:
    return [{body: frame} for frame in joints]


def save(folder: Path, frames: Frames, name: str = "S001C001P001R001A001") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.skeleton"
    file.write_text(text(frames))
    return file


def test_one_body_is_read_as_written(tmp_path: Path) -> None:
    x = standing(5)
    frames, tracks = read_skeleton(save(tmp_path, solo("72057594037931101", x)))
    assert frames == 5 and len(tracks) == 1
    np.testing.assert_allclose(tracks[0].joints, x, rtol=1e-6)
    record = NtuRawSource(tmp_path).record(0)
    assert isinstance(record, Record) and record.keypoint.shape == (5, 1, 25, 3)
    assert (record.label, record.sample) == (0, "S001C001P001R001A001")
    assert record.fields == {"setup": 1, "camera": 1, "subject": 1, "repeat": 1}


def test_two_bodies_are_ordered_by_motion(tmp_path: Path) -> None:
    still, moving = standing(20, 1, 0.001), standing(20, 2, 0.2)
    _, tracks = read_skeleton(save(tmp_path, [{"1": a, "2": b} for a, b in zip(still, moving, strict=True)]))
    out = arrange(tracks, 20)
    np.testing.assert_allclose(out[:, 0], moving, rtol=1e-6)
    np.testing.assert_allclose(out[:, 1], still, rtol=1e-6)


def test_short_and_wide_tracks_are_false_detections() -> None:
    body = Track(np.arange(30), standing(30))
    flicker = Track(np.arange(4, 12), standing(8, 3, 5.0))
    table = Track(np.arange(30), standing(30, 4, 1.0) * np.float32((9, 0.1, 1)))
    out = arrange([flicker, table, body], 30)
    assert out.shape == (30, 1, 25, 3)
    np.testing.assert_array_equal(out[:, 0], body.joints)


def test_broken_off_tracks_continue_the_same_person() -> None:
    a, b, c = standing(40, 1, 0.3), standing(15, 2, 0.1), standing(20, 3, 0.05)
    tracks = [Track(np.arange(40), a), Track(np.arange(2, 17), b), Track(np.arange(18, 38), c)]
    out = arrange(tracks, 40)
    assert out.shape == (40, 2, 25, 3)
    np.testing.assert_array_equal(out[2:17, 1], b)
    np.testing.assert_array_equal(out[18:38, 1], c)
    assert not out[17, 1].any() and not out[:2, 1].any()


def test_third_simultaneous_body_is_left_out() -> None:
    tracks = [Track(np.arange(20), standing(20, i, 0.1 * i)) for i in (1, 2, 3)]
    out = arrange(tracks, 20)
    np.testing.assert_array_equal(out[:, 0], tracks[2].joints)
    np.testing.assert_array_equal(out[:, 1], tracks[1].joints)


def test_body_that_is_seen_first_leads() -> None:
    late, early = Track(np.arange(5, 40), standing(35, 1, 0.3)), Track(np.arange(40), standing(40, 2, 0.01))
    out = arrange([late, early], 40)
    np.testing.assert_array_equal(out[:, 0], early.joints)


def test_nan_joints_are_lost_joints(tmp_path: Path) -> None:
    x = standing(3)
    x[1, 4] = np.nan
    _, tracks = read_skeleton(save(tmp_path, solo("1", x)))
    assert not tracks[0].joints[1, 4].any() and np.isfinite(tracks[0].joints).all()


def dataset(folder: Path, actions: tuple[int, ...] = (1, 2)) -> Path:
    for setup, camera, subject, action in [(1, 1, 1, 1), (2, 2, 2, 2), (2, 3, 3, 1), (1, 1, 3, 2)]:
        action = actions[action - 1]
        save(folder, solo("1", standing(4, subject)), f"S{setup:03d}C{camera:03d}P{subject:03d}R001A{action:03d}")
    return folder


def test_splits_of_ntu_60(tmp_path: Path) -> None:
    a = write_archive(NtuRawSource(dataset(tmp_path / "ntu")), tmp_path / "out")
    assert set(a.splits) == {"xsub_train", "xsub_val", "xview_train", "xview_val"} and a.num_classes == 60
    subject = a.with_split("ntu60_xsub")
    assert a.fields["subject"][subject.train].tolist() == [1, 2]
    view = a.with_split("ntu60_xview")
    assert sorted(a.fields["camera"][view.train].tolist()) == [2, 3] and not view.train[a.fields["camera"] == 1].any()


def test_splits_of_ntu_120(tmp_path: Path) -> None:
    a = write_archive(NtuRawSource(dataset(tmp_path / "ntu", (1, 61))), tmp_path / "out")
    assert set(a.splits) == {"xsub_train", "xsub_val", "xset_train", "xset_val"} and a.num_classes == 120
    assert (a.fields["setup"][a.with_split("ntu120_xset").train] % 2 == 0).all()
    assert a.with_split("ntu120_xsub").info["split"] == "xsub"
    with pytest.raises(UserError, match="ntu60_xsub"):
        a.with_split("ntu60_xsub")


def test_training_subjects_are_those_of_the_papers() -> None:
    assert len(TRAIN_SUBJECTS) == len(set(TRAIN_SUBJECTS)) == 53
    assert sum(subject <= 40 for subject in TRAIN_SUBJECTS) == 20 and max(TRAIN_SUBJECTS) <= 106


@pytest.mark.parametrize("frames, reason", [
    ([], "no body in any frame"), ([{}, {}], "no body in any frame"),
    ([{}, {"1": standing(1)[0]}, {"1": standing(1)[0]}], "no body in 1 of 3 frames"),
], ids=["no frame", "no body", "a gap"])
def test_missing_and_incomplete_samples_are_left_out(tmp_path: Path, frames: Frames, reason: str) -> None:
    folder = dataset(tmp_path / "ntu")
    save(folder, frames, "S009C001P001R001A001")
    left = NtuRawSource(folder).record(4)
    assert left == LeftOut("S009C001P001R001A001", reason)
    a = write_archive(NtuRawSource(folder), tmp_path / "out")
    assert len(a) == 4 and a.info["left_out"] == {"S009C001P001R001A001": reason}


def test_a_list_replaces_the_rule(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "ntu")
    save(folder, [{}, {"1": standing(1)[0]}], "S009C001P001R001A001")
    (tmp_path / "list.txt").write_text("samples:\nS001C001P003R001A002\nS001C001P001R001A009\n")
    a = write_archive(NtuRawSource(folder, tmp_path / "list.txt"), tmp_path / "out")
    assert a.info["left_out"] == {"S001C001P003R001A002": "listed"}
    assert "S009C001P001R001A001" in a.sample_ids


def test_command_converts_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = dataset(tmp_path / "ntu")
    save(folder, [], "S009C001P001R001A001")
    assert run(convert.main, [str(folder), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "4 sequences, 60 classes" in out and "1 of 5 sequences left out" in out


def lines_of(count: int = 2) -> list[str]:
    return text(solo("1", standing(count))).splitlines()


def edit(line: int, new: str | None) -> str:
    lines = lines_of()
    lines[line:line + 1] = [] if new is None else [new]
    return "\n".join(lines)


BAD = {
    "empty": ("", "line 1"), "text": ("hello", "line 1"), "negative": ("-3", "line 1"),
    "more frames than lines": ("999999999", "line 1"), "cut in a joint": ("\n".join(lines_of()[:20]), "line 21"),
    "cut at a frame": ("\n".join(lines_of()[:29]), "line 30"), "wrong joint count": (edit(3, "24"), "line 4"),
    "no joint count": (edit(3, None), "line 4"), "letters in a joint": (edit(9, "a b c"), "line 10"),
    "two numbers in a joint": (edit(9, "1 2"), "line 10"), "body count": (edit(1, "x"), "line 2"),
    "empty body": (edit(2, ""), "line 3"), "more text": ("\n".join([*lines_of(), "7"]), "line 58"),
    "html": ("<html>", "line 1"), "binary": ("\x00\x01", "line 1"), "huge count": ("9" * 5000, "line 1"),
    "other digits": ("²", "text file"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, case: str) -> None:
    content, words = BAD[case]
    folder = dataset(tmp_path / "ntu")
    file = folder / "S001C001P001R001A001.skeleton"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        write_archive(NtuRawSource(folder), tmp_path / "out")
    assert words in str(error.value) and file.name in str(error.value) and len(str(error.value)) < 600


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged_ntu"
    file = save(folder, solo("1", standing(2)))
    raw = bytearray(file.read_bytes())
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]
    for _ in range(data.draw(st.integers(0, 6))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        record = NtuRawSource(folder).record(0)
        assert isinstance(record, LeftOut) or np.isfinite(record.keypoint).all()
    except UserError as error:
        assert file.name in str(error) and "\n" not in str(error)


def test_odd_names_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Got none"):
        NtuRawSource(tmp_path)
    save(tmp_path, [], "walk")
    with pytest.raises(UserError, match=r"walk\.skeleton"):
        NtuRawSource(tmp_path)
