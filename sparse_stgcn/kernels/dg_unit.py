"""DG-STGCN's product with relu(norm(x)), which exists for a channel of a sample at a time. Native: csrc/cpu/dynamic_dg.inl."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, implement
from ._memory import empty
from .dispatch import runs_natively, widened
from .dynamic import addresses, check_dg, dg_aggregate, dg_sizes, like, new, strides
from .norm import norm

__all__ = ["dg_unit"]

_ops = torch.ops.sparse_stgcn


def dg_unit(x: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor,
            eps: float = 1e-5, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``dg_aggregate`` of relu(norm(x)), the norm with the statistics of the batch.

    Args:
        x: (N, K C, T, V), any strides: the channels of one subset after the other.
        weight, bias, eps: of the norm, (K C,) each.
        x1, x2, alpha, beta, A: as in ``dg_aggregate``; x1 and x2 (N, K, C, V).
        read: int32 (K C,), below 0 for channels of y that nobody reads, see ``BlockPattern.inputs_read``: these are 0, and no
            gradient comes from them. None: all are read.

    Returns:
        (N, K C, T, V), contiguous, and mean and unbiased variance of x, (K C,), without gradient.

    Stored for the backward pass: the arguments only.

    Raises:
        ValueError: a shape does not fit, or there are fewer than two values per channel.
        TypeError: weight or bias differ in dtype from x, or read is not int32.
    """
    if x.dim() != 4 or x1.dim() != 4 or x.shape[1] != x1.shape[1] * x1.shape[2]:
        raise ValueError(f"Expected x of shape (N, K C, T, V), x1 and x2 of shape (N, K, C, V). "
                         f"Got {tuple(x.shape)}, {tuple(x1.shape)} and {tuple(x2.shape)}.")
    x = widened(x)
    grouped = x.unflatten(1, x1.shape[1:3])
    check_dg(grouped, x1, x2, alpha, beta, A)
    if tuple(weight.shape) != x.shape[1:2] or tuple(bias.shape) != x.shape[1:2]:
        raise ValueError(f"Expected weight and bias of shape {tuple(x.shape[1:2])}. "
                         f"Got {tuple(weight.shape)} and {tuple(bias.shape)}.")
    if weight.dtype != x.dtype or bias.dtype != x.dtype:
        raise TypeError(f"Expected weight and bias to have the dtype of x, {x.dtype}. Got {weight.dtype} and {bias.dtype}.")
    if read is not None and (read.dtype != torch.int32 or tuple(read.shape) != x.shape[1:2] or not read.is_contiguous()):
        kind = TypeError if read.dtype != torch.int32 else ValueError
        raise kind(f"Expected read to be int32 of shape {tuple(x.shape[1:2])}, contiguous. Got {read.dtype} of shape "
                   f"{tuple(read.shape)}.")
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f"Expected at least two values per channel, to have a variance. Got x of shape {tuple(x.shape)}.")
    if not all(runs_natively(op, x) for op in ("norm", "dg_aggregate")):
        h, mean, variance = norm(x, weight, bias, eps, relu=True)
        y = dg_aggregate(h.unflatten(1, x1.shape[1:3]), x1, x2, alpha, beta, A).flatten(1, 2)
        return y if read is None else y.masked_fill((read < 0)[:, None, None], 0), mean, variance
    y, mean, variance = _DgUnit.apply(x, weight, bias, *like(x, x1, x2, alpha, beta, A), read, eps)
    return y, mean, variance


class _DgUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd, variance = _ops.dg_unit(*arguments)
        ctx.mark_non_differentiable(mean, variance)
        *given, read, _ = arguments
        ctx.save_for_backward(*given, mean, rstd, read)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        return *_ops.dg_unit_backward(dy, *ctx.saved_tensors), None, None


_DG = "Tensor x, Tensor weight, Tensor bias, Tensor x1, Tensor x2, Tensor alpha, Tensor beta, Tensor A"
LIBRARY.define(f"dg_unit({_DG}, Tensor? read, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"dg_unit_backward(Tensor dy, {_DG}, Tensor mean, Tensor rstd, Tensor? read) -> ({', '.join(['Tensor'] * 8)})")


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor,
                  read: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(x, x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@implement("dg_unit", _fake_forward)
def _forward(x: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor,
             read: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd, variance = outputs = _fake_forward(x, weight, bias, x1, x2, alpha, beta, A, read, eps)
    x, weight, bias, A = _native.channels_apart(x), weight.contiguous(), bias.contiguous(), A.contiguous()
    grouped = x.unflatten(1, x1.shape[1:3])
    _native.module.dg_forward(x.dtype == torch.float64, dg_sizes(grouped), addresses(grouped, x1, x2, alpha, beta, A, y),
                              strides(grouped, x1, x2), addresses(weight, bias, mean, rstd, variance),
                              _address(read), eps, torch.get_num_threads())
    return outputs


def _address(read: Tensor | None) -> int:
    return 0 if read is None else read.data_ptr()


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor,
                   A: Tensor, mean: Tensor, rstd: Tensor, read: Tensor | None) -> tuple[Tensor, ...]:
    return new(x, weight, bias, x1, x2, alpha, beta, A)


@implement("dg_unit_backward", _fake_backward)
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor,
              A: Tensor, mean: Tensor, rstd: Tensor, read: Tensor | None) -> tuple[Tensor, ...]:
    dx, dweight, dbias, *rest = gradients = new(x, weight, bias, x1, x2, alpha, beta, A)
    x, weight, bias, A = _native.channels_apart(x), weight.contiguous(), bias.contiguous(), A.contiguous()
    grouped, given = x.unflatten(1, x1.shape[1:3]), dy.unflatten(1, x1.shape[1:3])
    _native.module.dg_backward(x.dtype == torch.float64, dg_sizes(grouped),
                               addresses(grouped, x1, x2, alpha, beta, A, given, dx, *rest), strides(grouped, x1, x2, given),
                               [*addresses(weight, bias, mean, rstd), 0, *addresses(dweight, dbias)], _address(read),
                               torch.get_num_threads())
    return gradients
