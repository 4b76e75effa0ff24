"""optimize(): the fused inference runtime. One person's clip passes through the whole network inside one core's cache."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..kernels import _native
from ..layers import unwatched
from ..recognizer import Ensemble, Recognizer
from .choice import ENGINES
from .recognizer import PROGRAMS, FusedEnsemble, FusedRecognizer

__all__ = ["FusedEnsemble", "FusedRecognizer", "optimize"]


def optimize(model: Recognizer | Ensemble, example: Tensor | None = None, engine: str = "fastest") -> nn.Module:
    """A network for inference with the same call signature as the model: keypoint (N, M, T, V, C) -> logits.

    Batch norm is folded into the live weights; graph and temporal convolutions run with bias, residual and ReLU at the store,
    one person per task, or one person on all threads where there are fewer persons than threads; persons that are entirely
    zero cost a copy. Weights are packed once per clip length (at the first call, or here with ``example``); later calls
    allocate pooled features and logits only. Exact up to float32 rounding; what the fused program gives is bit-equal
    whatever the batch and the threads. A NaN or an infinity among the joints or the weights gives NaN, as in the network.

    Of an Ensemble all members run as one call, which looks for absent persons once and spreads the persons of all members
    over the threads; the result is its probabilities.

    Where another way can be faster, the first call for a clip length times each on that batch and keeps the fastest one;
    ``optimize(model).choice`` says which: above a density of 0.5 torch's dense network, batch norms folded where they follow
    a convolution; where layers of more than a quarter of their weights have blocks of fewer than 8 outputs, those layers in
    the (8, 1) blocks that cover theirs, "fused in 8x1". Else nothing is measured. ``engine`` "fused", "fused in 8x1", "torch"
    or "torch channels_last" decides without measuring.

    Networks without a fused program, other devices and other dtypes run as they are, in eval mode.

    Example:
        >>> import torch
        >>> from sparse_stgcn import compact, create_model, sparsify
        >>> model = compact(sparsify(create_model("stgcn", num_classes=60), 0.95)).eval()
        >>> keypoint = torch.randn(1, 2, 16, 25, 3)
        >>> with torch.no_grad():
        ...     torch.allclose(optimize(model)(keypoint), model(keypoint), rtol=1e-3, atol=1e-5)
        True

    Raises:
        TypeError: model is neither a Recognizer nor an Ensemble.
        ValueError: no such engine.
    """
    if engine not in ("fastest", *ENGINES):
        raise ValueError(f"Expected engine to be one of fastest, {', '.join(ENGINES)}. Got {engine!r}.")
    if not isinstance(model, (Recognizer, Ensemble)):
        raise TypeError("Expected model to be a Recognizer, as create_model gives, or an Ensemble. "
                        f"Got {type(model).__name__}.")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    members = model.members if isinstance(model, Ensemble) else [model]
    if not all(_has_program(member) for member in members):
        return model
    fused = FusedEnsemble(model, engine) if isinstance(model, Ensemble) else FusedRecognizer(model, engine)
    if example is not None:
        fused(example)
    return fused


def _has_program(model: nn.Module) -> bool:
    if not all(unwatched(module) for module in model.modules()):
        return False
    parameter = next(model.parameters())
    return _native.module is not None and type(model.backbone) in PROGRAMS and parameter.device.type == "cpu" \
        and parameter.dtype == torch.float32
