"""max_pool: max-pooling over 3 frames that stores nothing. Definition: reference_units.py; native: csrc/cpu/pool.inl."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference_units
from ._library import LIBRARY, check_plane, implement
from ._memory import empty
from ._native import one_run, plane
from .dispatch import backend_for
from .split import memory, place_of

__all__ = ["max_pool"]


def max_pool(x: Tensor, stride: int = 1) -> Tensor:
    """y[n,c,t,v] = max of x[n,c,u,v] over the frames u = t*stride - 1, t*stride, t*stride + 1 that exist.

    Args:
        x: (N, C, T, V), any strides.
        stride: over frames.

    Returns:
        (N, C, ceil(T / stride), V), contiguous.

    Stored for the backward pass: x, in which the frames that won are found again. The first of equal frames wins, and a NaN
    is never passed over, as in torch.

    Raises:
        ValueError: x has another number of dimensions, no frame or no joint, or stride is below 1.
    """
    if x.dim() != 4:
        raise ValueError(f"Expected x of shape (N, C, T, V). Got {tuple(x.shape)}.")
    check_plane(x=x)
    if stride < 1:
        raise ValueError(f"Expected stride of at least 1. Got {stride}.")
    if backend_for("max_pool", x.device, x.dtype) == "reference":
        return reference_units.max_pool(x, stride)
    return _MaxPool.apply(x, stride)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stride, ctx.place = stride, place_of(x)
        return torch.ops.sparse_stgcn.max_pool(x, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, = ctx.saved_tensors
        dx = memory(x, ctx.place)
        torch.ops.sparse_stgcn.max_pool_backward(dy, x, ctx.stride, dx)
        return dx, None


LIBRARY.define("max_pool(Tensor x, int stride) -> Tensor")
LIBRARY.define("max_pool_backward(Tensor dy, Tensor x, int stride, Tensor(a!) dx) -> ()")


def _fake_forward(x: Tensor, stride: int) -> Tensor:
    return empty(x, (*x.shape[:2], (x.shape[2] - 1) // stride + 1, x.shape[3]))


@implement("max_pool", _fake_forward)
def _forward(x: Tensor, stride: int) -> Tensor:
    y, x = _fake_forward(x, stride), one_run(x)
    planes = [plane(tensor) for tensor in (x, y)]
    _native.module.pool_forward(x.dtype == torch.float64, [*x.shape, stride], [address for address, _ in planes],
                                [strides for _, strides in planes], torch.get_num_threads())
    return y


def _fake_backward(dy: Tensor, x: Tensor, stride: int, dx: Tensor) -> None:
    return None


@implement("max_pool_backward", _fake_backward)
def _backward(dy: Tensor, x: Tensor, stride: int, dx: Tensor) -> None:
    x, dy = one_run(x), one_run(dy)
    planes = [plane(tensor) for tensor in (x, dy, dx)]
    _native.module.pool_backward(x.dtype == torch.float64, [*x.shape, stride], [address for address, _ in planes],
                                 [strides for _, strides in planes], torch.get_num_threads())
