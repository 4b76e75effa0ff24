"""What a reader of a foreign format offers: records one by one, and what is known about all of them."""
from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton

# Layouts that the number of joints and of coordinates gives away.
_BY_SIZE = {(25, 3): "nturgb+d", (17, 2): "coco", (18, 2): "openpose", (21, 2): "handmp"}


@dataclass
class Record:
    """One labelled sequence: keypoint (T, M, V, C), score (T, M, V) or None, and scalars by field name."""

    sample: str
    label: int
    keypoint: np.ndarray
    score: np.ndarray | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class LeftOut:
    """A record that has nothing to learn from, and why."""

    sample: str
    reason: str


class Source(ABC):
    """A data set in another format. `record(i)` may be called in any order.

    Attributes:
        path: the file or folder.
        skeleton, num_persons, channels, dtype, has_score: the form of every record; fewer persons are padded.
        label_names: names of the classes, or empty.
        info: scalars and texts for the archive.
    """

    path: Path
    skeleton: Skeleton
    num_persons: int
    channels: int
    dtype: np.dtype
    has_score: bool = False
    label_names: Sequence[str] = ()
    info: Mapping[str, Any] = {}

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are, those left out included."""

    @abstractmethod
    def record(self, index: int) -> Record | LeftOut:
        """Record `index`; a UserError that names it if it is damaged."""

    @abstractmethod
    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Split name -> (N,) bool for the records that were kept, given their ids and fields."""

    def fingerprint(self) -> str:
        """Text that changes when the source or an option changes: a half-written conversion continues only if it
        is the same."""
        stat = self.path.stat()
        parts = (type(self).__name__, stat.st_size, stat.st_mtime_ns, len(self), self.skeleton.to_dict(),
                 self.num_persons, self.channels, str(self.dtype), self.has_score, sorted(self.info.items()))
        return repr(parts)


def state_of(files: Iterable[Path]) -> str:
    """Text that changes when a file's size or its time does; of one that is not there, that it is missing."""
    stats = [(file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def layout_for(joints: int, channels: int, layout: Any, where: str) -> Skeleton:
    """The skeleton that was asked for, or the one that the sizes give away.

    Raises:
        UserError: none was asked for and the sizes are nobody's, or the one asked for has other joints.
    """
    if layout is None:
        if (joints, channels) not in _BY_SIZE:
            known = ", ".join(f"{v} joints with {c} coordinates ({name})" for (v, c), name in _BY_SIZE.items())
            raise UserError(f"Expected layout to be given for {where}, as it has {joints} joints with {channels} "
                            f"coordinates. Got none; only {known} are recognised.")
        layout = _BY_SIZE[joints, channels]
    skeleton = Skeleton.load(layout)
    if len(skeleton) != joints:
        raise UserError(f"Expected {where} to have {len(skeleton)} joints, as layout '{skeleton.name}' has. Got "
                        f"{joints}; name the right layout.")
    return skeleton


def pick_persons(keypoint: np.ndarray, score: np.ndarray | None, limit: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The persons of (T, M, V, C) whom `persons_that_matter` chooses, where there are more than `limit`."""
    if keypoint.shape[1] <= limit:
        return keypoint, score
    chosen = persons_that_matter(keypoint, score, limit)
    return keypoint[:, chosen], None if score is None else score[:, chosen]


def persons_that_matter(keypoint: np.ndarray, score: np.ndarray | None, limit: int) -> np.ndarray:
    """The `limit` persons of (T, M, V, C) that matter most, in their order: with scores those with the greatest sum of
    scores, otherwise those seen in most frames."""
    weight = (keypoint != 0).any(axis=(2, 3)).sum(axis=0) if score is None else score.sum(axis=(0, 2), dtype=np.float64)
    return np.sort(np.argsort(-weight, kind="stable")[:limit])
