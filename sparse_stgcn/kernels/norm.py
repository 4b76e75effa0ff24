"""norm: batch norm in training mode with residual and ReLU in one pass. Definition: reference.py; native: csrc/cpu/norm.inl."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference
from ._library import LIBRARY, implement
from ._memory import empty
from ._native import one_run, plane
from .again import remember
from .dispatch import backend_for
from .elsewhere import Stored, replaceable
from .elsewhere import remember as stored_as
from .split import memory, place_of, spans

__all__ = ["norm"]


def norm(xs: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None,
         relu: bool = False, relu_before: bool = False, elsewhere: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of the batch, ReLU (``relu_before``), plus residual, ReLU (``relu``).

    y = relu(weight (x - mean) / sqrt(var + eps) + bias + residual), x the channels of ``xs`` one after the other: branches are
    joined by writing each to its place, without a copy. With ``relu_before`` the residual is added behind a ReLU.

    Args:
        xs: (N, C, T, V), or several (N, C_i, T, V) with sum C_i = C; samples and channels may have any strides.
        weight, bias: (C,).
        residual: (N, C, T, V) or None.
        elsewhere: y goes on only as a part of another tensor, which may be stored in place of it, see ``elsewhere``.

    Returns:
        y (N, C, T, V), contiguous, and mean (C,) and unbiased variance (C,), without gradient, for running statistics.

    Stored for the backward pass: the arguments, mean and 1 / sqrt(var + eps); with a residual and a ReLU also y, which shows
    where the ReLU is open, or what stands for it (``elsewhere``). Without a residual that is computed again from x, and so is y
    for ops behind it, see ``again``.

    Raises:
        ValueError: a shape does not fit, or there are fewer than two values per channel.
        TypeError: the dtypes differ.
    """
    xs = [xs] if isinstance(xs, Tensor) else list(xs)
    first = xs[0] if xs else weight.new_empty(0)
    outside = lambda x: (x.shape[0], *x.shape[2:])
    if not xs or any(x.dim() != 4 or outside(x) != outside(first) for x in xs):
        raise ValueError(f"Expected xs of shapes (N, C_i, T, V) with one N, T and V. Got {[tuple(x.shape) for x in xs]}.")
    shape = (first.shape[0], sum(x.shape[1] for x in xs), *first.shape[2:])
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != shape[1:2]:
            raise ValueError(f"Expected {name} of shape {shape[1:2]}. Got {tuple(tensor.shape)}.")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"Expected residual of shape {shape}. Got {tuple(residual.shape)}.")
    if shape[0] * shape[2] * shape[3] < 2:
        raise ValueError(f"Expected at least two values per channel, to have a variance. Got x of shape {shape}.")
    tensors = [*xs, weight, bias, *([] if residual is None else [residual])]
    if any(tensor.dtype != first.dtype for tensor in tensors):
        raise TypeError(f"Expected xs, weight, bias and residual of one dtype. Got {[tensor.dtype for tensor in tensors]}.")
    if backend_for("norm", first.device, first.dtype) == "reference":
        y, mean, variance = reference.norm(xs, weight, bias, eps, residual, relu, relu_before)
        return y, mean.detach(), variance.detach()
    arguments = weight, bias, residual, eps, relu_before, relu
    if elsewhere and relu and residual is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        with replaceable() as stored:
            y, mean, _, variance = _Norm.apply(*arguments, stored, *xs)
        stored_as(y, stored)
        return y, mean, variance
    y, mean, rstd, variance = _Norm.apply(*arguments, None, *xs)
    if residual is None:
        sources = [tensor.detach() for tensor in (*xs, weight, bias)]  # they share the versions of what they are views of
        again = sources[:-2], *sources[-2:], mean, rstd, relu_before or relu
        remember(y, lambda: torch.ops.sparse_stgcn.norm_again(*again), sources)
    return y, mean, variance


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu_before: bool,
                relu: bool, stored: Stored | None, *xs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, mean, rstd, variance = torch.ops.sparse_stgcn.norm(list(xs), weight, bias, residual, eps, relu_before, relu)
        ctx.mark_non_differentiable(mean, rstd, variance)
        ctx.places = [place_of(x) for x in xs]
        masked = relu and residual is not None
        if stored is not None:
            stored.memory = y.data_ptr()
        ctx.open, ctx.residual = relu_before or (relu and residual is None), residual is not None
        ctx.save_for_backward(weight, bias, mean, rstd, y if masked else None, *xs)
        return y, mean, rstd, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Any, ...]:
        weight, bias, mean, rstd, y, *xs = ctx.saved_tensors
        dxs = [memory(x, place) for x, place in zip(xs, ctx.places, strict=True)]
        dresidual, dweight, dbias = torch.ops.sparse_stgcn.norm_backward(dy, xs, y, weight, bias, mean, rstd, ctx.open, dxs)
        if ctx.residual and y is None:
            dresidual = dy
        return dweight, dbias, dresidual if ctx.residual else None, None, None, None, None, *dxs


