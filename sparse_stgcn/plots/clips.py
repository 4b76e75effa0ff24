"""A clip as a strip of frames, or as an animated GIF: bones by side, persons by line."""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.clip import Clip, turn
from ..skeleton import Skeleton
from .style import COLOURS, GREY, readable, require, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["animate", "sides", "strip"]

# The side of a bone is its colour, the person its line: both can be told apart in grey.
SIDES = {"left": COLOURS[0], "middle": GREY, "right": COLOURS[3]}
LINES = ("-", "--", ":")
ASIDE, ABOVE = math.radians(25), math.radians(12)  # where the viewer stands by default: off the front, and a little higher
GIF_TICK = 0.01  # seconds; a frame of a GIF is shown for a whole number of them, of at least two


def sides(skeleton: Skeleton) -> list[str]:
    """"left", "right" or "middle" of every joint, by the skeleton's pairs; a bone is on the side of its child."""
    found = ["middle"] * len(skeleton)
    for left, right in skeleton.pairs:
        found[left], found[right] = "left", "right"
    return found


@styled
def strip(clip: Clip, panels: int = 8, yaw: float | None = None, pitch: float | None = None) -> Figure:
    """``panels`` frames, equally spaced from the first to the last, side by side, with their times in seconds.

    Args:
        yaw, pitch: radians; where the clip is seen from (see ``data.clip.turn``). Default: the first person's front, a
            little from aside and above; 2D clips from the front.

    Raises:
        ValueError: ``panels`` < 1.
    """
    if panels < 1:
        raise ValueError(f"Expected panels >= 1. Got {panels}.")
    points, limits = _project(clip, yaw, pitch)
    chosen = np.unique(np.linspace(0, len(clip) - 1, panels).round().astype(int))
    ratio = (limits[0][1] - limits[0][0]) / (limits[1][1] - limits[1][0])
    width = 1.9 * min(max(ratio, 0.45), 1.5)
    figure = require()(figsize=(max(width * len(chosen), 4.5), width / ratio + 0.95), layout="constrained")
    figure.suptitle(_title(clip))
    all_axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for axes, frame in zip(all_axes, chosen.tolist(), strict=True):
        _draw(axes, clip, points[frame], limits)
        axes.set_xlabel(f"{frame / clip.fps:.2f} s")
    _legend(figure, clip)
    return figure


@styled
def animate(clip: Clip, path: str | Path, yaw: float | None = None, pitch: float | None = None, fps: float = 15.0) -> int:
    """Write an endless GIF of the whole clip at its own speed and return the number of its frames.

    Every n-th frame is drawn, with the smallest n that gives at most ``fps`` frames per second. A GIF counts in hundredths
    of a second, so that its speed is right to 0.005 s per frame.

    Raises:
        ValueError: ``fps`` is not above 0.
    """
    if not fps > 0:
        raise ValueError(f"Expected fps > 0. Got {fps:g}.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    clip = clip.every(max(1, math.ceil(clip.fps / fps - 1e-9)))
    points, limits = _project(clip, yaw, pitch)
    figure = require()(figsize=(4, 4), dpi=90, layout="constrained")
    axes, canvas = figure.subplots(), FigureCanvasAgg(figure)
    figure.suptitle(_title(clip))
    _legend(figure, clip, columns=3)
    images = []
    for frame in range(len(clip)):
        axes.clear()
        _draw(axes, clip, points[frame], limits)
        axes.set_xlabel(f"{frame / clip.fps:.2f} s")
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64))
    ticks = max(2, round(1 / (clip.fps * GIF_TICK)))
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 * GIF_TICK * ticks), loop=0)
    return len(clip)


def _project(clip: Clip, yaw: float | None, pitch: float | None) -> tuple[np.ndarray, tuple[tuple[float, float], ...]]:
    """(T, M, V, 2) to the right and up, and the limits of both over the whole clip."""
    if yaw is None:
        yaw = 0.0 if clip.flat else clip.facing - ASIDE
    if pitch is None:
        pitch = 0.0 if clip.flat else ABOVE
    points = turn(clip.keypoint.astype(np.float64), yaw, pitch)[..., :2]
    low, high = np.nanmin(points, (0, 1, 2)), np.nanmax(points, (0, 1, 2))
    margin = 0.05 * max((high - low).max(), 1e-6)
    return points, tuple((a - margin, b + margin) for a, b in zip(low.tolist(), high.tolist(), strict=True))


def _draw(axes: Axes, clip: Clip, points: np.ndarray, limits: tuple[tuple[float, float], ...]) -> None:
    """One frame; a bone with a lost end is left out."""
    side = sides(clip.skeleton)
    for person, joints in enumerate(points):
        line: Any = LINES[person % len(LINES)]
        for child, parent in clip.skeleton.edges:
            axes.plot(*joints[[child, parent]].T, color=SIDES[side[child]], linestyle=line, linewidth=1.6,
                      solid_capstyle="round")
        axes.plot(*joints.T, color="#404040", linestyle="none", marker=".", markersize=3)
    axes.set(xlim=limits[0], ylim=limits[1], aspect="equal", xticks=[], yticks=[])


def _title(clip: Clip) -> str:
    return readable(f"{clip.name}: {clip.label}" if clip.label else clip.name)


def _legend(figure: Figure, clip: Clip, columns: int = 6) -> None:
    from matplotlib.lines import Line2D

    present = [name for name in SIDES if name in sides(clip.skeleton)]
    lines: list[Any] = list(LINES)
    entries = [Line2D([], [], color=SIDES[name], label=name) for name in present] if len(present) > 1 else []
    seen = [m for m in range(clip.keypoint.shape[1]) if np.isfinite(clip.keypoint[:, m]).any()]
    if len(seen) > 1:
        entries += [Line2D([], [], color="#404040", linestyle=lines[m % len(lines)], label=f"person {m + 1}") for m in seen]
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), columns), frameon=False,
                      fontsize="small")
