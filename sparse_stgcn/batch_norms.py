"""Batch norms with what follows them, in training mode as one pass with the running statistics of ``nn.BatchNorm2d``."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import norm
from .kernels.dispatch import runs_natively, widened, widened_dtype

__all__ = ["join_parameters", "norm_fuses", "normalise", "track", "track_all"]


def normalise(bns: nn.Module | Sequence[nn.Module], xs: Tensor | Sequence[Tensor], residual: Tensor | None = None,
              relu: bool = False, relu_before: bool = False, elsewhere: bool = False) -> Tensor:
    """relu(cat(bn_i(x_i)) + residual): batch norms, residual and ReLU of a unit, (N, C_i, T, V) -> (N, sum C_i, T, V).

    With ``relu_before`` there is also a ReLU between norm and residual. ``elsewhere``: see ``kernels.norm``.

    In training mode on a CPU it is one pass, see ``kernels.norm``, with the running statistics of ``nn.BatchNorm2d``;
    elsewhere PyTorch's own layers run one after the other.
    """
    norms = [bns] if isinstance(bns, nn.Module) else list(bns)
    tensors = [xs] if isinstance(xs, Tensor) else list(xs)
    if all(norm_fuses(bn, x) for bn, x in zip(norms, tensors, strict=True)) and len({bn.eps for bn in norms}) == 1:
        return _fused(norms, tensors, residual, relu, relu_before, elsewhere)  # type: ignore[arg-type]
    parts = [bn(x) for bn, x in zip(norms, tensors, strict=True)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    y = F.relu(y) if relu_before else y
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def norm_fuses(bn: nn.Module, x: Tensor) -> bool:
    """Whether ``kernels.norm`` can stand for ``bn`` on x."""
    weight = bn.weight if type(bn) is nn.BatchNorm2d else None
    if weight is None or not (bn.training or bn.running_mean is None) or x.numel() < 2 * x.shape[1]:
        return False
    if not x.is_cpu and torch.is_autocast_enabled(x.device.type):
        return False
    return weight.dtype == (dtype := widened_dtype(x)) and runs_natively("norm", x, dtype)


def _fused(norms: list[nn.BatchNorm2d], xs: list[Tensor], residual: Tensor | None, relu: bool,
           relu_before: bool, elsewhere: bool) -> Tensor:
    xs, residual = [widened(x) for x in xs], None if residual is None else widened(residual)
    y, mean, variance = norm(xs, *join_parameters(norms), norms[0].eps, residual, relu, relu_before, elsewhere)
    track_all(norms, mean, variance)
    return y


def join_parameters(norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
    join = lambda tensors: tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return join([bn.weight for bn in norms]), join([bn.bias for bn in norms])


def track_all(norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor) -> None:
    widths = [bn.num_features for bn in norms]
    for bn, batch_mean, batch_variance in zip(norms, mean.split(widths), variance.split(widths), strict=True):
        track(bn, batch_mean, batch_variance)


def track(bn: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Takes the mean and the unbiased variance of a batch into the running statistics, as ``nn.BatchNorm2d`` does."""
    if bn.running_mean is None:
        return
    batches: Any = bn.num_batches_tracked
    with torch.no_grad():
        batches.add_(1)
        momentum = 1 / int(batches) if bn.momentum is None else bn.momentum
        bn.running_mean.lerp_(mean, momentum)
        bn.running_var.lerp_(variance, momentum)
