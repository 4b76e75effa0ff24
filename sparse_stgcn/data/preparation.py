"""Preparation: what happens to one sequence between the archive, or a user's array, and the network. The same for both."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from . import transforms as tf
from .body import BodyAxes, body_axes

__all__ = ["IMAGE", "SAMPLERS", "Preparation", "with_score"]

SAMPLERS = ("uniform", "decode", "ordered")
IMAGE = (1080.0, 1920.0)  # height and width of an image whose size nobody gave


@dataclass(frozen=True)
class Preparation:
    """How sequences become test clips: normalisation, features of the stream, frames.

    Attributes:
        skeleton: joints and bones.
        stream: "j" joints, "b" bones, "jm"/"bm" their motion, or several joined by "+" on the channel axis.
        clip_len: L, frames per clip.
        num_clips: clips per sequence.
        num_person: persons per clip, cut or padded with zeros.
        align: turn the body upright (3D with named spine and shoulders); centring is always done.
        missing: what to do about lost joints, see `transforms.fill_missing`.
        sampler: how frames are drawn: "uniform", PYSKL's "decode" variant of it, or "ordered", with repetition.
        box: scale every sequence to the box of its joints, see `transforms.fit_box` and, in 2D, `pre_normalize_2d`.

    Raises:
        UserError: a value is not as above.
    """

    skeleton: Skeleton
    stream: str = "j"
    clip_len: int = 100
    num_clips: int = 1
    num_person: int = 2
    align: bool = True
    missing: str = "keep"
    sampler: str = "uniform"
    box: bool = False

    def __post_init__(self) -> None:
        for name in ("clip_len", "num_clips", "num_person"):
            if not getattr(self, name) >= 1:
                raise UserError(f"Expected {name} of at least 1. Got {name}={getattr(self, name)}.")
        for name, allowed in (("missing", tf.MISSING), ("sampler", SAMPLERS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"Expected {name} to be one of {', '.join(allowed)}. Got {name}={getattr(self, name)!r}.")
        tf.streams_of(self.stream)

    @cached_property
    def feats(self) -> tuple[str, ...]:
        """The features of the stream, see `transforms.streams_of`."""
        return tf.streams_of(self.stream)

    @cached_property
    def axes(self) -> BodyAxes:
        """The joints that anchor a body."""
        return body_axes(self.skeleton)

    def motion_score(self, flat: bool) -> bool:
        """Whether motion averages the scores of two frames: PYSKL does for coco and openpose, not for hands."""
        return flat and self.skeleton.name != "handmp"

    def normalise(self, keypoint: np.ndarray, flat: bool, image: tuple[float, float] = IMAGE) -> np.ndarray:
        """(M, T, V, C) of finite coordinates -> the same, normalised; `flat`: image coordinates and a score, C = 3.

        A box around 3D joints is the last step, see `finish`: a random turn comes before it.
        """
        if flat:
            return tf.pre_normalize_2d(keypoint, image=image, mode="auto" if self.box else "fix")
        return tf.pre_normalize_3d(keypoint, *self._anchor_joints)

    def anchor(self, body: np.ndarray) -> tf.Anchor:
        """The anchor of a 3D body (V, 3), as `normalise` takes it from the first frame of the main person."""
        return tf.Anchor.of(body, *self._anchor_joints)

    @property
    def _anchor_joints(self) -> tuple[int, tuple[int, int] | None, tuple[int, int] | None]:
        return self.axes.centre, *((self.axes.spine, self.axes.shoulders) if self.align else (None, None))

    def features(self, keypoint: np.ndarray, score: np.ndarray | None, flat: bool, image: tuple[float, float] = IMAGE
                 ) -> np.ndarray:
        """The whole sequence after normalisation, as features: what clips are drawn from.

        Args:
            keypoint: (M, T, V, C); NaN is a lost joint unless `missing` is "keep".
            score: (M, T, V), or None.
            flat: C is 2, image coordinates.
            image: height and width in pixels, for 2D.

        Returns:
            (M, T', V, 3 * features) float32, contiguous; the main person of 3D data first.
        """
        if flat:
            keypoint = with_score(keypoint, score)
        keypoint = tf.fill_missing(keypoint, self.missing, 2 if flat else 3)
        return self.finish(self.normalise(keypoint, flat, image), flat)

    def finish(self, keypoint: np.ndarray, flat: bool) -> np.ndarray:
        """The features (M, T, V, 3 * features) float32 of what `normalise` made, in its box if asked."""
        if self.box and not flat:
            keypoint = tf.fit_box(keypoint)
        made = tf.skeleton_features(keypoint, self.feats, self.skeleton.bones, flat, self.motion_score(flat))
        return np.ascontiguousarray(made, dtype=np.float32)

    def test_frames(self, num_frames: int) -> np.ndarray:
        """Frame numbers (num_clips, clip_len) of the test clips of a sequence, the same in every run."""
        if self.sampler == "ordered":
            return tf.ordered_test_clips(num_frames, self.clip_len, self.num_clips)
        return tf.sample_test_clips(num_frames, self.clip_len, self.num_clips, decode=self.sampler == "decode")

    def random_frames(self, num_frames: int, rng: tf.Random) -> np.ndarray:
        """Frame numbers (1, clip_len) of a random clip."""
        draw = tf.ordered_sample if self.sampler == "ordered" else tf.uniform_sample
        return draw(num_frames, self.clip_len, rng)[None]

    def clips(self, features: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """The frames (clips, L) of features (M, T, V, C) as network input (clips, num_person, L, V, C)."""
        features = features[:self.num_person]
        out = np.zeros((len(frames), self.num_person, frames.shape[1], *features.shape[2:]), np.float32)
        for clip, chosen in zip(out, frames, strict=True):
            np.take(features, chosen, axis=1, out=clip[:len(features)], mode="clip")
        return out


def with_score(keypoint: np.ndarray, score: np.ndarray | None) -> np.ndarray:
    """2D joints (..., 2) with their confidence as third channel; where none is given, 1 for every joint that was seen."""
    if score is None:
        score = (np.isfinite(keypoint).all(axis=-1) & (keypoint != 0).any(axis=-1)).astype(keypoint.dtype)
    return np.concatenate([keypoint, score[..., None]], axis=-1)
