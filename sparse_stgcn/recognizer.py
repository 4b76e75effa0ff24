"""Recognizer: backbone and head, from a batch of skeleton sequences to logits."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .backbones.base import Backbone

__all__ = ["Head", "Recognizer"]


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
    """

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

        return create_model(config["name"], config["num_classes"], config["layout"], config["in_channels"],
                            **config["kwargs"])

    @property
    def num_classes(self) -> int:
        return self.cls_head.fc_cls.out_features

    def forward(self, keypoint: Tensor) -> Tensor:
        """keypoint (N, M, T, V, C) float -> logits (N, num_classes)."""
        return self.cls_head(self.backbone(keypoint))
