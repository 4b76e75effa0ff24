"""optimize(): the fused inference runtime. One person's clip passes through the whole network inside one core's cache."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..kernels import _native
from ..recognizer import Recognizer
from .choice import ENGINES
from .recognizer import PROGRAMS, FusedRecognizer

__all__ = ["FusedRecognizer", "optimize"]


def optimize(model: Recognizer, example: Tensor | None = None, engine: str = "fastest") -> nn.Module:
    """A network for inference with the same call signature as the model: keypoint (N, M, T, V, C) -> logits.

    Batch norm is folded into the live weights; graph and temporal convolutions run with bias, residual and ReLU at the store,
    one person per task; persons that are entirely zero are computed once. Weights are packed once per clip length (at the
    first call, or here with ``example``); later calls allocate their output only. Exact up to float32 rounding.

    No level is slower than the dense network: above a density of 0.5 the first call for a clip length times the program and
    torch's dense network, batch norms folded, and keeps the faster one; ``optimize(model).choice`` says which. ``engine``
    "fused", "torch" or "torch channels_last" decides without measuring.

    Networks without a fused program, other devices and other dtypes run as they are, in eval mode.

    Raises:
        TypeError: model is not a Recognizer.
        ValueError: no such engine.
    """
    if engine not in ("fastest", *ENGINES):
        raise ValueError(f"Expected engine to be one of fastest, {', '.join(ENGINES)}. Got {engine!r}.")
    if not isinstance(model, Recognizer):
        raise TypeError(f"Expected model to be a Recognizer, as create_model gives. Got {type(model).__name__}.")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = next(model.parameters())
    if _native.module is None or type(model.backbone) not in PROGRAMS or parameter.device.type != "cpu" \
            or parameter.dtype != torch.float32:
        return model
    fused = FusedRecognizer(model, engine)
    if example is not None:
        fused(example)
    return fused
