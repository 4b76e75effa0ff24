"""What the predictors of streams share."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from ..predictor import Prediction

__all__ = ["Session"]


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

        Raises:
            UserError: the shape does not fit.
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
