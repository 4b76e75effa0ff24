"""How far a stream is from the offline network on the same frames: the price of means that slide."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from .predictor import StreamPredictor

__all__ = ["Difference", "difference"]


@dataclass(frozen=True)
class Difference:
    """Differences of probabilities.

    Attributes:
        whole: largest one after the end of the sequence, everything seen (``window=0``), from the network on all of it.
        windows, mean: largest and mean one of the answers on the way, each from the network on the ``window`` frames that its
            features are of, as a clip of their own: one per window.
        agree: share of those answers with the same class.
    """

    whole: float
    windows: float
    mean: float
    agree: float


@torch.inference_mode()
def difference(stream: StreamPredictor, keypoint: ArrayLike, score: ArrayLike | None = None) -> Difference:
    """The network of ``stream`` frame by frame against itself on the frames of one sequence (M, T, V, C) or (T, V, C)."""
    features = stream.features(keypoint, score)
    frames = features.shape[1]
    window = stream.window or frames
    everything, sliding = stream.again(0, stream.chunk), stream.again(stream.window, 1)
    gaps, same = [], []
    for t in range(frames):
        everything.advance(features[:, t:t + 1])
        answer, end = sliding.advance(features[:, t:t + 1]), t + 1 - sliding.lag  # frames whose features the answer knows
        if answer is not None and end > 0 and end % window == 0:
            own = _answer(stream, features[:, end - window:end])
            gaps.append(np.abs(own - answer.probability))
            same.append(own.argmax() == answer.label)
    last = everything.advance(features[:, :0], end=True)
    whole = float(np.abs(_answer(stream, features) - last.probability).max()) if last else 0.0
    if not gaps:
        return Difference(whole, float("nan"), float("nan"), float("nan"))
    return Difference(whole, float(np.max(gaps)), float(np.mean(gaps)), float(np.mean(same)))


def _answer(stream: StreamPredictor, features: np.ndarray) -> np.ndarray:
    answer = stream.model(torch.from_numpy(np.ascontiguousarray(features))[None])[0]
    return (answer if stream.gives_probabilities else answer.softmax(0)).numpy()
