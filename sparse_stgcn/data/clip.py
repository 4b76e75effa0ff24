"""Clip: one sequence as it is drawn, upright and without what was not measured; from an archive or any keypoint file."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, one_of
from ..skeleton import Skeleton
from .archive import Archive
from .arrays import read_array
from .body import body_axes
from .formats import Options, detect, open_source
from .source import LeftOut, layout_for

__all__ = ["UP", "Clip", "turn"]

FPS = 30.0
# Which way is up in the data -> the rows that take (x, y, z) to (right, up, towards the viewer). Each is a rotation.
UP = {"y": ((1, 0, 0), (0, 1, 0), (0, 0, 1)), "-y": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
      "z": ((1, 0, 0), (0, 0, 1), (0, -1, 0)), "-z": ((1, 0, 0), (0, 0, -1), (0, 1, 0))}


@dataclass(frozen=True)
class Clip:
    """One sequence of T frames, M persons and V joints.

    Attributes:
        keypoint: (T, M, V, 3) float32: right, up, towards the viewer, in the unit of the data; NaN where a joint was lost
            or the person is not there. 2D data lie in the plane 0.
        skeleton: V joints and their bones.
        fps: frames per second.
        name: what the sequence is called.
        label: its class, or an empty text.
        flat: the data are 2D.
    """

    keypoint: np.ndarray
    skeleton: Skeleton
    fps: float = FPS
    name: str = ""
    label: str = ""
    flat: bool = False

    @classmethod
    def of(cls, keypoint: np.ndarray, skeleton: Skeleton, *, score: np.ndarray | None = None, up: str | None = None,
           **named: Any) -> Clip:
        """A clip of keypoint (T, M, V, 2 or 3) as archives and readers have it.

        A joint is lost where it is not finite, has the score 0, or lies at the origin, except for the joint that the data
        are centred on.

        Args:
            score: (T, M, V) confidence of 2D joints.
            up: the axis that points up, a key of ``UP``. Default: "-y" in 2D; in 3D the axis that runs along the spine of
                most frames, "y" where the skeleton has no spine.
            **named: fps, name, label.

        Raises:
            UserError: another shape, another ``up``, or not one joint that was seen.
        """
        keypoint = np.array(keypoint, np.float32)
        if keypoint.ndim != 4 or keypoint.shape[2] != len(skeleton) or keypoint.shape[3] not in (2, 3):
            raise UserError(f"Expected keypoint (T, M, V, C) with V = {len(skeleton)} joints, as layout '{skeleton.name}' has, "
                            f"and C = 2 or 3. Got {keypoint.shape}; name the right layout.")
        seen = _seen(keypoint, body_axes(skeleton).centre)
        if score is not None:
            seen &= score != 0
        if not seen.any():
            raise UserError(f"Expected a sequence in which a joint was seen. Got none in {named.get('name') or 'it'}.")
        flat = keypoint.shape[3] == 2
        if flat:
            keypoint = np.concatenate([keypoint, np.zeros_like(keypoint[..., :1])], -1)
        keypoint[~seen] = np.nan
        if up is None:
            up = "-y" if flat else _along_spine(keypoint, skeleton)
        one_of("up", up, list(UP))
        return cls(keypoint @ np.array(UP[up], np.float32).T, skeleton, flat=flat, **named)

    @classmethod
    def from_archive(cls, archive: Archive, index: int, up: str | None = None) -> Clip:
        """Sequence ``index`` of an archive; raises like :meth:`of`."""
        keypoint, score = archive.read(index)
        known = archive.info.get("up")
        return cls.of(keypoint.swapaxes(0, 1), archive.skeleton, score=None if score is None else score.swapaxes(0, 1),
                      up=up or (known if known in UP else None), fps=float(archive.info.get("fps") or FPS),
                      name=str(archive.sample_ids[index]), label=archive.label_names[archive.label[index]])

    @classmethod
    def open(cls, path: str | Path, sample: str = "0", layout: str | None = None, order: str | None = None,
             up: str | None = None) -> Clip:
        """One sequence of a file: an archive, a data set in another format, or one array (``.npy``, or ``.json`` lists).

        Args:
            sample: number of the sequence; in an archive its id as well.
            layout: skeleton, by name or file. Default: the file's own, or by the number of joints.
            order: axes of an array, such as "MTVC". Default: TMVC or TVC.
            up: see :meth:`of`.

        Raises:
            UserError: nothing to read there, no such sample, no layout, or see :meth:`of`.
        """
        path = Path(path)
        if path.suffix in (".npy", ".json") and path.is_file():
            array = read_array(path, order)
            if array is not None:
                skeleton = layout_for(array.shape[2], array.shape[3], layout, str(path))
                return cls.of(array, skeleton, up=up, name=path.stem)
        if detect(path) == "archive":
            archive = Archive.open(path, layout)
            return cls.from_archive(archive, _find(archive.sample_ids, sample, path), up)
        source = open_source(path, options=Options(layout, order=order))
        record = source.record(_find(np.arange(len(source)).astype(str), sample, path))
        if isinstance(record, LeftOut):
            raise UserError(f"Expected a sequence to draw. Got {record.sample}, which is left out: {record.reason}.")
        names, known = source.label_names, source.info.get("up")
        return cls.of(record.keypoint, source.skeleton, score=record.score, up=up or (known if known in UP else None),
                      fps=float(source.info.get("fps") or FPS), name=record.sample,
                      label=names[record.label] if record.label < len(names) else str(record.label))

    def __len__(self) -> int:
        return len(self.keypoint)

    def every(self, stride: int) -> Clip:
        """Every ``stride``-th frame, at as many frames per second less."""
        return replace(self, keypoint=self.keypoint[::stride], fps=self.fps / stride)

    @property
    def facing(self) -> float:
        """The angle about the vertical, in radians, that turns the first person towards the viewer (see :func:`turn`).

        It takes the mean line from the right to the left shoulder to +x; 0 in 2D and where the skeleton has no shoulders.
        """
        shoulders = body_axes(self.skeleton).shoulders
        if self.flat or shoulders is None:
            return 0.0
        right, left = (self.keypoint[:, 0, joint] for joint in shoulders)
        across = (left - right)[np.isfinite(left - right).all(-1)]
        if not len(across):
            return 0.0
        x, _, z = across.mean(0).tolist()
        return float(np.arctan2(z, x))

    @property
    def box(self) -> tuple[np.ndarray, float]:
        """(centre (3,), radius): the middle of all joints, and the largest distance of a joint from it."""
        points = self.keypoint[np.isfinite(self.keypoint).all(-1)].astype(np.float64)
        centre = (points.min(0) + points.max(0)) / 2
        return centre, max(float(np.linalg.norm(points - centre, axis=1).max()), 1e-6)


def turn(points: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """Rotate points (..., 3) by ``yaw`` about the vertical, then tilt them by ``pitch`` (radians; > 0: seen from above).

    x' = x cos(yaw) + z sin(yaw), z' = z cos(yaw) - x sin(yaw); y'' = y cos(pitch) - z' sin(pitch),
    z'' = y sin(pitch) + z' cos(pitch).
    """
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    matrix = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return points @ matrix.T


def _seen(keypoint: np.ndarray, centre: int) -> np.ndarray:
    """(T, M, V) bool: the joint was measured."""
    finite = np.isfinite(keypoint).all(-1)
    seen = finite & (keypoint != 0).any(-1)
    there = seen.any(-1)
    for person in range(keypoint.shape[1]):
        if not seen[:, person, centre].any():  # always at the origin: the data are centred on it
            seen[:, person, centre] = there[:, person] & finite[:, person, centre]
    return seen


def _along_spine(keypoint: np.ndarray, skeleton: Skeleton) -> str:
    spine = body_axes(skeleton).spine
    if spine is None:
        return "y"
    lower, upper = (keypoint[:, :, joint] for joint in spine)
    along = (upper - lower)[np.isfinite(upper - lower).all(-1)]
    if not len(along):
        return "y"
    _, y, z = np.median(along, axis=0).tolist()
    axis, value = ("z", z) if abs(z) > abs(y) else ("y", y)
    return f"-{axis}" if value < 0 else axis


def _find(ids: np.ndarray, sample: str, path: Path) -> int:
    """The position of the sequence that is called ``sample`` or has this number."""
    found = np.flatnonzero(ids == sample)
    if len(found):
        return int(found[0])
    if sample.isdecimal() and int(sample) < len(ids):
        return int(sample)
    raise UserError(f"Expected --sample to be the id of a sequence of {path} or a number below {len(ids)}. Got {sample!r}.")
