"""What the predictors of streams share."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from ..inputs import InputFormat
from ..predictor import Prediction

__all__ = ["Session", "as_sequence"]


class Session(ABC):
    """Predictions while frames arrive.

    Attributes:
        delay: a frame counts in predictions this many frames later.
        chunk: frames that are computed together.
        window: frames that a prediction looks back, 0: all.
    """

    delay: int
    chunk: int
    window: int

    @abstractmethod
    def reset(self) -> None:
        """Begin a new stream."""

    @abstractmethod
    def push(self, frame: ArrayLike, score: ArrayLike | None = None) -> Prediction | None:
        """The next frame, (M, V, C) or (V, C) -> the latest prediction, None until there is one.

        The number of persons M may change from frame to frame: who is not in one of them is absent there.

        Raises:
            UserError: the shape does not fit; the stream is then as it was.
        """

    @abstractmethod
    def finish(self) -> Prediction | None:
        """The end of the stream: the prediction that counts all frames. Then ``reset``."""

    def run(self, keypoint: ArrayLike, score: ArrayLike | None = None) -> Iterator[Prediction | None]:
        """``push`` of every frame of (M, T, V, C) or (T, V, C), then ``finish``: T + 1 predictions."""
        frames, scores = np.asarray(keypoint), None if score is None else np.asarray(score)
        for t in range(frames.shape[-3]):
            yield self.push(frames[..., t, :, :], None if scores is None else scores[..., t, :])
        yield self.finish()


def as_sequence(inputs: InputFormat, frame: ArrayLike, score: ArrayLike | None, order: tuple
                ) -> tuple[np.ndarray, np.ndarray | None]:
    """A pushed frame as ``inputs.known`` makes it: keypoint (M, 1, V, C), score (M, 1, V) or None, copies of what was given.

    Args:
        order: what ``inputs.order`` gave for the layout of the frames.

    Raises:
        UserError: frame or score does not fit.
    """
    frame, score = np.asarray(frame), None if score is None else np.asarray(score)
    if frame.ndim not in (2, 3):
        raise UserError(f"Expected frame of shape (M, V, C) or (V, C). Got {frame.shape}.")
    if score is not None and score.shape != frame.shape[:-1]:
        raise UserError(f"Expected score of shape {frame.shape[:-1]}, one per joint of the frame. Got {score.shape}.")
    in_time = None if score is None else score[..., None, :]
    return inputs.known(*inputs.array(frame[..., None, :, :], score=in_time, order=order))
