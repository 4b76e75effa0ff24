"""Accuracy of scores (N, classes) against labels (N,): exact, in NumPy."""
from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UserError

__all__ = ["confusion_matrix", "expected_calibration_error", "mean_class_accuracy", "summary", "top_k_accuracy"]


def top_k_accuracy(scores: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Fraction of samples whose label is among the k classes of highest score.

    A label's rank is the number of classes with a higher score, plus the number of classes of equal score and
    lower index, so that a network that gives every class the same score does not get everything right. k
    above the number of classes counts as that number.

    Args:
        scores: (N, classes), any monotone scores: logits or probabilities.
        labels: (N,) integers in [0, classes).

    Example:
        >>> top_k_accuracy([[0.1, 0.9], [0.8, 0.2]], [1, 1])
        0.5

    Raises:
        ValueError: wrong shapes, N = 0, a label out of range, or k < 1.
        UserError: a score that is NaN, which is no fault of the caller's but of the network or its input.
    """
    scores, labels = _checked(scores, labels)
    if k < 1:
        raise ValueError(f"Expected k >= 1. Got {k}.")
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(1)
    return float((rank < k).mean())


def confusion_matrix(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Counts (classes, classes): [i, j] = samples of class i whose best class is j (the lowest on ties)."""
    scores, labels = _checked(scores, labels)
    classes = scores.shape[1]
    return np.bincount(labels * classes + scores.argmax(1), minlength=classes * classes).reshape(classes,
                                                                                                 classes)


def mean_class_accuracy(scores: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes that occur in ``labels`` of the recall of each (the headline figure of FineGYM).

    PYSKL (core/evaluation.py) also counts a class that is only predicted, with recall 0; where every class
    has a test sample, the two are the same.
    """
    counts = confusion_matrix(scores, labels)
    total = counts.sum(1)
    present = total > 0
    return float((counts.diagonal()[present] / total[present]).mean())


def expected_calibration_error(probability: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """ECE = sum over bins b of n_b / N * |accuracy_b - confidence_b| (Guo et al. 2017, Eq. 3).

    The confidence of a sample is its largest probability; bin b of B holds confidences in (b / B, (b + 1) / B].

    Args:
        probability: (N, classes), rows that sum to 1.
        bins: number of equal bins of [0, 1].

    Raises:
        ValueError: like :func:`top_k_accuracy`, or bins < 1.
    """
    probability, labels = _checked(probability, labels)
    if bins < 1:
        raise ValueError(f"Expected bins >= 1. Got {bins}.")
    confidence, right = probability.max(1).astype(np.float64), probability.argmax(1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=right - confidence, minlength=bins)  # n_b * (accuracy_b - confidence_b)
    return float(np.abs(gap).sum() / len(labels))


def summary(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """``top1``, ``top5`` and ``mean_class`` as fractions."""
    return {"top1": top_k_accuracy(scores, labels, 1), "top5": top_k_accuracy(scores, labels, 5),
            "mean_class": mean_class_accuracy(scores, labels)}


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"Expected scores (N, classes) and labels (N,). Got {scores.shape} and "
                         f"{labels.shape}.")
    if not len(labels):
        raise ValueError("Expected at least one sample. Got none; check the split.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"Expected integer labels in [0, {scores.shape[1]}). Got {labels.dtype} in "
                         f"[{labels.min()}, {labels.max()}].")
    bad = np.isnan(scores).any(1)
    if bad.any():
        raise UserError(f"Expected scores without NaN. Got NaN for {bad.sum()} of {len(bad)} samples; the network's weights or "
                        "its input are broken: check the data, or train again with a lower --lr.")
    return scores, labels.astype(np.int64)
