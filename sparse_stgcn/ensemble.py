"""Several networks, one answer: the mean of their probabilities."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .recognizer import Recognizer

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Recognizers of the same input and classes, such as the sparsity levels of one backbone.

    p[n, c] = 1 / L sum over members l of softmax(logits_l[n])[c]: the mean of the members' *probabilities*, not of their
    logits. Shapes: keypoint (N, M, T, V, C) -> (N, num_classes), every row sums to 1. ``optimize`` takes an ensemble
    too.

    Args:
        models: at least one Recognizer.

    Raises:
        TypeError: a member is not a Recognizer.
        ValueError: no member, or members that differ in joints, channels, persons or classes.
    """

    def __init__(self, models: Sequence[Recognizer]) -> None:
        super().__init__()
        for model in models:
            if not isinstance(model, Recognizer):
                raise TypeError(f"Expected models to be Recognizers, as create_model gives. Got {type(model).__name__}.")
        if not models:
            raise ValueError("Expected at least one model. Got none.")
        for name, of in (("joints", lambda m: len(m.backbone.skeleton)), ("channels", lambda m: m.backbone.in_channels),
                         ("classes", lambda m: m.num_classes)):
            values = sorted({of(model) for model in models})
            if len(values) > 1:
                raise ValueError(f"Expected models of the same number of {name}. Got {', '.join(map(str, values))}.")
        persons = sorted({model.backbone.num_person for model in models if model.backbone.num_person is not None})
        if len(persons) > 1:
            raise ValueError(f"Expected models of the same number of persons. Got {', '.join(map(str, persons))}.")
        self.members = nn.ModuleList(models)
        self._num_classes = models[0].num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def forward(self, keypoint: Tensor) -> Tensor:
        """keypoint (N, M, T, V, C) float -> probabilities (N, num_classes)."""
        return mean_probability([member(keypoint) for member in self.members])


def mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """Mean over the members of softmax(logits); each (N, num_classes)."""
    return torch.stack([scores.softmax(1) for scores in logits]).mean(0)
