"""NTU RGB+D `.skeleton` text files.

Format: Matlab/read_skeleton_file.m of shahroudy/NTURGB-D. The choice of the persons follows PYSKL's
tools/data/ntu_preproc.py.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from .source import LeftOut, Record, Source

_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
# Subjects of the training part of cross-subject: NTU RGB+D 60 (Shahroudy et al. 2016) up to 38, 120 (Liu et al. 2019).
TRAIN_SUBJECTS = (
    1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38, 45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57,
    58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89, 91, 92, 93, 94, 95, 97, 98, 100, 103,
)
# A second track this short is a false detection; a body that is wider than 0.8 of its height in more than 0.69754 of its
# frames is furniture.
_SHORT, _WIDE, _MOSTLY_WIDE = 11, 0.8, 0.69754


class NtuRawSource(Source):
    """A folder of `.skeleton` files named like S001C001P001R001A001.

    Left out are the samples that `ignore` names or, without it, those whose own content shows a missing or incomplete
    skeleton: no frame, or some frame, without any body. (The authors of the data publish lists of 302 and 535 such
    samples without saying how they were chosen; with the list as `ignore` the choice is theirs.) Each sample left out is
    in the archive's info "left_out". Of more than two bodies the two that move most are kept; coordinates that are not
    finite become lost joints (0).

    Raises:
        UserError: no such file in the folder, or a file is damaged; the message names the file and the line.
    """

    num_persons = 2
    channels = 3
    dtype = np.dtype(np.float32)

    def __init__(self, path: str | Path, ignore: str | Path | None = None, label_names: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self.files = sorted(self.path.rglob("*.skeleton"))
        if not self.files:
            raise UserError(f"Expected .skeleton files in '{path}'. Got none.")
        for file in self.files:
            if not _NAME.fullmatch(file.stem):
                raise UserError(f"Expected .skeleton files to be named like S001C001P001R001A001. Got '{file}'.")
        self.listed = None if ignore is None else _names(ignore)
        self.skeleton = Skeleton.load("nturgb+d")
        classes = max(int(file.stem[-3:]) for file in self.files)
        self.large = classes > 60
        count = 120 if self.large else 60
        self.label_names = label_names or tuple(f"A{i:03d}" for i in range(1, count + 1))
        self.info = {"source": self.path.name, "fps": 30.0, "unit": "m", "up": "y",
                     "ignore_rule": "content" if ignore is None else Path(ignore).name}

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        # Adding files changes what record i is; the time of the folder says nothing about its files.
        names = (len(self.files), self.files[0].stem, self.files[-1].stem, sum(f.stat().st_size for f in self.files))
        return repr((type(self).__name__, names, sorted(self.listed or ()), self.info["ignore_rule"]))

    def record(self, index: int) -> Record | LeftOut:
        file = self.files[index]
        sample = file.stem
        if self.listed is not None and sample in self.listed:
            return LeftOut(sample, "listed")
        frames, tracks = read_skeleton(file)
        covered = np.zeros(frames, bool)
        for track in tracks:
            covered[track.frames] = True
        if not covered.any():
            return LeftOut(sample, "no body in any frame")
        if self.listed is None and not covered.all():
            return LeftOut(sample, f"no body in {int((~covered).sum())} of {frames} frames")
        setup, camera, subject, repeat, action = (int(number) for number in _NAME.fullmatch(sample).groups())  # type: ignore[union-attr]
        fields = {"setup": setup, "camera": camera, "subject": subject, "repeat": repeat}
        return Record(sample, action - 1, arrange(tracks, frames), fields=fields)

    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        train = {"xsub": np.isin(fields["subject"], TRAIN_SUBJECTS)}
        if self.large:
            train["xset"] = fields["setup"] % 2 == 0
        else:
            train["xview"] = fields["camera"] != 1
        return {f"{name}_{part}": mask if part == "train" else ~mask
                for name, mask in train.items() for part in ("train", "val")}


@dataclass
class Track:
    """One tracked body: the frames (n,) it is seen in, and its joints (n, 25, 3)."""

    frames: np.ndarray
    joints: np.ndarray

    @property
    def span(self) -> tuple[int, int]:
        return int(self.frames[0]), int(self.frames[-1]) + 1

    def wide(self) -> np.ndarray:
        """(n,) True where the body is wider than 0.8 of its height."""
        size = np.ptp(self.joints[..., :2], axis=1)
        return size[:, 0] > _WIDE * size[:, 1]

    def motion(self, chosen: np.ndarray | None = None) -> float:
        """Sum of the variances of the three coordinates over all joints and frames."""
        joints = self.joints if chosen is None else self.joints[chosen]
        return float(joints.reshape(-1, 3).var(axis=0).sum())


def read_skeleton(file: Path) -> tuple[int, list[Track]]:
    """(number of frames, the bodies in order of appearance) of a `.skeleton` file."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Expected a text file. Got '{file}', which cannot be read as one.") from error
    at = 0

    def fail(expected: str) -> UserError:
        got = repr(lines[at][:60]) if at < len(lines) else "the end of the file"
        return UserError(f"Expected {expected} in line {at + 1} of '{file}'. Got {got}; download the file again.")

    def number(what: str) -> int:
        nonlocal at
        digits = lines[at].strip() if at < len(lines) else ""
        if not digits.isdigit() or len(digits) > 9:
            raise fail(what)
        at += 1
        return int(digits)

    seen: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    frames = number("the number of frames")
    if frames > len(lines):
        at = 0
        raise fail("a number of frames that the file can hold")
    for frame in range(frames):
        for _ in range(number("the number of bodies")):
            if at >= len(lines) or not lines[at].split():
                raise fail("a body")
            body = lines[at].split()[0]
            at += 1
            if number("the number of joints, 25") != 25:
                at -= 1
                raise fail("the number of joints, 25")
            joints = np.empty((25, 3), np.float32)
            for joint in range(25):
                try:
                    joints[joint] = [float(text) for text in lines[at].split(None, 3)[:3]]
                except (ValueError, IndexError):
                    raise fail("a joint with x, y and z") from None
                at += 1
            joints[~np.isfinite(joints).all(axis=1)] = 0
            seen.setdefault(body, ([], []))
            seen[body][0].append(frame)
            seen[body][1].append(joints)
    if any(line.strip() for line in lines[at:]):
        raise fail("the end of the file")
    return frames, [Track(np.array(t), np.stack(x)) for t, x in seen.values()]


