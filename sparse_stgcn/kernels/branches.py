"""branches: maps of relu(norm(x)), which exists in no memory, one below the other. Native: csrc/cpu/branches.inl."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, check_values, implement
from ._memory import empty
from .dispatch import runs_natively
from .norm import norm
from .pattern import BlockPattern
from .pool import max_pool
from .split import memory, place_of, spans, split
from .temporal_conv import out_frames, temporal_conv

__all__ = ["LiveConv", "branches"]

_ops = torch.ops.sparse_stgcn


class LiveConv(NamedTuple):
    """A convolution over frames by its live blocks: values (blocks, bi, bo), a pattern (O, I, K), and a bias (O,) or None."""

    values: Tensor
    pattern: BlockPattern
    bias: Tensor | None
    dilation: int = 1


def branches(xs: Sequence[Tensor], weight: Tensor, bias: Tensor, maps: Sequence[LiveConv | None], stride: int = 1,
             eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """cat over b of f_b(relu(norm(x_b))), norms with the statistics of the batch.

    f_b is a ``temporal_conv`` where ``maps[b]`` is a LiveConv, and ``max_pool`` where it is None.

    Args:
        xs: (N, C_b, T, V) each, any strides.
        weight, bias: (sum C_b,), of the norm.
        maps: one for each of ``xs``.
        stride: of the frames, for all of them.
        eps: added to the variance.

    Returns:
        (N, sum O_b, ceil(T / stride), V), contiguous, and mean and unbiased variance of the inputs, (sum C_b,), without
        gradient.

    Stored for the backward pass: xs and the weights. relu(norm(x)) is made again while it is read, and so no gradient of it
    exists but the one that becomes the gradient of xs in its place.

    Raises:
        ValueError: a shape does not fit, or there are fewer than two values per channel.
        TypeError: the dtypes differ.
    """
    xs, first = list(xs), xs[0] if xs else weight
    if not xs or any(x.dim() != 4 or x.shape[:1] + x.shape[2:] != first.shape[:1] + first.shape[2:] for x in xs):
        raise ValueError(f"Expected xs of shapes (N, C_b, T, V) with one N, T and V. Got {[tuple(x.shape) for x in xs]}.")
    if len(maps) != len(xs):
        raise ValueError(f"Expected one map for each of {len(xs)} xs. Got {len(maps)}.")
    widths = tuple(x.shape[1] for x in xs)
    if tuple(weight.shape) != (sum(widths),) or tuple(bias.shape) != (sum(widths),):
        raise ValueError(f"Expected weight and bias of shape ({sum(widths)},). "
                         f"Got {tuple(weight.shape)} and {tuple(bias.shape)}.")
    if any(tensor.dtype != first.dtype for tensor in (*xs, weight, bias)):
        raise TypeError(f"Expected xs, weight and bias of one dtype. Got {[t.dtype for t in (*xs, weight, bias)]}.")
    if stride < 1 or any(conv is not None and conv.dilation < 1 for conv in maps):
        raise ValueError(f"Expected stride and dilations of at least 1. Got stride {stride} and maps {maps}.")
    for x, conv in zip(xs, maps, strict=True):
        if conv is None:
            continue
        if conv.pattern.shape[1] != x.shape[1] or conv.pattern.shape[2] % 2 == 0:
            raise ValueError(f"Expected a pattern (O, {x.shape[1]}, K) with an odd K. Got {conv.pattern.shape}.")
        check_values(x, conv.values, conv.pattern, conv.bias, conv.pattern.shape[:1])
    if first.numel() < 2 * first.shape[1]:
        raise ValueError(f"Expected at least two values per channel, to have a variance. Got x of shape {tuple(first.shape)}.")
    if not fuses(first, maps, stride):
        y, mean, variance = norm(xs, weight, bias, eps, relu=True)
        parts = [max_pool(h, stride) if conv is None
                 else temporal_conv(h, conv.values, conv.pattern, conv.bias, stride, conv.dilation)
                 for h, conv in zip(split(y, spans(widths)), maps, strict=True)]
        return torch.cat(parts, 1), mean, variance
    convs = [conv for conv in maps if conv is not None]
    index = [part for conv in convs for part in (conv.pattern.row_ptr, conv.pattern.input, conv.pattern.tap)]
    sizes = [size for x, conv in zip(xs, maps, strict=True) for size in _sizes(x, conv)]
    none = first.new_empty(0)
    y, mean, variance = _Branches.apply(index, sizes, stride, eps, len(xs), weight, bias, *xs, *(conv.values for conv in convs),
                                        *(none if conv.bias is None else conv.bias for conv in convs))
    return y, mean, variance


def fuses(x: Tensor, maps: Sequence[LiveConv | None], stride: int) -> bool:
    """Whether one op stands for all: natively, in float32 or float64, and no stride without taps."""
    ops = ("norm", "temporal_conv", "max_pool")
    return (x.dtype in (torch.float32, torch.float64) and all(runs_natively(op, x) for op in ops)
            and (stride == 1 or all(conv is None or conv.pattern.shape[2] > 1 for conv in maps)))


_SIZES = 7  # of a branch: (pools, O, I, K, bo, bi, dilation)


def _sizes(x: Tensor, conv: LiveConv | None) -> tuple[int, ...]:
    channels = x.shape[1]
    return (1, channels, channels, 1, 1, 1, 1) if conv is None else (0, *conv.pattern.shape, *conv.pattern.block, conv.dilation)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: list[Tensor], sizes: list[int], stride: int, eps: float, count: int, weight: Tensor,
                bias: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        xs, convs = list(tensors[:count]), len(index) // 3
        values, biases = list(tensors[count:count + convs]), list(tensors[count + convs:])
        y, mean, rstd, variance = _ops.branches(xs, weight, bias, values, biases, index, sizes, stride, eps)
        ctx.mark_non_differentiable(mean, variance)
        ctx.places = [place_of(x) for x in xs]
        ctx.biased, ctx.count = [given.numel() > 0 for given in biases], count
        ctx.sizes, ctx.stride = sizes, stride
        ctx.save_for_backward(weight, bias, mean, rstd, *xs, *values, *index)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Any, ...]:
        weight, bias, mean, rstd, *rest = ctx.saved_tensors
        convs = len(ctx.biased)
        xs, values, index = rest[:ctx.count], rest[ctx.count:ctx.count + convs], rest[ctx.count + convs:]
        dxs = [memory(x, place) for x, place in zip(xs, ctx.places, strict=True)]
        outputs = [ctx.sizes[at + 1] for at in range(0, len(ctx.sizes), _SIZES) if not ctx.sizes[at]]
        like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias, *values)]
        dweight, dbias, *gradients = all_of = [*like, *(dy.new_empty(count) for count in outputs)]
        _ops.branches_backward(dy, xs, weight, bias, mean, rstd, values, index, ctx.sizes, ctx.stride, dxs, all_of)
        given = [gradient if biased else None for gradient, biased in zip(gradients[convs:], ctx.biased, strict=True)]
        return None, None, None, None, None, dweight, dbias, *dxs, *gradients[:convs], *given


LIBRARY.define("branches(Tensor[] xs, Tensor weight, Tensor bias, Tensor[] values, Tensor[] biases, Tensor[] index, "
               "int[] sizes, int stride, float eps) -> Tensor[]")
LIBRARY.define("branches_backward(Tensor dy, Tensor[] xs, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
               "Tensor[] values, Tensor[] index, int[] sizes, int stride, Tensor(a!)[] dxs, Tensor(b!)[] gradients) -> ()")


def channels_apart(x: Tensor) -> Tensor:
    """x if its channels are T V numbers apart, as those of a slice are, otherwise a contiguous copy."""
    pixels = x.shape[2] * x.shape[3]
    x = _native.one_run(x)
    return x if x.shape[1] == 1 or x.stride(1) == pixels else x.contiguous()


def _arguments(xs: list[Tensor], values: list[Tensor], biases: Sequence[Tensor | None], index: list[Tensor], sizes: list[int],
               gradients: list[list[Tensor]]) -> tuple[list[list[int]], list[list[int]], int]:
    """Sizes and addresses as csrc/bindings.h takes them, and the channels of y. gradients: dx, dvalues, dbias of a branch."""
    rows, addresses, first, target, conv = [], [], 0, 0, 0
    for b, x in enumerate(xs):
        pools, *pattern, dilation = sizes[b * _SIZES:(b + 1) * _SIZES]
        sent = gradients[b] if gradients else []
        row_ptr_input_tap = [0, 0, 0] if pools else _native.index(*index[3 * conv:3 * conv + 3])
        given = None if pools else biases[conv]
        rows.append([pools, *pattern, 0 if pools else values[conv].shape[0], dilation, first, target, x.stride(0),
                     sent[0].stride(0) if sent else 0])
        addresses.append([*row_ptr_input_tap, 0 if pools else values[conv].data_ptr(),
                          0 if given is None or not given.numel() else given.data_ptr(), x.data_ptr(),
                          *(t.data_ptr() for t in sent), *([0] * (3 - len(sent)))])
        first, target, conv = first + x.shape[1], target + pattern[0], conv + (not pools)
    return rows, addresses, target


def _shape(xs: list[Tensor], stride: int) -> list[int]:
    batch, _, frames, joints = xs[0].shape
    return [batch, frames, out_frames(frames, stride), joints, stride, 1]


def _fake_forward(xs: list[Tensor], weight: Tensor, bias: Tensor, values: list[Tensor], biases: list[Tensor],
                  index: list[Tensor], sizes: list[int], stride: int, eps: float) -> list[Tensor]:
    batch, _, frames, joints = xs[0].shape
    y = empty(xs[0], (batch, sum(sizes[1::_SIZES]), out_frames(frames, stride), joints))
    return [y, *(weight.new_empty(weight.shape) for _ in range(3))]


@implement("branches", _fake_forward)
def _forward(xs: list[Tensor], weight: Tensor, bias: Tensor, values: list[Tensor], biases: list[Tensor], index: list[Tensor],
             sizes: list[int], stride: int, eps: float) -> list[Tensor]:
    outputs = y, mean, rstd, variance = _fake_forward(xs, weight, bias, values, biases, index, sizes, stride, eps)
    xs, weight, bias = [channels_apart(x) for x in xs], weight.contiguous(), bias.contiguous()
    values, biases = [v.contiguous() for v in values], [b.contiguous() for b in biases]
    for x, (begin, _) in zip(xs, spans(x.shape[1] for x in xs), strict=True):
        statistics(x, weight, bias, eps, mean, rstd, variance, begin)
    rows, addresses, channels = _arguments(xs, values, biases, index, sizes, [])
    _native.module.branches_forward(y.dtype == torch.float64, _shape(xs, stride), rows, addresses,
                                    [t.data_ptr() for t in (weight, bias, mean, rstd)], channels, y.data_ptr(),
                                    torch.get_num_threads())
    return outputs


def statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, rstd: Tensor, variance: Tensor,
               first: int = 0) -> None:
    """Writes mean, rstd and unbiased variance of x, from channel ``first`` of these tensors on, which are contiguous."""
    of_batch = [t.data_ptr() + first * x.element_size() for t in (weight, bias, mean, rstd, variance)]
    address, strides = _native.plane(x)  # no residual and no y: the statistics alone
    _native.module.norm_forward(x.dtype == torch.float64, [x.shape[0], x.shape[1], x.shape[2] * x.shape[3]],
                                [address, 0, *of_batch[:2], 0, *of_batch[2:]], [strides, (0, 0), (0, 0)], eps, False, True,
                                torch.get_num_threads())


def _fake_backward(dy: Tensor, xs: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, values: list[Tensor],
                   index: list[Tensor], sizes: list[int], stride: int, dxs: list[Tensor], gradients: list[Tensor]) -> None:
    return None


@implement("branches_backward", _fake_backward)
def _backward(dy: Tensor, xs: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, values: list[Tensor],
              index: list[Tensor], sizes: list[int], stride: int, dxs: list[Tensor], gradients: list[Tensor]) -> None:
    """Writes ``dxs``, and ``gradients``: of weight, bias, the values of each convolution and its bias."""
    dweight, dbias, *of_convs = gradients
    convs = len(values)
    sent, conv = [], 0
    for at, dx in zip(range(0, len(sizes), _SIZES), dxs, strict=True):
        sent.append([dx] if sizes[at] else [dx, of_convs[conv], of_convs[convs + conv]])
        conv += not sizes[at]
    dy, xs, weight, bias = dy.contiguous(), [channels_apart(x) for x in xs], weight.contiguous(), bias.contiguous()
    values = [v.contiguous() for v in values]
    rows, addresses, channels = _arguments(xs, values, [None] * convs, index, sizes, sent)
    _native.module.branches_backward(dy.dtype == torch.float64, _shape(xs, stride), rows, addresses,
                                     [t.data_ptr() for t in (weight, bias, mean, rstd, dweight, dbias)], channels,
                                     dy.data_ptr(), torch.get_num_threads())
