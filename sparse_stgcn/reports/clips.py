"""Clips small enough for a page: 16-bit coordinates as base64.

A coordinate x of channel c is stored as q = round((x - origin[c]) / step), little-endian int16 in the order (T, M, V, C), and
read back as origin[c] + step * q. The origin is the middle of the clip's box and step = radius / 32767, so that no
coordinate moves by more than step / 2: for a scene of 4 m across, 0.03 mm. -32768 is a joint that was not measured.
"""
from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..data.clip import Clip
from ..plots.clips import sides

__all__ = ["LOST", "fit", "packed"]

LOST, LARGEST = -32768, 32767


def packed(clip: Clip, frames: int = 150, **facts: Any) -> dict[str, Any]:
    """The clip as JSON can hold it, and ``facts`` about it (predictions ...).

    Args:
        frames: at most so many are kept, every n-th one with the smallest n that does.

    Raises:
        ValueError: ``frames`` < 1.
    """
    if frames < 1:
        raise ValueError(f"Expected frames >= 1. Got {frames}.")
    clip = clip.every(math.ceil(len(clip) / frames))
    origin, radius = clip.box
    step = radius / LARGEST
    channels = 2 if clip.flat else 3
    steps = np.rint((clip.keypoint[..., :channels].astype(np.float64) - origin[:channels]) / step)
    whole = np.where(np.isfinite(steps), steps, LOST).astype("<i2")
    return {"name": clip.name, "label": clip.label, "fps": clip.fps, "shape": list(whole.shape),
            "origin": origin[:channels].tolist(), "step": step, "yaw": clip.facing, "joints": list(clip.skeleton.joints),
            "bones": [list(edge) for edge in clip.skeleton.edges], "sides": sides(clip.skeleton),
            "data": base64.b64encode(whole.tobytes()).decode(), **facts}


def fit(clips: Iterable[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first clips whose data have no more than ``budget`` characters together."""
    chosen, used = [], 0
    for clip in clips:
        used += len(clip["data"])
        if used > budget:
            break
        chosen.append(clip)
    return chosen
