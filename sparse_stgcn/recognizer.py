"""Recognizer: backbone and head, from a batch of skeleton sequences to logits. Ensemble: the mean of several."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .skeleton import Skeleton

if TYPE_CHECKING:
    from .backbones.base import Backbone
    from .pattern_coding import Recipe

__all__ = ["Ensemble", "Head", "Recognizer", "mean_probability"]


class Head(nn.Module):
    """Mean over frames, joints and persons, dropout, linear: (N, M, C, T, V) -> (N, num_classes).

    Persons that are padded with zeros count in the mean, as in PYSKL's ``GCNHead``.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc_cls = nn.Linear(in_channels, num_classes)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, features: Tensor) -> Tensor:
        pooled = F.dropout(features.mean((1, 3, 4)), self.dropout, self.training)
        return self.fc_cls(pooled)


class Recognizer(nn.Module):
    """A backbone and a classifier; built by ``create_model``.

    Attributes:
        config: plain values from which ``Recognizer.from_config`` builds an equal network: name, num_classes,
            layout (a name or ``Skeleton.to_dict``), in_channels, kwargs.
        mask_recipe: what ``sparsify`` drew the patterns with, where it needs a seed alone; None where it is not known.
    """

    mask_recipe: Recipe | None = None

    def __init__(self, backbone: Backbone, num_classes: int, dropout: float = 0.0,
                 config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.cls_head = Head(backbone.out_channels, num_classes, dropout)
        self.config = config or {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recognizer:
        """A new network, dense and freshly initialised, from the ``config`` of another one."""
        from .backbones import create_model

        Skeleton.stored(config["layout"], "the network's configuration")  # the configuration may be a stranger's
        return create_model(config["name"], config["num_classes"], config["layout"], config["in_channels"],
                            **config["kwargs"])

    @property
    def num_classes(self) -> int:
        return self.cls_head.fc_cls.out_features

    def forward(self, keypoint: Tensor) -> Tensor:
        """keypoint (N, M, T, V, C) float -> logits (N, num_classes)."""
        return self.cls_head(self.backbone(keypoint))


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
