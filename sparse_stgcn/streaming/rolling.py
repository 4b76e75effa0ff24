"""RollingPredictor: predictions while frames arrive, each from the last frames as a clip of their own."""
from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..data.preparation import IMAGE
from ..errors import UserError
from ..predictor import Prediction, Predictor
from .session import Session

__all__ = ["RollingPredictor"]


class RollingPredictor(Session):
    """``Predictor`` on the last frames, again and again: the answers of the offline network, of any backbone, without delay.

    The work is that of a whole clip for every prediction, so ``window / chunk`` times that of ``StreamPredictor``. In return
    the network sees what it was trained on: a clip with padding at its borders, prepared by its own first frame.

    Args:
        predictor: best loaded with ``clips=1``.
        window: frames that a prediction looks back, at the rate of the training. Default: the clip length of the training.
        chunk: frames between predictions.
        layout, fps, image: of the frames that will be pushed, as in ``Predictor``.

    Raises:
        UserError: window or chunk is below 1, or layout or fps does not fit.
    """

    delay = 0

    def __init__(self, predictor: Predictor, window: int | None = None, chunk: int = 1, layout: Any = None,
                 fps: float | None = None, image: tuple[float, float] = IMAGE) -> None:
        inputs = predictor.inputs
        window = inputs.preparation.clip_len if window is None else window
        if chunk < 1 or window < 1:
            raise UserError(f"Expected chunk and window of at least 1. Got {chunk} and {window}.")
        inputs.order(layout)
        self.predictor, self.window, self.chunk, self._given = predictor, window, chunk, (layout, fps, image)
        self._frames: deque[tuple[np.ndarray, np.ndarray | None]] = deque(maxlen=max(1, round(window * inputs.ratio(fps))))
        self.reset()

    @classmethod
    def load(cls, path: str | Path, window: int | None = None, chunk: int = 1, layout: Any = None, fps: float | None = None,
             image: tuple[float, float] = IMAGE, missing: str | None = None) -> RollingPredictor:
        """From a checkpoint or a work directory, see ``Predictor.load``."""
        return cls(Predictor.load(path, clips=1, missing=missing), window, chunk, layout, fps, image)

    def reset(self) -> None:
        self._frames.clear()
        self._since = 0
        self._last: Prediction | None = None

    def push(self, frame: ArrayLike, score: ArrayLike | None = None) -> Prediction | None:
        value, confidence = np.asarray(frame), None if score is None else np.asarray(score)
        if value.ndim not in (2, 3) or (self._frames and value.shape != self._frames[-1][0].shape):
            raise UserError(f"Expected frame of shape (M, V, C) or (V, C), the same for all. Got {value.shape}.")
        self._frames.append((value, confidence))
        self._since += 1
        if self._since == self.chunk:
            self._predict()
        return self._last

    def finish(self) -> Prediction | None:
        if self._since:
            self._predict()
        return self._last

    def _predict(self) -> None:
        self._since = 0
        keypoint = np.stack([value for value, _ in self._frames], axis=-3)
        if not np.nan_to_num(keypoint).any():
            return  # nobody is seen
        scores = [score for _, score in self._frames if score is not None]
        layout, fps, image = self._given
        self._last = self.predictor(keypoint, layout, fps, np.stack(scores, axis=-2) if scores else None, image)