LIBRARY.define("norm(Tensor[] xs, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu_before, bool relu) "
               "-> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define("norm_again(Tensor[] xs, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool relu) -> Tensor")
LIBRARY.define("norm_backward(Tensor dy, Tensor[] xs, Tensor? y, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
               "bool open, Tensor(a!)[] dxs) -> (Tensor, Tensor, Tensor)")


def _fake_forward(xs: list[Tensor], weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float,
                  relu_before: bool, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = xs[0]
    mean, rstd, variance = (x.new_empty(weight.shape) for _ in range(3))
    return empty(x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])), mean, rstd, variance


@implement("norm", _fake_forward)
def _forward(xs: list[Tensor], weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float,
             relu_before: bool, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake_forward(xs, weight, bias, residual, eps, relu_before, relu)
    _run(xs, weight, bias, residual, eps, relu_before, relu, *outputs)
    return outputs


def _fake_again(xs: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> Tensor:
    return _fake_forward(xs, weight, bias, None, 0.0, False, relu)[0]


@implement("norm_again", _fake_again)
def _again(xs: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> Tensor:
    y = _fake_again(xs, weight, bias, mean, rstd, relu)
    _run(xs, weight, bias, None, 0.0, False, relu, y, mean, rstd, None)
    return y


def _run(xs: list[Tensor], weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu_before: bool, relu: bool,
         y: Tensor, mean: Tensor, rstd: Tensor, variance: Tensor | None) -> None:
    """Writes y, and mean, rstd and variance, unless there is no variance to write: then the other two are given."""
    residual = None if residual is None else one_run(residual)
    weight, bias = weight.contiguous(), bias.contiguous()  # a copy has to outlive the addresses
    whole, vectors = [plane(residual), plane(y)], [_native.address(v) for v in (weight, bias, mean, rstd, variance)]
    size, double, threads = y.element_size(), y.dtype == torch.float64, torch.get_num_threads()
    for x, (begin, end) in zip(map(one_run, xs), spans(x.shape[1] for x in xs), strict=True):
        source, (added, place) = plane(x), [_from(begin, part, size) for part in whole]
        small = [address and address + begin * size for address in vectors]
        _native.module.norm_forward(
            double, [x.shape[0], end - begin, x.shape[2] * x.shape[3]],
            [source[0], added, *small[:2], place, *small[2:]], [source[1], whole[0][1], whole[1][1]], eps, relu_before, relu,
            threads)


def _from(channel: int, plane: tuple[int, tuple[int, int]], size: int) -> int:
    """The address of a channel of a tensor whose elements have ``size`` bytes, or 0 where there is no tensor."""
    address, (_, stride) = plane
    return address and address + channel * stride * size


def _fake_backward(dy: Tensor, xs: list[Tensor], y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
                   open: bool, dxs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return empty(dy, (0,) if y is None else y.shape), torch.empty_like(mean), torch.empty_like(mean)


@implement("norm_backward", _fake_backward)
def _backward(dy: Tensor, xs: list[Tensor], y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
              open: bool, dxs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    dresidual, dweight, dbias = outputs = _fake_backward(dy, xs, y, weight, bias, mean, rstd, open, dxs)
    dy, weight, bias = one_run(dy), weight.contiguous(), bias.contiguous()  # a copy has to outlive the addresses
    given, stored, added = whole = [plane(t) for t in (dy, y, None if y is None else dresidual)]
    vectors = [v.data_ptr() for v in (weight, bias, mean, rstd, dweight, dbias)]
    size, double, threads = dy.element_size(), dy.dtype == torch.float64, torch.get_num_threads()
    for x, dx, (begin, end) in zip(map(one_run, xs), dxs, spans(x.shape[1] for x in xs), strict=True):
        (source, strides), (target, target_strides) = plane(x), plane(dx)
        upper, kept, sent = [_from(begin, part, size) for part in whole]
        small = [address + begin * size for address in vectors]
        _native.module.norm_backward(
            double, [x.shape[0], end - begin, x.shape[2] * x.shape[3]],
            [upper, source, kept, *small[:4], target, sent, *small[4:]],
            [given[1], strides, stored[1], target_strides, added[1]], open, threads)
    return outputs
