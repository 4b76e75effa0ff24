"""Which joints say where a body is and how it stands: the anchor of the 3D normalisation, for any skeleton."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..skeleton import Skeleton

# Names that data sets give to the lower and the upper end of the trunk, best first.
_BOTTOM = (
    "base of the spine", "spine base", "hip center", "hip centre", "mid hip", "pelvis", "hip", "waist", "root", "torso",
)
_TOP = (
    "middle of the spine", "spine mid", "spine", "torso", "chest", "thorax", "spine shoulder", "shoulder center",
    "shoulder centre", "neck",
)
_SHOULDER = ("shoulder", "upper arm", "collar")


@dataclass(frozen=True)
class BodyAxes:
    """Joints that anchor a body: `centre` becomes the origin, `spine` (bottom, top) is turned to +z and
    `shoulders` (right, left) to +x. `spine` and `shoulders` are None where the skeleton does not name them."""

    centre: int
    spine: tuple[int, int] | None = None
    shoulders: tuple[int, int] | None = None


def body_axes(skeleton: Skeleton) -> BodyAxes:
    """The anchor joints of `skeleton`.

    What the layout says (`center`, `spine`, `shoulders`) holds; the layout of NTU says what PYSKL's `PreNormalize3D`
    uses (pyskl/datasets/pipelines/pose_related.py). A skeleton that does not say is centred at its root, and its
    axes follow from joint names such as "hip_center", "spine", "torso", "neck", "left_shoulder" or
    "right upper arm" (case, "_" and "-" do not matter). An axis whose joints are not named stays None and is not
    aligned.
    """
    centre = skeleton.root if skeleton.center is None else skeleton.center
    index = {plain_name(name): i for i, name in reversed(list(enumerate(skeleton.joints)))}
    return BodyAxes(centre, skeleton.spine or _spine(index), skeleton.shoulders or _shoulders(index))


def _spine(index: dict[str, int]) -> tuple[int, int] | None:
    bottom = _first(index, _BOTTOM)
    top = _first({name: joint for name, joint in index.items() if joint != bottom}, _TOP)
    return None if bottom is None or top is None else (bottom, top)


def _shoulders(index: dict[str, int]) -> tuple[int, int] | None:
    for part in _SHOULDER:
        right, left = _side(index, "right", part), _side(index, "left", part)
        if right is not None and left is not None:
            return right, left
    return None


def plain_name(name: str) -> str:
    """The name of a joint without what spellings differ in: case, "_" and "-"."""
    return " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())


def _first(index: dict[str, int], names: tuple[str, ...]) -> int | None:
    return next((index[name] for name in names if name in index), None)


def _side(index: dict[str, int], side: str, part: str) -> int | None:
    forms = (f"{side} {part}", f"{part} {side}", f"{side[0]} {part}", f"{part} {side[0]}", f"{side[0]}{part}")
    return _first(index, forms)
