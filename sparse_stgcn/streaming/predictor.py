"""StreamPredictor: predictions while frames arrive."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..data.causal import CausalPreparation
from ..data.preparation import IMAGE, with_score
from ..data.resample import Resampler
from ..errors import UserError
from ..inputs import InputFormat
from ..predictor import Prediction, numbers, open_network
from ..recognizer import Ensemble, Recognizer, mean_probability
from .frames import SlidingMean
from .network import StreamNetwork
from .session import Session, as_sequence

__all__ = ["StreamPredictor"]


class StreamPredictor(Session):
    """A trained network on a stream of frames: every frame is computed once, whatever the window.

    The logits are those of the mean of the features over the last ``window`` frames (the offline network takes it over the
    clip). The features are the offline network's own, ``delay`` frames later: 76 for ST-GCN, CTR-GCN and DG-STGCN, whose
    temporal units look as far ahead (16 + 4 + 16 + 8 + 32 frames at strides 1, 1, 2, 2, 4), 152 for AA-GCN, whose attention
    looks ahead as far again. One feature comes every 4 frames. For ST-GCN this is exact: after ``finish`` with ``window=0``
    the logits are those of the network on the whole sequence. The graphs of the other three follow means over the whole clip;
    here they follow those over the last ``window`` frames, so that logits differ; ``predict --stream FILE --compare`` measures
    by how much.

    Every frame counts, where the clips of ``Predictor`` take ``clip_len`` frames of a whole sequence. What the preparation
    cannot know without the frames to come is decided as ``CausalPreparation`` says. Memory does not grow.

    A feature sees 153 frames (AA-GCN: 305), more than most clips have: training shows the network zeros beyond the borders of
    a clip where a stream shows it frames. How much that matters depends on the network: compare, or take ``RollingPredictor``.

    Args:
        model: a Recognizer or an Ensemble, of any stage.
        inputs: the input that it was trained on.
        label_names: one name per class.
        window: frames that the predictions look back, 0: all since the start. Default: the clip length of the training.
        chunk: frames that are computed together: more of them are faster, and as much later.
        layout, fps: of the frames that will be pushed, as in ``Predictor``.
        image: height and width of the image in pixels, for 2D.

    Attributes:
        model: a copy of the network in eval mode; ``gives_probabilities``: it is an ensemble.
        lag: the delay of the network alone; motion reaches it one frame late.

    Raises:
        UserError: chunk is below 1, window below 0, or layout or fps does not fit.
    """

    def __init__(self, model: Recognizer | Ensemble, inputs: InputFormat, label_names: Sequence[str], window: int | None = None,
                 chunk: int = 1, layout: Any = None, fps: float | None = None, image: tuple[float, float] = IMAGE) -> None:
        window = inputs.preparation.clip_len if window is None else window
        if chunk < 1 or window < 0:
            raise UserError(f"Expected chunk of at least 1 and window of at least 0. Got {chunk} and {window}.")
        members = model.members if isinstance(model, Ensemble) else [model]
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.gives_probabilities, self._options = isinstance(model, Ensemble), (layout, fps, image)
        self.inputs, self.label_names, self.window, self.chunk, self.image = inputs, tuple(label_names), window, chunk, image
        self._networks = [StreamNetwork(member, window or None) for member in members]  # type: ignore[arg-type]
        self._means = [SlidingMean(max(1, window // net.stride) if window else None) for net in self._networks]
        self._order, self._ratio = inputs.order(layout), inputs.ratio(fps)
        self.lag = max(net.delay for net in self._networks)
        self.delay = self.lag + int(CausalPreparation(inputs.preparation, inputs.flat).late)
        self.reset()

    @classmethod
    def load(cls, path: str | Path, window: int | None = None, chunk: int = 1, layout: Any = None, fps: float | None = None,
             image: tuple[float, float] = IMAGE, missing: str | None = None) -> StreamPredictor:
        """From a checkpoint or a work directory, see ``Predictor.load``."""
        model, inputs, names = open_network(path, missing=missing)
        return cls(model, inputs, names, window, chunk, layout, fps, image)

    def reset(self) -> None:
        self._causal = CausalPreparation(self.inputs.preparation, self.inputs.flat, self.image)
        self._resampler = Resampler(self._ratio)
        self._waiting: list[np.ndarray] = []
        self._logits: list[Tensor | None] = [None] * len(self._networks)
        self._last: Prediction | None = None
        for network, mean in zip(self._networks, self._means, strict=True):
            network.reset()
            mean.reset()

    def again(self, window: int, chunk: int) -> StreamPredictor:
        """A new stream of the same network and kind of frames."""
        return StreamPredictor(self.model, self.inputs, self.label_names, window, chunk, *self._options)

    def features(self, keypoint: ArrayLike, score: ArrayLike | None = None) -> np.ndarray:
        """What the network gets for the frames of (M, T, V, C) or (T, V, C), prepared as a stream: (num_person, T', V, C)."""
        causal, resampler = CausalPreparation(self.inputs.preparation, self.inputs.flat, self.image), Resampler(self._ratio)
        value, scores = np.asarray(keypoint), None if score is None else np.asarray(score)
        made = [causal.push(*self._frames(resampler, value[..., t, :, :], None if scores is None else scores[..., t, :]))
                for t in range(value.shape[-3])]
        return np.concatenate([*made, causal.finish()], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of frames that are kept; they stop growing when the window is full."""
        return sum(part.nbytes for net in self._networks for part in net.held()) + sum(mean.nbytes for mean in self._means)

    def push(self, frame: ArrayLike, score: ArrayLike | None = None) -> Prediction | None:
        return self.advance(self._causal.push(*self._frames(self._resampler, frame, score)))

    def _frames(self, resampler: Resampler, frame: ArrayLike, score: ArrayLike | None) -> tuple[np.ndarray, np.ndarray | None]:
        """What a frame completes at the rate of the training: keypoint (M, T, V, C), score (M, T, V) or None."""
        keypoint, confidence = as_sequence(self.inputs, frame, score, self._order)
        if not self.inputs.flat:
            return resampler.push(keypoint), None
        keypoint = resampler.push(with_score(keypoint, confidence))  # frames with and without scores may alternate
        return keypoint[..., :2], keypoint[..., 2]

    def finish(self) -> Prediction | None:
        return self.advance(self._causal.finish(), end=True)

    @torch.inference_mode()
    def advance(self, features: np.ndarray, end: bool = False) -> Prediction | None:
        """The latest prediction after prepared frames (num_person, T, V, C), see ``features``; T may be 0."""
        self._waiting.append(features)
        if sum(part.shape[1] for part in self._waiting) < (0 if end else self.chunk):
            return self._last
        x = torch.from_numpy(np.concatenate(self._waiting, axis=1))
        self._waiting, new = [], False
        for index, (network, mean) in enumerate(zip(self._networks, self._means, strict=True)):
            made = network.push(x, end)
            if len(made):
                self._logits[index], new = network.head(mean.push(made[None])), True
        logits = [logit for logit in self._logits if logit is not None]
        if new and len(logits) == len(self._networks):
            self._last = Prediction(numbers(mean_probability(logits)[0].numpy()), self.label_names)
        return self._last
