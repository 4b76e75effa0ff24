"""From one frame rate to another: straight lines in time between the frames, for whole sequences and for streams."""
from __future__ import annotations

import numpy as np

from .transforms import format_persons

__all__ = ["Resampler", "resample"]


def resample(keypoint: np.ndarray, ratio: float) -> np.ndarray:
    """Frame j of the result is the sequence (M, T, V, C) at time j * ratio, in frames: (M, floor((T - 1) / ratio) + 1, V, C).

    A joint that is lost (NaN, or all zeros) on one side of that time is taken from the nearer frame.

    Args:
        ratio: frames of the input per frame of the output, its rate over that of the output; 1 changes nothing.
    """
    return Resampler(ratio).push(keypoint)


class Resampler:
    """``resample`` of a sequence that comes in pieces: a frame is given out when the frames on both sides of it are there.

    The number of persons may change from piece to piece: who is not in one of them is absent there.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._made = self._seen = 0  # frames of the output, of the input
        self._last: np.ndarray | None = None

    def push(self, keypoint: np.ndarray) -> np.ndarray:
        """The frames (M, T', V, C) of the output that the new ones (M, T, V, C) complete."""
        if self.ratio == 1:
            return keypoint
        first = self._seen if self._last is None else self._seen - 1  # number of the first frame at hand
        known = keypoint
        if self._last is not None:
            persons = max(len(self._last), len(keypoint))
            known = np.concatenate([format_persons(part, persons) for part in (self._last, keypoint)], axis=1)
        self._seen += keypoint.shape[1]
        self._last = known[:, -1:].copy()
        count = int((self._seen - 1) / self.ratio) + 1
        time = np.arange(self._made, max(count, self._made)) * self.ratio
        self._made = max(count, self._made)
        before = np.minimum(time.astype(np.int64), self._seen - 1)
        after = np.minimum(before + 1, self._seen - 1)
        return _between(known[:, before - first], known[:, after - first], (time - before)[:, None, None])


def _between(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    nearer = np.where(weight < 0.5, a, b)
    there = [np.isfinite(x).all(axis=-1, keepdims=True) & (x != 0).any(axis=-1, keepdims=True) for x in (a, b)]
    return np.where(there[0] & there[1] & (weight > 0), a + weight * (b - a), nearer).astype(a.dtype)
