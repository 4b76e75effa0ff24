"""Preparation frame by frame: what ``Preparation.features`` does to a whole sequence, without knowing the frames to come."""
from __future__ import annotations

import numpy as np

from ..errors import UserError
from . import transforms as tf
from .preparation import IMAGE, Preparation, with_score

__all__ = ["CausalPreparation"]


class CausalPreparation:
    """Features of a stream of frames.

    The same numbers, to the bit, as those of the whole sequence, wherever a decision does not need the future:

    - the main person of 3D data is the first one who is seen, not the one who is seen in most frames; its first frame anchors
      the stream, and frames without this person are left out, as they are from a sequence;
    - of more persons than the network takes, the main one and then the first ones stay;
    - motion of a frame is known when the next one comes: with ``jm`` or ``bm`` features are one frame late;
    - ``missing="interpolate"`` holds the last position of a lost joint, ``"drop"`` drops every frame with a lost joint.

    Args:
        preparation: of the network.
        flat: image coordinates, C = 2.
        image: height and width in pixels, for 2D.

    Raises:
        UserError: the preparation scales sequences to their box.
    """

    def __init__(self, preparation: Preparation, flat: bool, image: tuple[float, float] = IMAGE) -> None:
        if preparation.box:
            raise UserError("Expected a network whose input is known frame by frame. Got one trained with --box, which scales "
                            "a sequence by joints that are still to come; use --rolling, whose windows are sequences.")
        self.preparation, self.flat, self.image = preparation, flat, image
        self.late = any(feature in preparation.feats for feature in ("jm", "bm"))
        self._main: int | None = None
        self._anchor: tf.Anchor | None = None
        self._held: np.ndarray | None = None  # the last position of every joint
        self._previous: np.ndarray | None = None  # the normalised frame whose motion is not known yet

    def push(self, keypoint: np.ndarray, score: np.ndarray | None = None) -> np.ndarray:
        """Features (num_person, T', V, 3 * features) float32 of the frames that (M, T, V, C) completes."""
        if self.flat:
            keypoint = with_score(keypoint, score)
        keypoint = self._normalise(self._ordered(self._filled(keypoint)))
        if self._previous is not None:
            keypoint = np.concatenate([self._previous, keypoint], axis=1)
        made = self._features(keypoint)
        if not self.late or not keypoint.shape[1]:
            return made
        self._previous = keypoint[:, -1:]
        return made[:, :-1]

    def finish(self) -> np.ndarray:
        """The features of the last frame, where they were waiting for the next one."""
        if self._previous is None:
            return self._features(np.zeros((1, 0, len(self.preparation.skeleton), 3)))
        last, self._previous = self._previous, None
        return self._features(last)

    def _filled(self, keypoint: np.ndarray) -> np.ndarray:
        policy, axes = self.preparation.missing, 2 if self.flat else 3
        if policy == "keep":
            return keypoint
        lost = tf.missing_joints(keypoint, axes)
        if policy == "drop":
            keypoint = keypoint[:, ~lost.any(axis=(0, 2))]
        elif policy == "interpolate":
            keypoint = np.where(lost[..., None], 0, keypoint)
            if self._held is None:
                self._held = np.zeros_like(keypoint[:, 0])
            self._held = tf.format_persons(self._held, len(keypoint))
            for frame, gone in zip(keypoint.swapaxes(0, 1), lost.swapaxes(0, 1), strict=True):
                there = (frame[..., :axes] != 0).any(axis=(1, 2))[:, None]  # nothing is held of a person who has left
                frame[:] = np.where((gone & there)[..., None], self._held, frame)
                self._held = np.where(there[..., None], frame, 0)
        return tf.fill_missing(keypoint, "zero", axes)

    def _ordered(self, keypoint: np.ndarray) -> np.ndarray:
        """num_person persons, the main one of 3D data first, in the frames where that person is seen."""
        persons = self.preparation.num_person
        if self.flat:
            return tf.format_persons(keypoint, persons)
        seen = (np.abs(keypoint) > tf.SEEN).any(axis=(2, 3))
        if self._main is None and seen.any():
            self._main = int(seen[:, seen.any(axis=0).argmax()].argmax())
        if self._main is None or self._main >= len(keypoint):
            return tf.format_persons(keypoint[:, :0], persons)
        order = [self._main, *(m for m in range(len(keypoint)) if m != self._main)]
        return tf.format_persons(keypoint[order][:, seen[self._main]], persons)

    def _normalise(self, keypoint: np.ndarray) -> np.ndarray:
        preparation = self.preparation
        if self.flat or not keypoint.shape[1]:
            return preparation.normalise(keypoint, self.flat, self.image)
        if self._anchor is None:
            self._anchor = preparation.anchor(keypoint[0, 0])
        return self._anchor.apply(keypoint)

    def _features(self, keypoint: np.ndarray) -> np.ndarray:
        preparation = self.preparation
        persons = tf.format_persons(keypoint, preparation.num_person)
        made = tf.skeleton_features(persons, preparation.feats, preparation.skeleton.bones, self.flat,
                                    preparation.motion_score(self.flat))
        return np.ascontiguousarray(made, dtype=np.float32)
