"""temporal_conv: the block-sparse k x 1 convolution.

Definition: reference.py; on a CPU: csrc/cpu/temporal_conv.inl; on a GPU: gpu.py.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference
from ._library import LIBRARY, PATTERN_SCHEMA, Lasso, check_lasso, check_plane, check_values, implement
from ._memory import empty
from .dispatch import backend_for
from .pattern import BlockPattern


def temporal_conv(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None = None, stride: int = 1,
                  dilation: int = 1, lasso: Lasso | None = None) -> Tensor:
    """Block-sparse k x 1 convolution along time (K = 1: the 1x1 convolution).

    Y[n,o,t,v] = b[o] + sum over live (o,i,k) of W[o,i,k] X[n, i, t*stride + (k - (K-1)/2)*dilation, v]

    Args:
        x: (N, I, T, V), any strides; frames outside of it count as 0. bfloat16 is summed in float32 and rounded once.
        values: (blocks, bi, bo), the live weights; see BlockPattern.gather.
        pattern: of shape (O, I, K), K odd.
        bias: (O,) or None.
        stride, dilation: of the frames.
        lasso: adds scale * values to the gradient of its masked blocks, in the pass that computes that gradient.

    Returns:
        (N, O, ceil(T / stride), V), contiguous. Stored for the backward pass: x and values, nothing else.

    Raises:
        ValueError: a shape, K even, or stride or dilation below 1.
        TypeError: x, values and bias differ in dtype.
    """
    out_channels, in_channels, taps = pattern.shape
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"Expected x of shape (N, {in_channels}, T, V). Got {tuple(x.shape)}.")
    if taps % 2 == 0:
        raise ValueError(f"Expected pattern with an odd number of taps. Got {taps}.")
    if stride < 1 or dilation < 1:
        raise ValueError(f"Expected stride and dilation of at least 1. Got stride {stride}, dilation {dilation}.")
    check_plane(x=x)
    check_values(x, values, pattern, bias, (out_channels,))
    term = check_lasso(lasso, pattern, x)
    backend = backend_for("temporal_conv", x.device, x.dtype)
    if backend == "reference":
        return reference.temporal_conv(x, term.wrap(values), pattern, bias, stride, dilation)
    if backend == "native":
        # Gradients of what is small are float32 until the end too: they are rounded once.
        values, bias = _native.wide(values), None if bias is None else _native.wide(bias)
    return _TemporalConv.apply(x, values, bias, pattern.row_ptr, pattern.input, pattern.tap, pattern.shape, pattern.block,
                               stride, dilation, *term)


class _TemporalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, input: Tensor, tap: Tensor,
                shape: tuple[int, ...], block: tuple[int, ...], stride: int, dilation: int, masked: Tensor | None,
                scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, values, row_ptr, input, tap, masked, scale)
        ctx.shape, ctx.block, ctx.stride, ctx.dilation, ctx.bias = list(shape), list(block), stride, dilation, bias is not None
        return torch.ops.sparse_stgcn.temporal_conv(x, values, bias, row_ptr, input, tap, ctx.shape, ctx.block, stride,
                                                    dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, values, *index, masked, scale = ctx.saved_tensors
        dx = dvalues = dbias = None
        need_dw = ctx.needs_input_grad[1] or (ctx.bias and ctx.needs_input_grad[2])
        if ctx.needs_input_grad[0] and need_dw and ctx.shape[2] == ctx.stride == 1 and ctx.block[0] >= _SCATTERED:
            dx, dvalues, dbias = torch.ops.sparse_stgcn.pointwise_conv_backward(x, dy, values, masked, scale, *index, ctx.shape,
                                                                                ctx.block)
            return dx, dvalues, dbias if ctx.bias else None, *([None] * 9)
        if ctx.needs_input_grad[0]:
            dx = torch.ops.sparse_stgcn.temporal_conv_dx(dy, values, *index, ctx.shape, ctx.block, ctx.stride, ctx.dilation,
                                                         x.shape[2])
        if need_dw:
            dvalues, dbias = torch.ops.sparse_stgcn.temporal_conv_dw(x, dy, values, masked, scale, *index, ctx.shape, ctx.block,
                                                                     ctx.stride, ctx.dilation)
        return dx, dvalues, dbias if ctx.bias else None, *([None] * 9)


_SCATTERED = 4  # outputs of a block from which on dX is a scatter: it then shares its packed operand with dW


def out_frames(frames: int, stride: int) -> int:
    """ceil(T / stride): the padding (K-1)/2 * dilation keeps the frames of stride 1."""
    return (frames - 1) // stride + 1  # as torch writes it, so that a symbolic T is one and the same in torch.export


LIBRARY.define(f"temporal_conv(Tensor x, Tensor values, Tensor? bias, {PATTERN_SCHEMA}, int stride, int dilation) -> Tensor")
LIBRARY.define(f"temporal_conv_dx(Tensor dy, Tensor values, {PATTERN_SCHEMA}, int stride, int dilation, int frames) -> Tensor")
LIBRARY.define(f"temporal_conv_dw(Tensor x, Tensor dy, Tensor values, Tensor? masked, Tensor? scale, {PATTERN_SCHEMA}, "
               "int stride, int dilation) -> (Tensor, Tensor)")
LIBRARY.define(f"pointwise_conv_backward(Tensor x, Tensor dy, Tensor values, Tensor? masked, Tensor? scale, {PATTERN_SCHEMA}) "
               "-> (Tensor, Tensor, Tensor)")


def _fake_forward(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, input: Tensor, tap: Tensor,
                  shape: list[int], block: list[int], stride: int, dilation: int) -> Tensor:
    return empty(x, (x.shape[0], shape[0], out_frames(x.shape[2], stride), x.shape[3]))


@implement("temporal_conv", _fake_forward)
def _forward(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, input: Tensor, tap: Tensor,
             shape: list[int], block: list[int], stride: int, dilation: int) -> Tensor:
    y = _fake_forward(x, values, bias, row_ptr, input, tap, shape, block, stride, dilation)
    values, bias = values.contiguous(), None if bias is None else bias.contiguous()
    _native.module.temporal_forward(
        _native.storage(x), [x.shape[0], x.shape[2], y.shape[2], x.shape[3], stride, dilation],
        _native.sizes(shape, block, values.shape[0]), _native.index(row_ptr, input, tap), x.data_ptr(), x.stride(),
        values.data_ptr(), _native.address(bias), y.data_ptr(), torch.get_num_threads())
    return y


def _fake_dx(dy: Tensor, values: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int],
             stride: int, dilation: int, frames: int) -> Tensor:
    return empty(dy, (dy.shape[0], shape[1], frames, dy.shape[3]))


@implement("temporal_conv_dx", _fake_dx)
def _dx(dy: Tensor, values: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int],
        stride: int, dilation: int, frames: int) -> Tensor:
    dx = _fake_dx(dy, values, row_ptr, input, tap, shape, block, stride, dilation, frames)
    values = values.contiguous()
    _native.module.temporal_dx(
        _native.storage(dy), [dy.shape[0], frames, dy.shape[2], dy.shape[3], stride, dilation],
        _native.sizes(shape, block, values.shape[0]), _native.index(row_ptr, input, tap), dy.data_ptr(), dy.stride(),
        values.data_ptr(), dx.data_ptr(), torch.get_num_threads())
    return dx


def _fake_dw(x: Tensor, dy: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor, input: Tensor,
             tap: Tensor, shape: list[int], block: list[int], stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(shape[0])


@implement("temporal_conv_dw", _fake_dw)
def _dw(x: Tensor, dy: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor, input: Tensor,
        tap: Tensor, shape: list[int], block: list[int], stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    dw, dbias = _fake_dw(x, dy, values, masked, scale, row_ptr, input, tap, shape, block, stride, dilation)
    values = values.contiguous()
    _native.module.temporal_dw(
        _native.storage(x), [x.shape[0], x.shape[2], dy.shape[2], x.shape[3], stride, dilation],
        _native.sizes(shape, block, values.shape[0]), _native.index(row_ptr, input, tap), x.data_ptr(), x.stride(),
        dy.data_ptr(), dy.stride(), _native.address(masked), values.data_ptr(), 0.0 if scale is None else float(scale),
        dw.data_ptr(), dbias.data_ptr(), torch.get_num_threads())
    return dw, dbias


def _fake_pointwise(x: Tensor, dy: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor,
                    input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x, x.shape), torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(shape[0])


@implement("pointwise_conv_backward", _fake_pointwise)
def _pointwise(x: Tensor, dy: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor,
               input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, dbias = _fake_pointwise(x, dy, values, masked, scale, row_ptr, input, tap, shape, block)
    values = values.contiguous()
    _native.module.pointwise_backward(
        _native.storage(x), [x.shape[0], x.shape[2], x.shape[2], x.shape[3], 1, 1],
        _native.sizes(shape, block, values.shape[0]), _native.index(row_ptr, input, tap), x.data_ptr(), x.stride(),
        dy.data_ptr(), dy.stride(), _native.address(masked), values.data_ptr(), 0.0 if scale is None else float(scale),
        dx.data_ptr(), dw.data_ptr(), dbias.data_ptr(), torch.get_num_threads())
    return dx, dw, dbias
