"""InputFormat: what the file of a network says about its input, and the way from a user's array to it."""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .data import transforms as tf
from .data.joints import joint_order
from .data.preparation import IMAGE, Preparation
from .data.resample import resample
from .data.source import persons_that_matter
from .errors import UserError
from .recognizer import Ensemble, Recognizer
from .skeleton import Skeleton

__all__ = ["InputFormat", "checkpoint_file", "label_names_of"]

_FLAT_LAYOUTS = ("coco", "openpose", "handmp")  # of files that do not say how many coordinates they were trained on
_CROWD = 6  # persons up to which an array is not suspected of other axes
_FILES = ("model.safetensors", "ensemble.safetensors")


@dataclass(frozen=True)
class InputFormat:
    """The input that a network was trained on.

    Attributes:
        preparation: everything from an array of its layout and frame rate to clips.
        flat: image coordinates, with a confidence as third channel.
        fps: frames per second of the training data, or None where the file does not say.
        persons: of the training data, which may have more than a clip takes.
    """

    preparation: Preparation
    flat: bool = False
    fps: float | None = None
    persons: int = 2

    @classmethod
    def of(cls, model: Recognizer | Ensemble, meta: Mapping[str, Any], clips: int | None = None, missing: str | None = None
           ) -> InputFormat:
        """From a network and what ``checkpoint.save`` was told about it; what the file does not say has the default.

        Args:
            clips: clips per sequence, instead of those of the training's test.
            missing: what to do about lost joints, instead of what training did.

        Raises:
            UserError: stream and network do not fit together, or a value is out of range.
        """
        member: Any = model.members[0] if isinstance(model, Ensemble) else model
        backbone, protocol = member.backbone, dict(meta.get("protocol") or {})
        names = ("stream", "clip_len", "num_person", "align", "sampler", "box")
        known = {name: protocol[name] for name in names if protocol.get(name) is not None}
        members = model.members if isinstance(model, Ensemble) else [member]
        fixed = [own.backbone.num_person for own in members if own.backbone.num_person is not None]
        known["num_person"] = fixed[0] if fixed else known.get("num_person", Preparation.num_person)
        preparation = Preparation(backbone.skeleton, num_clips=clips or protocol.get("clips") or 10,
                                  missing=missing or protocol.get("missing") or "keep", **known)
        if backbone.in_channels != 3 * len(preparation.feats):
            raise UserError(f"Expected a network of {3 * len(preparation.feats)} input channels for stream "
                            f"{preparation.stream}. Got {backbone.in_channels}; save it with protocol={{'stream': ...}}.")
        coordinates = protocol.get("coordinates") or (2 if backbone.skeleton.name in _FLAT_LAYOUTS else 3)
        return cls(preparation, coordinates == 2, protocol.get("fps"), protocol.get("persons") or preparation.num_person)

    def ratio(self, fps: float | None) -> float:
        """Frames of the input per frame that the network expects; 1 where a rate is not known, with a warning if it is the
        network's.

        Raises:
            UserError: fps is not a positive number.
        """
        if fps is None:
            return 1.0
        if not 0 < fps < float("inf"):
            raise UserError(f"Expected fps to be a positive number. Got {fps}.")
        if self.fps is None:
            warnings.warn(f"Expected fps with a network that knows the frame rate of its training data. Got fps={fps:g}, which "
                          "is without effect; give convert --fps and train again.", stacklevel=3)
            return 1.0
        return fps / self.fps

    def order(self, layout: Any) -> tuple[int, np.ndarray | None]:
        """Joints of an array of ``layout`` (None: that of the network), and where in it the network's joints are.

        Raises:
            UserError: no such layout, or one without some of the network's joints.
        """
        own = self.preparation.skeleton
        if layout is None:
            return len(own), None
        try:
            given = Skeleton.load(layout)
        except ValueError as error:
            raise UserError(str(error)) from error
        return len(given), joint_order(given, own)

    def array(self, keypoint: ArrayLike, layout: Any = None, score: ArrayLike | None = None, order: tuple | None = None
              ) -> tuple[np.ndarray, np.ndarray | None]:
        """A user's array as (keypoint (M, T, V, C), score (M, T, V) or None) in the network's joints, C without the score.

        Args:
            keypoint: (M, T, V, C) or (T, V, C); for a 2D network C is 2, or 3 with the confidence as the third.
            layout: of the array, see ``order``.
            score: (M, T, V) or (T, V), confidence of 2D joints.
            order: what ``order(layout)`` gave, where it is known already, as of frames of a stream.

        A warning says where more persons than frames look like (T, M, V, C); not with ``order``: frames come one by one.

        Raises:
            UserError: the shape, the dtype or the layout does not fit.
        """
        joints, chosen = order or self.order(layout)
        value = np.asarray(keypoint)
        channels = (2, 3) if self.flat else (3,)
        if value.ndim not in (3, 4) or 0 in value.shape or value.shape[-2] != joints or value.shape[-1] not in channels:
            raise UserError(f"Expected keypoint of shape (M, T, V, C) or (T, V, C) with V = {joints} and C = "
                            f"{' or '.join(map(str, channels))}. Got {value.shape}; name its layout if it is another.")
        if value.dtype.kind not in "fiu":
            raise UserError(f"Expected keypoint to hold numbers. Got {value.dtype}.")
        if order is None and value.ndim == 4 and len(value) > max(_CROWD, value.shape[1]):
            warnings.warn(f"Expected (M, T, V, C), persons before frames. Got {len(value)} persons of {value.shape[1]} frames; "
                          "if it is (T, M, V, C), swap the first two axes, those of a file with --order MTVC.", stacklevel=3)
        value = value if value.dtype.kind == "f" else value.astype(np.float32)
        confidence = None if score is None else np.asarray(score, value.dtype)
        if confidence is not None and (not self.flat or confidence.shape != value.shape[:-1]):
            raise UserError(f"Expected score of shape {value.shape[:-1]} for image coordinates. Got {confidence.shape} for C = "
                            f"{value.shape[-1]}.")
        if self.flat and value.shape[-1] == 3:
            value, confidence = value[..., :2], value[..., 2] if confidence is None else confidence
        if value.ndim == 3:
            value, confidence = value[None], None if confidence is None else confidence[None]
        if chosen is not None:
            value, confidence = value[:, :, chosen], None if confidence is None else confidence[:, :, chosen]
        return value, confidence

    def known(self, keypoint: np.ndarray, score: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """(keypoint, score) in which every coordinate of a joint that is not finite is NaN, or 0 with ``missing="keep"``."""
        finite = np.isfinite(keypoint).all(axis=-1)
        finite = finite if score is None else finite & np.isfinite(score)
        lost = keypoint.dtype.type(0 if self.preparation.missing == "keep" else np.nan)
        return np.where(finite[..., None], keypoint, lost), None if score is None else np.where(finite, score, lost)

    def seen(self, keypoint: np.ndarray) -> bool:
        """Whether somebody is seen in what ``known`` made; where the preparation sees nobody, this does not either."""
        return bool((np.abs(keypoint) > (0 if self.flat else tf.SEEN)).any())

    def features(self, keypoint: ArrayLike, layout: Any = None, fps: float | None = None, score: ArrayLike | None = None,
                 image: tuple[float, float] = IMAGE, order: tuple | None = None) -> np.ndarray:
        """What clips are drawn from, (M, T', V, C) float32.

        Of more persons than the training data have, those stay who matter most, as in ``convert --max-persons``.
        A joint that is not finite is lost; with ``missing="keep"`` it becomes 0, which is what data sets write for such joints.

        Raises:
            UserError: like ``array`` and ``ratio``, or nobody is seen in any frame.
        """
        value, confidence = self.array(keypoint, layout, score, order)
        value, confidence = self.known(value, confidence)
        if not self.seen(value):
            raise UserError("Expected keypoint with a person in at least one frame. Got zeros or NaN only"
                            f"{'' if self.flat else f' (up to {tf.SEEN:g}, a coordinate is zero)'}.")
        if len(value) > self.persons:
            frames_first = lambda x: np.nan_to_num(x).swapaxes(0, 1)
            chosen = persons_that_matter(frames_first(value), None if confidence is None else frames_first(confidence),
                                         self.persons)
            value, confidence = value[chosen], None if confidence is None else confidence[chosen]
        ratio = self.ratio(fps)
        if ratio != 1:
            if confidence is not None:
                value = np.concatenate([value, confidence[..., None]], axis=-1)
            value = resample(value, ratio)
            if confidence is not None:
                value, confidence = value[..., :2], value[..., 2]
        return self.preparation.features(value, confidence, self.flat, image)


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or that in a work directory.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = next((path / name for name in _FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"Expected a checkpoint, or a work directory with {' or '.join(_FILES)}. Got '{path}'.")
    return found


def label_names_of(model: Recognizer | Ensemble, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes as the file has them, or their numbers.

    Raises:
        UserError: the file names another number of classes than the network has.
    """
    names = tuple(map(str, meta.get("label_names") or range(model.num_classes)))
    if len(names) != model.num_classes:
        raise UserError(f"Expected label_names of {model.num_classes} classes in the file. Got {len(names)}.")
    return names
