"""Scores: what a network says about each sample of a split, and the file that holds it."""
from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .checkpoint import write_atomically
from .data.storage import read_npz
from .metrics import summary

__all__ = ["Scores", "accuracy", "joined", "predict", "predict_all"]


@dataclass(frozen=True)
class Scores:
    """Scores of N samples.

    Attributes:
        sample: (N,) text, the id of each sample, unique.
        label: (N,) int64, 0-based class.
        probability: (N, classes) float32, softmax of each clip, then the mean over the clips.
        logit: (N, classes) float32, mean over the clips.
        protocol: how they came about: data set, split, stream, clips, clip length ...
    """

    sample: NDArray[np.str_]
    label: NDArray[np.int64]
    probability: NDArray[np.float32]
    logit: NDArray[np.float32]
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """top1, top5 and mean_class of the probabilities, as fractions."""
        return summary(self.probability, self.label)

    def save(self, path: str | Path) -> None:
        """Write a compressed ``.npz`` with the attributes as keys; ``protocol`` is JSON text."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, sample=self.sample, label=self.label, probability=self.probability,
                            logit=self.logit, protocol=np.array(json.dumps(dict(self.protocol))))
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file written by :meth:`save`.

        Raises:
            ValueError: not such a file, or arrays that do not fit together.
            OSError: the file cannot be read.
        """
        try:
            content = read_npz(Path(path))
            protocol = json.loads(str(content["protocol"]))
            scores = cls(content["sample"], content["label"], content["probability"], content["logit"], protocol)
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"Expected {path} to be a score file written by evaluate. "
                             f"Got: {str(error).rstrip('.')}.") from error
        kinds = [array.dtype.kind for array in (scores.sample, scores.label, scores.probability, scores.logit)]
        if kinds != ["U", "i", "f", "f"] or not isinstance(protocol, dict):
            raise ValueError(f"Expected {path} to hold sample as text, label as integers, probability and logit as floats, "
                             f"and protocol as a JSON object. Got arrays of the kinds {', '.join(kinds)} and a "
                             f"{type(protocol).__name__}.")
        if scores.probability.ndim != 2 or scores.logit.shape != scores.probability.shape \
                or not scores.label.shape == scores.sample.shape == scores.probability.shape[:1]:
            raise ValueError(f"Expected {path} to hold sample (N,), label (N,), probability and logit (N, "
                             f"classes). Got {scores.sample.shape}, {scores.label.shape}, "
                             f"{scores.probability.shape} and {scores.logit.shape}.")
        return scores


def predict(model: nn.Module, dataset: Dataset, sample: Sequence[str] | NDArray[np.str_] | None = None,
            batch_size: int = 32, workers: int = 0, protocol: Mapping[str, Any] | None = None) -> Scores:
    """Scores of every item of ``dataset``, in evaluation mode; the model's mode is restored.

    Args:
        dataset: gives (keypoint, label, index) with keypoint (M, T, V, C) or (clips, M, T, V, C).
        sample: the id of each index; its number by default.
        batch_size: clips per forward pass, at least.
    """
    return predict_all([model], dataset, sample, batch_size, workers, [protocol or {}])[0]


@torch.no_grad()
def predict_all(models: Sequence[nn.Module], dataset: Dataset, sample: Sequence[str] | NDArray[np.str_] | None = None,
                batch_size: int = 32, workers: int = 0,
                protocols: Sequence[Mapping[str, Any]] | None = None) -> list[Scores]:
    """:func:`predict` for several models on one device, whose input is prepared once."""
    device = next(models[0].parameters()).device
    clips = dataset[0][0].shape[0] if dataset[0][0].ndim == 5 else 1
    # With a generator of its own the loader leaves torch's random state as it is: a test changes no training.
    loader = DataLoader(dataset, batch_size=max(1, batch_size // clips), num_workers=workers, generator=torch.Generator())
    training, labels, indices = [model.training for model in models], [], []
    logits: list[list[torch.Tensor]] = [[] for _ in models]
    for model in models:
        model.eval()
    try:
        for keypoint, label, index in loader:
            flat = keypoint.to(device).reshape(-1, *keypoint.shape[-4:])
            for model, collected in zip(models, logits, strict=True):
                collected.append(model(flat).float().cpu().reshape(len(label), clips, -1))
            labels.append(label)
            indices.append(index)
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
    index = torch.cat(indices).numpy()
    names = np.array([str(i) if sample is None else str(sample[i]) for i in index])
    return [Scores(names, torch.cat(labels).numpy().astype(np.int64), logit.softmax(2).mean(1).numpy(),
                   logit.mean(1).numpy(), dict(protocol))
            for logit, protocol in zip(map(torch.cat, logits), protocols or [{}] * len(models), strict=True)]


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of the samples of all parts, one part after another, with the protocol of the first."""
    join = lambda name: np.concatenate([getattr(part, name) for part in parts])
    return Scores(join("sample"), join("label"), join("probability"), join("logit"), dict(parts[0].protocol))


def accuracy(model: nn.Module, dataset: Dataset, batch_size: int = 32, workers: int = 0) -> float:
    """Top-1 accuracy over ``dataset``, as a fraction."""
    return predict(model, dataset, batch_size=batch_size, workers=workers).metrics()["top1"]
