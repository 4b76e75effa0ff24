"""Accuracies against counts done by hand and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_stgcn.errors import UserError
from sparse_stgcn.metrics import confusion_matrix, mean_class_accuracy, summary, top_k_accuracy

SCORES = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
LABELS = np.array([0, 2, 2, 1])


def test_by_hand() -> None:
    assert top_k_accuracy(SCORES, LABELS, 1) == 0.5
    assert top_k_accuracy(SCORES, LABELS, 2) == 1.0
    assert confusion_matrix(SCORES, LABELS).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert mean_class_accuracy(SCORES, LABELS) == (1 + 0 + 0.5) / 3
    assert summary(SCORES, LABELS) == {"top1": 0.5, "top5": 1.0, "mean_class": 0.5}


def test_absent_class_does_not_count() -> None:
    assert mean_class_accuracy(SCORES[:1], LABELS[:1]) == 1.0


def test_equal_scores_are_not_all_right() -> None:
    assert top_k_accuracy(np.zeros((10, 10)), np.arange(10), 1) == 0.1
    assert top_k_accuracy(np.zeros((10, 10)), np.arange(10), 5) == 0.5


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 9))
def test_top_k_is_membership_in_the_k_best(seed: int, classes: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    # Permutations have no ties, so the k best are unique.
    scores = np.stack([rng.permutation(classes) for _ in range(12)])
    labels = rng.integers(0, classes, 12)
    best = np.argsort(-scores, axis=1)[:, :k]
    assert top_k_accuracy(scores, labels,
                          k) == pytest.approx(np.mean([y in row for y,
                                                       row in zip(labels, best, strict=True)]))


@given(st.integers(0, 2**31))
def test_confusion_matrix_counts_every_sample(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.random((20, 4)), rng.integers(0, 4, 20)
    counts = confusion_matrix(scores, labels)
    assert counts.sum(1).tolist() == np.bincount(labels, minlength=4).tolist()
    assert counts.diagonal().sum() == pytest.approx(20 * top_k_accuracy(scores, labels))


@pytest.mark.parametrize(("scores", "labels", "message"), [
    (SCORES[0], LABELS, "scores"), (SCORES, LABELS[:2], "labels"),
    (SCORES[:0], LABELS[:0], "at least one sample"),
    (SCORES, LABELS + 1, "labels in"), (SCORES, LABELS / 1.0, "integer labels"),
    (SCORES * np.nan, LABELS, "NaN"),
], ids=["one row", "lengths", "empty", "out of range", "float labels", "nan"])
def test_refuses(scores: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summary(scores, labels)


def test_scores_without_a_number_are_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="Got NaN for 1 of 4 samples"):
        summary(np.where(np.arange(4)[:, None] == 2, np.nan, SCORES), LABELS)


def test_refuses_k_0() -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        top_k_accuracy(SCORES, LABELS, 0)