def arrange(tracks: list[Track], frames: int) -> np.ndarray:
    """(T, M, 25, 3) with M of 1 or 2: the bodies that move most first, false detections removed; tracks that do not
    overlap in time continue the same person."""
    if len(tracks) > 1:
        tracks = [track for track in tracks if len(track.frames) > _SHORT] or [max(tracks, key=Track.motion)]
    if len(tracks) > 1:
        tracks = _without_furniture(tracks)
    persons = np.zeros((2, frames, 25, 3), np.float32)
    spans: list[tuple[int, int]] = []
    for track in tracks:
        first, last = track.span
        for m in range(2):
            if m == len(spans):
                spans.append((first, last))
            elif max(spans[m][0], first) >= min(spans[m][1], last):
                spans[m] = min(spans[m][0], first), max(spans[m][1], last)
            else:
                continue
            persons[m, track.frames] = track.joints
            break
    persons = persons[:len(spans)]
    there = np.flatnonzero((persons != 0).any(axis=(0, 2, 3)))
    if len(there):
        persons = persons[:, there[0]:there[-1] + 1]
    if len(persons) == 2 and not persons[0, 0, 1].any() and persons[1, 0, 1].any():
        persons = persons[::-1]
    return persons.swapaxes(0, 1)


def _without_furniture(tracks: list[Track]) -> list[Track]:
    """The tracks that look like a standing body, those that move most first; all if none does."""
    motion = []
    for track in tracks:
        wide = track.wide()
        if not wide.any():
            motion.append(track.motion())
        elif wide.mean() >= _MOSTLY_WIDE:
            motion.append(-1.0)
        else:
            motion.append(min(track.motion(), track.motion(~wide)))
    order = sorted(range(len(tracks)), key=lambda i: -motion[i])
    return [tracks[i] for i in order if motion[i] >= 0] or [tracks[i] for i in order]


def _names(path: str | Path) -> set[str]:
    try:
        text = Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Expected ignore to be a text file with sample names. Got '{path}'.") from error
    return {match.group(0) for match in _NAME.finditer(text)}
