"""RollingPredictor: predictions while frames arrive, each from the last frames as a clip of their own."""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..data.preparation import IMAGE, with_score
from ..data.transforms import format_persons
from ..errors import UserError
from ..predictor import Prediction, Predictor
from .session import Session, as_sequence

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
        self.predictor, self.window, self.chunk, self._given = predictor, window, chunk, (fps, image)
        self._order = inputs.order(layout)
        self._frames: deque[tuple[np.ndarray, np.ndarray | None]] = deque(maxlen=max(1, round(window * inputs.ratio(fps))))
        self.reset()

    @classmethod
    def load(cls, path: str | Path, window: int | None = None, chunk: int = 1, layout: Any = None, fps: float | None = None,
             image: tuple[float, float] = IMAGE, missing: str | None = None) -> RollingPredictor:
        """From a checkpoint or a work directory, see ``Predictor.load``."""
        return cls(Predictor.load(path, clips=1, missing=missing), window, chunk, layout, fps, image)

    def reset(self) -> None:
        self._frames.clear()
        self._form: tuple[int, ...] | None = None  # V and C of the frames
        self._since = 0
        self._last: Prediction | None = None

    def push(self, frame: ArrayLike, score: ArrayLike | None = None) -> Prediction | None:
        shape = np.shape(frame)
        if self._form not in (None, shape[-2:]):
            raise UserError(f"Expected frame of shape (M, V, C) or (V, C), V and C the same for all. Got {shape} after "
                            f"(V, C) = {self._form}; reset() begins another stream.")
        # Checked before it is kept: a bad frame would spoil every prediction until it has left the window.
        self._frames.append(as_sequence(self.predictor.inputs, frame, score, self._order))
        self._form = shape[-2:]
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
        keypoint, score = _together([value for value, _ in self._frames]), None
        if not self.predictor.inputs.seen(keypoint):
            return
        if any(own is not None for _, own in self._frames):
            score = _together([with_score(value, own)[..., 2] for value, own in self._frames])
        (fps, image), inputs = self._given, self.predictor.inputs
        features = inputs.features(keypoint, None, fps, score, image, inputs.order(None))
        self._last = self.predictor.predict_features([features])[0]


def _together(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames (M, 1, ...) one after another; who is not in one of them is absent there."""
    persons = max(map(len, frames))
    return np.concatenate([format_persons(frame, persons) for frame in frames], axis=1)
