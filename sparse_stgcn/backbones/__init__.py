"""The backbones by name."""
from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..recognizer import Recognizer
from ..skeleton import Skeleton, layouts
from .aagcn import AAGCN
from .base import Backbone
from .ctrgcn import CTRGCN
from .dgstgcn import DGSTGCN
from .stgcn import STGCN

__all__ = ["AAGCN", "BACKBONES", "CTRGCN", "DGSTGCN", "STGCN", "Backbone", "create_model"]

BACKBONES: dict[str, type[Backbone]] = {"stgcn": STGCN, "aagcn": AAGCN, "ctrgcn": CTRGCN, "dgstgcn": DGSTGCN}

_COUNTS = ("base_channels", "num_person", "num_subsets")


def create_model(name: str, num_classes: int, layout: Skeleton | str | Path | Mapping[str, Any] = "nturgb+d",
                 in_channels: int = 3, dropout: float = 0.0, **kwargs: Any) -> Recognizer:
    """A dense network with PYSKL's architecture, initialisation and state-dict keys.

    Args:
        name: ``stgcn``, ``aagcn``, ``ctrgcn`` or ``dgstgcn``.
        num_classes: number of logits.
        layout: a ``Skeleton``, the name of a layout, a YAML/JSON file or a mapping, see ``Skeleton.load``.
        in_channels: C of the input (N, M, T, V, C).
        dropout: before the classifier.
        kwargs: arguments of the backbone class, such as ``attention`` (aagcn), ``num_person`` (aagcn,
            ctrgcn), ``base_channels``.

    Example:
        >>> import torch
        >>> model = create_model("stgcn", num_classes=60)
        >>> sum(parameter.numel() for parameter in model.parameters())
        3098832
        >>> model(torch.randn(2, 1, 16, 25, 3)).shape
        torch.Size([2, 60])

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    if name not in BACKBONES:
        raise ValueError(f"Expected name to be one of {', '.join(BACKBONES)}. Got {name!r}.")
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {argument} to be a whole number of at least 1. Got {value!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected dropout to be at least 0 and below 1. Got {dropout}.")
    backbone = BACKBONES[name]
    allowed = [
        key for key in inspect.signature(backbone).parameters if key not in ("skeleton", "in_channels")
    ]
    unknown = [key for key in kwargs if key not in allowed]
    if unknown:
        raise ValueError(f"Expected arguments of {name} among {', '.join(allowed)}. Got {unknown[0]!r}.")
    for argument, value in kwargs.items():
        if argument in _COUNTS and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"Expected {argument} to be a whole number of at least 1. Got {value!r}.")
    if not kwargs.get("ratio", 1) > 0:
        raise ValueError(f"Expected ratio above 0. Got {kwargs['ratio']!r}.")
    skeleton = Skeleton.load(layout)
    config = {
        "name": name, "num_classes": num_classes, "in_channels": in_channels,
        "layout": layout if isinstance(layout, str) and layout in layouts() else skeleton.to_dict(),
        "kwargs": {**({"dropout": dropout} if dropout else {}), **kwargs},
    }
    try:
        network = backbone(skeleton, in_channels, **kwargs)
    except ZeroDivisionError as error:  # a width divided by the number of its branches, or of its embeddings
        times = f" (and ratio {kwargs['ratio']}, by which it is multiplied)" if "ratio" in kwargs else ""
        raise ValueError(f"Expected base_channels that the branches of {name} can share. Got {kwargs.get('base_channels', 64)}"
                         f"{times}; choose a multiple of 16{', or a larger ratio' if times else ''}.") from error
    return Recognizer(network, num_classes, dropout, config)
