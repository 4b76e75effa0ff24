"""Predictor: from the file of a network and an array of joints to names and probabilities."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .checkpoint import load, read_metadata
from .data.preparation import IMAGE
from .errors import UserError
from .inputs import InputFormat, checkpoint_file, label_names_of
from .recognizer import Ensemble, Recognizer
from .runtime import optimize

__all__ = ["Prediction", "Predictor", "open_network"]


@dataclass(frozen=True)
class Prediction:
    """What a network says about one sequence.

    Attributes:
        probability: (classes,) float32, sums to 1.
        label_names: one name per class.
    """

    probability: NDArray[np.float32]
    label_names: tuple[str, ...]

    @property
    def label(self) -> int:
        """The most probable class, the first of equals."""
        return int(self.probability.argmax())

    @property
    def name(self) -> str:
        """Its name."""
        return self.label_names[self.label]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """(name, probability) of the k most probable classes, best first; all of them if there are fewer.

        Raises:
            ValueError: k < 1.
        """
        if k < 1:
            raise ValueError(f"Expected k >= 1. Got {k}.")
        order = np.argsort(-self.probability, kind="stable")[:k]
        return [(self.label_names[i], float(self.probability[i])) for i in order]

    def __str__(self) -> str:
        return ", ".join(f"{name} {p:.1%}" for name, p in self.top(3))


class Predictor:
    """A trained network, or an ensemble, ready for arrays of joints; it answers what ``evaluate`` answers.

    p[c] = mean over the clips of softmax(logits)[c], of an ensemble also over its members, as in the training's own test: same
    normalisation, same stream, same frames. It runs on what ``optimize`` makes of the network.

        predictor = Predictor.load("runs/j95")
        for name, probability in predictor(keypoint, layout="nturgb+d", fps=30).top(3):
            print(name, probability)

    Args:
        model: a Recognizer or an Ensemble.
        inputs: the input that it was trained on.
        label_names: one name per class.
        batch_size: clips per forward pass.

    Attributes:
        inputs, label_names: as given.
    """

    def __init__(self, model: Recognizer | Ensemble, inputs: InputFormat, label_names: Sequence[str], batch_size: int = 32
                 ) -> None:
        if batch_size < 1:
            raise UserError(f"Expected batch_size of at least 1. Got {batch_size}.")
        classes = (model.members[0] if isinstance(model, Ensemble) else model).cls_head.fc_cls.out_features  # type: ignore[union-attr]
        if len(label_names) != classes:
            raise UserError(f"Expected label_names for {classes} classes. Got {len(label_names)}.")
        self.inputs, self.label_names, self.batch_size = inputs, tuple(label_names), batch_size
        self._gives_probabilities = isinstance(model, Ensemble)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._network = optimize(model)
        self._keep_clips()

    def _keep_clips(self) -> None:
        self._clips = lru_cache(maxsize=256)(self._distinct_clips)  # by the length of a sequence

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_clips"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep_clips()

    @classmethod
    def load(cls, path: str | Path, clips: int | None = None, missing: str | None = None, device: str | torch.device = "cpu",
             batch_size: int = 32) -> Predictor:
        """From a checkpoint of ``train``, ``ensemble`` or ``lottery``, or from a work directory with one.

        Args:
            path: the file.
            clips: clips per sequence; default: as many as in the training's test. One is the fastest.
            missing: what to do about lost joints (keep, interpolate, zero, drop); default: what training did.
            device: where the network runs.
            batch_size: clips per forward pass.

        Raises:
            UserError: no such file, not a checkpoint, or one that does not say what its input is.
        """
        model, inputs, names = open_network(path, clips, missing, device)
        return cls(model, inputs, names, batch_size)

    def __call__(self, keypoint: ArrayLike, layout: Any = None, fps: float | None = None, score: ArrayLike | None = None,
                 image: tuple[float, float] = IMAGE) -> Prediction:
        """The prediction for one sequence of any length.

        Args:
            keypoint: (M, T, V, C) or (T, V, C), any number of persons M; NaN is a lost joint, zeros an absent person. C is 3,
                or for a 2D network 2, or 3 with the confidence as the third.
            layout: which joints these are: a name, a file or a Skeleton; they are matched by name. Default: the network's own.
            fps: frames per second; frames are interpolated to the rate of the training data where the file knows it.
            score: (M, T, V) or (T, V), confidence of 2D joints.
            image: height and width of the image in pixels, for 2D.

        Raises:
            UserError: the array does not fit, or nobody is seen in it.
        """
        return self.predict_features([self.inputs.features(keypoint, layout, fps, score, image)])[0]

    def batch(self, keypoints: Sequence[ArrayLike], layout: Any = None, fps: float | None = None,
              scores: Sequence[ArrayLike | None] | None = None, image: tuple[float, float] = IMAGE) -> list[Prediction]:
        """The predictions for sequences of one layout and frame rate, which share forward passes; each is what a call of its
        own gives.

        Raises:
            UserError: as in a call, with the position of the array.
        """
        if scores is not None and len(scores) != len(keypoints):
            raise UserError(f"Expected scores for {len(keypoints)} sequences. Got {len(scores)}.")
        features = []
        for index, (keypoint, score) in enumerate(zip(keypoints, scores or [None] * len(keypoints), strict=True)):
            try:
                features.append(self.inputs.features(keypoint, layout, fps, score, image))
            except UserError as error:
                raise UserError(f"sequence {index}: {error}") from error
        return self.predict_features(features)

    @torch.inference_mode()
    def predict_features(self, features: Sequence[NDArray[np.float32]]) -> list[Prediction]:
        """The predictions for sequences as ``inputs.features`` makes them.

        Raises:
            UserError: a probability is no number, because the network has weights that are none, or joints are out of range.
        """
        chosen = [self._clips(sequence.shape[1]) for sequence in features]
        answers = iter(self._run([(sequence, frames) for sequence, (distinct, _) in zip(features, chosen, strict=True)
                                  for frames in distinct]))
        predictions = []
        for distinct, which in chosen:
            answer = torch.stack([next(answers) for _ in distinct])[which]
            clips = answer if self._gives_probabilities else answer.softmax(1)
            predictions.append(Prediction(numbers(clips.mean(0).numpy()), self.label_names))
        return predictions

    def _distinct_clips(self, num_frames: int) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Frames (distinct clips, L) of the test clips, and which of them each clip is: those of a sequence as long as a clip
        are all the same, and run once."""
        distinct, which = np.unique(self.inputs.preparation.test_frames(num_frames), axis=0, return_inverse=True)
        return distinct, torch.from_numpy(which.reshape(-1))

    def _run(self, clips: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]]) -> list[torch.Tensor]:
        """What the network says about the frames of each sequence, in forward passes of at most ``batch_size``."""
        answers: list[torch.Tensor] = []
        for first in range(0, len(clips), self.batch_size):
            made = [self.inputs.preparation.clips(sequence, frames[None]) for sequence, frames in
                    clips[first:first + self.batch_size]]
            x = torch.from_numpy(made[0] if len(made) == 1 else np.concatenate(made)).to(self._device, self._dtype)
            answers += self._network(x).float().cpu().unbind(0)
        return answers


def numbers(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same. Raises UserError: one of them is NaN, and so no answer."""
    if not np.isfinite(probability).all():
        raise UserError("Expected the network to answer with numbers. Got NaN: joints are infinite or too large for float32, "
                        "or the network's weights are not finite (a training that diverged).")
    return probability


def open_network(path: str | Path, clips: int | None = None, missing: str | None = None, device: str | torch.device = "cpu"
                 ) -> tuple[Recognizer | Ensemble, InputFormat, tuple[str, ...]]:
    """The network of a checkpoint, the input that it was trained on, and the names of its classes.

    Raises:
        UserError: like ``Predictor.load``.
    """
    file = checkpoint_file(path)
    try:
        meta, model = read_metadata(file)["meta"], load(file, device)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(str(error)) from error
    return model, InputFormat.of(model, meta, clips, missing), label_names_of(model, meta)
