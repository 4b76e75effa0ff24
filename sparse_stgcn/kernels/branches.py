"""branches: maps of relu(norm(x)), which exists in no memory, one below the other. Native: csrc/cpu/branches.inl."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, check_values, implement
from ._memory import empty
from .dispatch import runs_natively
from .means import append_mean, spread_mean
from .norm import norm
from .pattern import BlockPattern
from .pool import max_pool
from .split import memory, place_of, spans, split
from .temporal_conv import out_frames, temporal_conv

__all__ = ["LiveConv", "Map", "branches"]

_ops = torch.ops.sparse_stgcn


class LiveConv(NamedTuple):
    """A convolution over frames by its live blocks: values (blocks, bi, bo), a pattern (O, I, K), and a bias (O,) or None."""

    values: Tensor
    pattern: BlockPattern
    bias: Tensor | None
    dilation: int = 1


# What makes y_b of x_b: a convolution or max-pooling over 3 frames, of relu(norm(x_b)); or x_b itself.
Map = LiveConv | Literal["max", "pass"]


def branches(xs: Sequence[Tensor], weight: Tensor, bias: Tensor, maps: Sequence[Map], stride: int = 1, eps: float = 1e-5,
             coef: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """cat over b of f_b(relu(norm(x_b))), norms with the statistics of the batch.

    f_b is a ``temporal_conv`` where ``maps[b]`` is a LiveConv, and ``max_pool`` where it is "max". With "pass" y_b is x_b. With
    ``coef`` every x gets its mean over joints as one more joint first (``append_mean``), and y ends with ``spread_mean``.

    Args:
        xs: (N, C_b, T, V) each, any strides; (N, C_b, ceil(T / stride), V) where it passes.
        weight, bias: of the norm, for the channels of all xs that do not pass.
        maps: one for each of ``xs``; not all of them pass.
        stride: of the frames.
        eps: added to the variance.
        coef: (V,) or None.

    Returns:
        (N, sum O_b, ceil(T / stride), V), contiguous, and mean and unbiased variance of the norm's inputs, without gradient.

    Stored for the backward pass: xs and the weights, with ``coef`` also one joint of y. relu(norm(x)) is made again while it is
    read, and so no gradient of it exists but the one that becomes the gradient of xs in its place.

    Raises:
        ValueError: a shape does not fit, or there are fewer than two values per channel.
        TypeError: the dtypes differ.
    """
    xs, maps = list(xs), list(maps)
    _check(xs, weight, bias, maps, stride, coef)
    normed = [b for b, way in enumerate(maps) if way != "pass"]
    if not fuses(xs[0], maps, stride):
        given = xs if coef is None else [append_mean(x)[0] for x in xs]
        h, mean, variance = norm([given[b] for b in normed], weight, bias, eps, relu=True)
        parts = list(given)
        for b, part in zip(normed, split(h, spans(xs[b].shape[1] for b in normed)), strict=True):
            way = maps[b]
            parts[b] = max_pool(part, stride) if isinstance(way, str) else temporal_conv(
                part, way.values, way.pattern, way.bias, stride, way.dilation)
        return torch.cat(parts, 1) if coef is None else spread_mean(parts, coef), mean, variance
    convs = [way for way in maps if isinstance(way, LiveConv)]
    index = [part for conv in convs for part in (conv.pattern.row_ptr, conv.pattern.input, conv.pattern.tap)]
    sizes = [size for x, way in zip(xs, maps, strict=True) for size in _sizes(x, way)]
    none = xs[0].new_empty(0)
    values, biases = [conv.values for conv in convs], [none if conv.bias is None else conv.bias for conv in convs]
    y, mean, variance = _Branches.apply(index, sizes, stride, eps, len(xs), weight, bias, coef, *xs, *values, *biases)
    return y, mean, variance


def _check(xs: list[Tensor], weight: Tensor, bias: Tensor, maps: list[Map], stride: int, coef: Tensor | None) -> None:
    if len(maps) != len(xs) or all(way == "pass" for way in maps):
        raise ValueError(f"Expected one map for each of {len(xs)} xs, not all of them \"pass\". Got {len(maps)}: {maps}.")
    if stride < 1 or any(isinstance(way, LiveConv) and way.dilation < 1 for way in maps):
        raise ValueError(f"Expected stride and dilations of at least 1. Got stride {stride} and maps {maps}.")
    first = next(x for x, way in zip(xs, maps, strict=True) if way != "pass")
    if any(x.dim() != 4 for x in xs):
        raise ValueError(f"Expected xs of shapes (N, C_b, T, V). Got {[tuple(x.shape) for x in xs]}.")
    batch, _, frames, joints = first.shape
    wanted = [(batch, out_frames(frames, stride) if way == "pass" else frames, joints) for way in maps]
    if any((x.shape[0], *x.shape[2:]) != shape for x, shape in zip(xs, wanted, strict=True)):
        raise ValueError(f"Expected xs of shapes (N, C_b, T, V) with N, T, V = {wanted}. Got {[tuple(x.shape) for x in xs]}.")
    for x, way in zip(xs, maps, strict=True):
        if isinstance(way, str):
            continue
        if way.pattern.shape[1] != x.shape[1] or way.pattern.shape[2] % 2 == 0:
            raise ValueError(f"Expected a pattern (O, {x.shape[1]}, K) with an odd K. Got {way.pattern.shape}.")
        check_values(x, way.values, way.pattern, way.bias, way.pattern.shape[:1])
    channels = sum(x.shape[1] for x, way in zip(xs, maps, strict=True) if way != "pass")
    if tuple(weight.shape) != (channels,) or tuple(bias.shape) != (channels,):
        raise ValueError(f"Expected weight and bias of shape ({channels},). Got {tuple(weight.shape)} and {tuple(bias.shape)}.")
    if coef is not None and tuple(coef.shape) != (joints,):
        raise ValueError(f"Expected coef of shape ({joints},). Got {tuple(coef.shape)}.")
    tensors = [*xs, weight, bias, *([] if coef is None else [coef])]
    if any(tensor.dtype != first.dtype for tensor in tensors):
        raise TypeError(f"Expected xs, weight, bias and coef of one dtype. Got {[tensor.dtype for tensor in tensors]}.")
    if batch * frames * joints < 2:
        raise ValueError(f"Expected at least two values per channel, to have a variance. Got x of shape {tuple(first.shape)}.")


def fuses(x: Tensor, maps: Sequence[Map], stride: int, dtype: torch.dtype | None = None) -> bool:
    """Whether one op stands for all, on x in this dtype: natively, in float32 or float64, and no stride without taps."""
    ops, dtype = ("norm", "temporal_conv", "max_pool", "append_mean", "spread_mean"), x.dtype if dtype is None else dtype
    return (dtype in (torch.float32, torch.float64) and all(runs_natively(op, x, dtype) for op in ops)
            and (stride == 1 or all(isinstance(way, str) or way.pattern.shape[2] > 1 for way in maps)))


_SIZES = 7  # of a branch: (kind, O, I, K, bo, bi, dilation)
_CONVOLVES, _KINDS = 0, {"max": 1, "pass": 2}  # BranchKind of csrc/cpu/table.h


def _sizes(x: Tensor, way: Map) -> tuple[int, ...]:
    if isinstance(way, str):
        return _KINDS[way], x.shape[1], x.shape[1], 1, 1, 1, 1
    return _CONVOLVES, *way.pattern.shape, *way.pattern.block, way.dilation


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: list[Tensor], sizes: list[int], stride: int, eps: float, count: int, weight: Tensor,
                bias: Tensor, coef: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        xs, convs = list(tensors[:count]), len(index) // 3
        values, biases = list(tensors[count:count + convs]), list(tensors[count + convs:])
        y, mean, rstd, variance, means = _ops.branches(xs, weight, bias, coef, values, biases, index, sizes, stride, eps)
        ctx.mark_non_differentiable(mean, variance)
        ctx.places = [place_of(x) for x in xs]
        ctx.biased, ctx.count = [given.numel() > 0 for given in biases], count
        ctx.sizes, ctx.stride = sizes, stride
        ctx.save_for_backward(weight, bias, coef, mean, rstd, means, *xs, *values, *index)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Any, ...]:
        weight, bias, coef, mean, rstd, means, *rest = ctx.saved_tensors
        convs = len(ctx.biased)
        xs, values, index = rest[:ctx.count], rest[ctx.count:ctx.count + convs], rest[ctx.count + convs:]
        dxs = [memory(x, place) for x, place in zip(xs, ctx.places, strict=True)]
        outputs = [ctx.sizes[at + 1] for at in range(0, len(ctx.sizes), _SIZES) if ctx.sizes[at] == _CONVOLVES]
        like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias, *values)]
        dweight, dbias, *gradients = [*like, *(dy.new_empty(count) for count in outputs)]
        dcoef = dy.new_empty(0 if coef is None else coef.shape)
        _ops.branches_backward(dy, xs, weight, bias, coef, mean, rstd, means, values, index, ctx.sizes, ctx.stride, dxs,
                               [dweight, dbias, dcoef, *gradients])
        given = [gradient if biased else None for gradient, biased in zip(gradients[convs:], ctx.biased, strict=True)]
        return (None, None, None, None, None, dweight, dbias, None if coef is None else dcoef, *dxs, *gradients[:convs], *given)


LIBRARY.define("branches(Tensor[] xs, Tensor weight, Tensor bias, Tensor? coef, Tensor[] values, Tensor[] biases, "
               "Tensor[] index, int[] sizes, int stride, float eps) -> Tensor[]")
LIBRARY.define("branches_backward(Tensor dy, Tensor[] xs, Tensor weight, Tensor bias, Tensor? coef, Tensor mean, Tensor rstd, "
               "Tensor means, Tensor[] values, Tensor[] index, int[] sizes, int stride, Tensor(a!)[] dxs, "
               "Tensor(b!)[] gradients) -> ()")


def _arguments(xs: list[Tensor], values: list[Tensor], biases: Sequence[Tensor | None], index: list[Tensor], sizes: list[int],
               gradients: list[list[Tensor]]) -> tuple[list[list[int]], list[list[int]], int]:
    """Sizes and addresses as csrc/bindings.h takes them, and the channels of y. gradients: dx, dvalues, dbias of a branch."""
    rows, addresses, first, target, conv = [], [], 0, 0, 0
    for b, x in enumerate(xs):
        kind, *pattern, dilation = sizes[b * _SIZES:(b + 1) * _SIZES]
        sent = gradients[b] if gradients else []
        convolves = kind == _CONVOLVES
        given = biases[conv] if convolves else None
        rows.append([kind, *pattern, values[conv].shape[0] if convolves else 0, dilation, first, target, x.stride(0),
                     sent[0].stride(0) if sent else 0])
        addresses.append([*(_native.index(*index[3 * conv:3 * conv + 3]) if convolves else [0, 0, 0]),
                          values[conv].data_ptr() if convolves else 0,
                          0 if given is None or not given.numel() else given.data_ptr(), x.data_ptr(),
                          *(t.data_ptr() for t in sent), *([0] * (3 - len(sent)))])
        first, target, conv = first + x.shape[1] * (kind != _KINDS["pass"]), target + pattern[0], conv + convolves
    return rows, addresses, target


def _shape(xs: list[Tensor], sizes: list[int], stride: int) -> list[int]:
    """(N, T, T_out, V, stride, 1)."""
    batch, _, frames, joints = next(x for x, kind in zip(xs, sizes[::_SIZES], strict=True) if kind != _KINDS["pass"]).shape
    return [batch, frames, out_frames(frames, stride), joints, stride, 1]


def _fake_forward(xs: list[Tensor], weight: Tensor, bias: Tensor, coef: Tensor | None, values: list[Tensor],
                  biases: list[Tensor], index: list[Tensor], sizes: list[int], stride: int, eps: float) -> list[Tensor]:
    (batch, _, frames, joints, *_), channels = _shape(xs, sizes, stride), sum(sizes[1::_SIZES])
    return [empty(xs[0], (batch, channels, frames, joints)), *(weight.new_empty(weight.shape) for _ in range(3)),
            weight.new_empty((0,) if coef is None else (batch, channels, frames))]


@implement("branches", _fake_forward)
def _forward(xs: list[Tensor], weight: Tensor, bias: Tensor, coef: Tensor | None, values: list[Tensor], biases: list[Tensor],
             index: list[Tensor], sizes: list[int], stride: int, eps: float) -> list[Tensor]:
    outputs = y, mean, rstd, variance, means = _fake_forward(xs, weight, bias, coef, values, biases, index, sizes, stride, eps)
    xs, weight, bias = [_native.channels_apart(x) for x in xs], weight.contiguous(), bias.contiguous()
    values, biases = [v.contiguous() for v in values], [b.contiguous() for b in biases]
    coef = None if coef is None else coef.contiguous()
    rows, addresses, channels = _arguments(xs, values, biases, index, sizes, [])
    _native.module.branches_forward(y.dtype == torch.float64, _shape(xs, sizes, stride), rows, addresses,
                                    [t.data_ptr() for t in (weight, bias, mean, rstd, variance)], eps,
                                    [_native.address(coef), means.data_ptr(), 0], channels, y.data_ptr(),
                                    torch.get_num_threads())
    return outputs


def _fake_backward(dy: Tensor, xs: list[Tensor], weight: Tensor, bias: Tensor, coef: Tensor | None, mean: Tensor, rstd: Tensor,
                   means: Tensor, values: list[Tensor], index: list[Tensor], sizes: list[int], stride: int, dxs: list[Tensor],
                   gradients: list[Tensor]) -> None:
    return None


@implement("branches_backward", _fake_backward)
def _backward(dy: Tensor, xs: list[Tensor], weight: Tensor, bias: Tensor, coef: Tensor | None, mean: Tensor, rstd: Tensor,
              means: Tensor, values: list[Tensor], index: list[Tensor], sizes: list[int], stride: int, dxs: list[Tensor],
              gradients: list[Tensor]) -> None:
    """Writes ``dxs``, and ``gradients``: of weight, bias and coef, of the values of each convolution, and of its bias."""
    dweight, dbias, dcoef, *of_convs = gradients
    convs = len(values)
    sent, conv = [], 0
    for kind, dx in zip(sizes[::_SIZES], dxs, strict=True):
        sent.append([dx, of_convs[conv], of_convs[convs + conv]] if kind == _CONVOLVES else [dx])
        conv += kind == _CONVOLVES
    dy, xs, weight, bias = dy.contiguous(), [_native.channels_apart(x) for x in xs], weight.contiguous(), bias.contiguous()
    values, coef = [v.contiguous() for v in values], None if coef is None else coef.contiguous()
    rows, addresses, channels = _arguments(xs, values, [None] * convs, index, sizes, sent)
    _native.module.branches_backward(
        dy.dtype == torch.float64, _shape(xs, sizes, stride), rows, addresses,
        [*(t.data_ptr() for t in (weight, bias, mean, rstd)), 0, dweight.data_ptr(), dbias.data_ptr()],
        [_native.address(coef), means.data_ptr(), dcoef.data_ptr()], channels, dy.data_ptr(), torch.get_num_threads())
