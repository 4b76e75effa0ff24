"""Means over frames and joints, and tensors that several layers read: one sweep each, forward and backward.

Definition: reference_units.py; native: csrc/cpu/means.inl.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference_units
from ._library import LIBRARY, check_plane, implement
from ._memory import empty
from ._native import one_run, plane
from .dispatch import runs_natively
from .elsewhere import stand_in
from .split import memory, place_of, spans

__all__ = ["append_mean", "share", "spread_mean"]

_ops = torch.ops.sparse_stgcn
_MOST = 8  # tensors that are added in one sweep: max_parts of csrc/cpu/table.h


def share(x: Tensor, count: int, mean: bool = False) -> tuple[Tensor, ...]:
    """x for each of ``count`` layers that read it, then, with ``mean``, its mean over frames (N, C, 1, V).

    The same as using x as often, but its gradients are added up in one sweep, where autograd would add them one by one.

    Args:
        x: (N, C, T, V), any strides.
        count: at most 8.

    Returns:
        Aliases of x, which must not be changed in place.

    Raises:
        ValueError: x has another number of dimensions, no frame or no joint, or count is out of range.
    """
    _check(x, count)
    if not runs_natively("share", x):
        return reference_units.share(x, count, mean)
    return _Share.apply(x, count, mean)


def append_mean(x: Tensor, count: int = 1) -> tuple[Tensor, ...]:
    """cat([x, mean of x over joints], 3), for each of ``count`` layers that read it, see ``share``.

    Args:
        x: (N, C, T, V), any strides.
        count: at most 8.

    Returns:
        Aliases of one tensor (N, C, T, V + 1), which must not be changed in place.

    Raises:
        ValueError: x has another number of dimensions, no frame or no joint, or count is out of range.
    """
    _check(x, count)
    if not runs_natively("append_mean", x):
        return reference_units.append_mean(x, count)
    parts = _AppendMean.apply(x, count)
    stand_in(x, parts[0][..., :-1])
    return parts


def spread_mean(xs: Sequence[Tensor], coef: Tensor) -> Tensor:
    """y[n,c,t,v] = x[n,c,t,v] + x[n,c,t,V] coef[v], x the channels of ``xs`` one after the other.

    Args:
        xs: (N, C_i, T, V + 1) each, any strides; the last joint is a mean that went through the same layers.
        coef: (V,).

    Returns:
        (N, sum C_i, T, V), contiguous. Stored for the backward pass: coef and x[n,c,t,V].

    Raises:
        ValueError: a shape does not fit.
    """
    xs = list(xs)
    outside = lambda x: (x.shape[0], *x.shape[2:])
    if not xs or any(x.dim() != 4 or outside(x) != outside(xs[0]) for x in xs):
        raise ValueError(f"Expected xs of shapes (N, C_i, T, V + 1) with one N, T and V. Got {[tuple(x.shape) for x in xs]}.")
    if tuple(coef.shape) != (xs[0].shape[3] - 1,):
        raise ValueError(f"Expected coef of shape {(xs[0].shape[3] - 1,)}. Got {tuple(coef.shape)}.")
    if any(x.dtype != coef.dtype for x in xs) or not runs_natively("spread_mean", coef):
        return reference_units.spread_mean(xs, coef)
    return _SpreadMean.apply(coef, *xs)


def _check(x: Tensor, count: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"Expected x of shape (N, C, T, V). Got {tuple(x.shape)}.")
    check_plane(x=x)
    if not 1 <= count <= _MOST:
        raise ValueError(f"Expected count from 1 to {_MOST}. Got {count}.")


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, mean: bool) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mean, ctx.shape = mean, x.shape
        return *(x.view_as(x) for _ in range(count)), *([_ops.frame_mean(x)] if mean else [])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        dmean = gradients[-1] if ctx.mean else None
        parts = [g for g in (gradients[:-1] if ctx.mean else gradients) if g is not None]
        if not parts:
            return None if dmean is None else (dmean / ctx.shape[2]).expand(ctx.shape), None, None
        return parts[0] if len(parts) == 1 and dmean is None else _ops.total(parts, dmean), None, None


class _AppendMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        y = _ops.append_mean(x)
        return y, *(y.detach() for _ in range(count - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        parts = [g for g in gradients if g is not None]
        return _ops.append_mean_backward(parts) if parts else None, None


class _SpreadMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coef: Tensor, *xs: Tensor) -> Tensor:
        y, mean = _ops.spread_mean(xs, coef)
        ctx.save_for_backward(coef, mean)
        ctx.places = [(x.shape, place_of(x)) for x in xs]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        coef, mean = ctx.saved_tensors
        dxs = [memory(dy, place, shape) for shape, place in ctx.places]
        return _ops.spread_mean_backward(dy, mean, coef, dxs), *dxs


LIBRARY.define("frame_mean(Tensor x) -> Tensor")
LIBRARY.define("total(Tensor[] parts, Tensor? mean) -> Tensor")
LIBRARY.define("append_mean(Tensor x) -> Tensor")
LIBRARY.define("append_mean_backward(Tensor[] gradients) -> Tensor")
LIBRARY.define("spread_mean(Tensor[] xs, Tensor coef) -> (Tensor, Tensor)")
LIBRARY.define("spread_mean_backward(Tensor dy, Tensor mean, Tensor coef, Tensor(a!)[] dxs) -> Tensor")


def _sizes(x: Tensor, more: int = 0) -> list[int]:
    """(N, C, T, V), V without the ``more`` joints that x has."""
    return [*x.shape[:3], x.shape[3] - more]


def _planes(tensors: Sequence[Tensor]) -> tuple[list[int], list[tuple[int, int]]]:
    planes = [plane(tensor) for tensor in tensors]
    return [address for address, _ in planes], [strides for _, strides in planes]


def _fake_frame_mean(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, x.shape[3]))


@implement("frame_mean", _fake_frame_mean)
def _frame_mean(x: Tensor) -> Tensor:
    mean, x = _fake_frame_mean(x), one_run(x)
    _native.module.frame_mean(x.dtype == torch.float64, _sizes(x), *plane(x), mean.data_ptr(), torch.get_num_threads())
    return mean


def _fake_total(parts: list[Tensor], mean: Tensor | None) -> Tensor:
    return empty(parts[0], parts[0].shape)


@implement("total", _fake_total)
def _total(parts: list[Tensor], mean: Tensor | None) -> Tensor:
    y, parts = _fake_total(parts, mean), [one_run(part) for part in parts]
    mean = None if mean is None else mean.contiguous()
    _native.module.total(y.dtype == torch.float64, _sizes(y), *_planes(parts), _native.address(mean), y.data_ptr(),
                         torch.get_num_threads())
    return y


def _fake_append_mean(x: Tensor) -> Tensor:
    return empty(x, (*x.shape[:3], x.shape[3] + 1))


@implement("append_mean", _fake_append_mean)
def _append_mean(x: Tensor) -> Tensor:
    y, x = _fake_append_mean(x), one_run(x)
    _native.module.append_mean(x.dtype == torch.float64, _sizes(x), *plane(x), y.data_ptr(), torch.get_num_threads())
    return y


def _fake_append_mean_backward(gradients: list[Tensor]) -> Tensor:
    return empty(gradients[0], _sizes(gradients[0], 1))


@implement("append_mean_backward", _fake_append_mean_backward)
def _append_mean_backward(gradients: list[Tensor]) -> Tensor:
    dx, gradients = _fake_append_mean_backward(gradients), [one_run(g) for g in gradients]
    _native.module.append_mean_backward(dx.dtype == torch.float64, _sizes(dx), *_planes(gradients), dx.data_ptr(),
                                        torch.get_num_threads())
    return dx


def _fake_spread_mean(xs: list[Tensor], coef: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, frames, joints = xs[0].shape
    shape = (batch, sum(x.shape[1] for x in xs), frames)
    return empty(coef, (*shape, joints - 1)), coef.new_empty(shape)


@implement("spread_mean", _fake_spread_mean)
def _spread_mean(xs: list[Tensor], coef: Tensor) -> tuple[Tensor, Tensor]:
    (y, mean), coef = _fake_spread_mean(xs, coef), coef.contiguous()
    for x, (begin, end) in zip(map(one_run, xs), spans(x.shape[1] for x in xs), strict=True):
        (source, target, means), strides = _planes([x, y[:, begin:end], mean[:, begin:end]])
        _native.module.spread_mean(y.dtype == torch.float64, _sizes(x, 1), [source, coef.data_ptr(), target, means], strides,
                                   torch.get_num_threads())
    return y, mean


def _fake_spread_mean_backward(dy: Tensor, mean: Tensor, coef: Tensor, dxs: list[Tensor]) -> Tensor:
    return coef.new_empty(coef.shape)


@implement("spread_mean_backward", _fake_spread_mean_backward)
def _spread_mean_backward(dy: Tensor, mean: Tensor, coef: Tensor, dxs: list[Tensor]) -> Tensor:
    dy, coef, total = one_run(dy), coef.contiguous(), torch.zeros(coef.shape, dtype=torch.float64)
    for dx, (begin, end) in zip(dxs, spans(dx.shape[1] for dx in dxs), strict=True):
        (gradient, source, target), strides = _planes([dy[:, begin:end], mean[:, begin:end], dx])
        _native.module.spread_mean_backward(
            dy.dtype == torch.float64, _sizes(dx, 1),
            [gradient, source, coef.data_ptr(), target, total.data_ptr()], strides, torch.get_num_threads())
    return total.to(coef.dtype, copy=True)
