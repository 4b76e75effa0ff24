"""graph_conv on a GPU: one op for a shared adjacency, one per sample and one per channel. The kernels: gpu.py."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._library import LIBRARY, PATTERN_SCHEMA, Lasso
from ._memory import empty
from .pattern import BlockPattern


def adjacency_conv(x: Tensor, values: Tensor, pattern: BlockPattern, adjacency: Tensor, bias: Tensor | None = None,
                   offset: Tensor | None = None, lasso: Lasso | None = None) -> Tensor:
    """Y[n,o,t,w] = c[o] + sum over k, v of A_k[v,w] (b_k[o] + sum over live (o,i,k) of W[o,i,k] X[n,i,t,v]).

    Shapes: x (N, I, T, V), any strides; values (blocks, bi, bo); adjacency (K, V, V), (N, K, V, V) or (N, K, O, V, V); bias b
    (K, O) and offset c (O,) or None; all of one dtype, which the caller has checked. Stored for the backward
    pass: the arguments.
    """
    return _AdjacencyConv.apply(x, values, adjacency, bias, offset, pattern.row_ptr, pattern.input, pattern.tap, pattern.shape,
                                pattern.block, *(lasso or Lasso(None, None)))


class _AdjacencyConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, adjacency: Tensor, bias: Tensor | None, offset: Tensor | None,
                row_ptr: Tensor, input: Tensor, tap: Tensor, shape: tuple[int, ...], block: tuple[int, ...],
                masked: Tensor | None, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, values, adjacency, bias, row_ptr, input, tap, masked, scale)
        ctx.shape, ctx.block = list(shape), list(block)
        return torch.ops.sparse_stgcn.adjacency_conv(x, values, adjacency, bias, offset, row_ptr, input, tap, ctx.shape,
                                                     ctx.block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, values, adjacency, bias, row_ptr, input, tap, masked, scale = ctx.saved_tensors
        pattern = (row_ptr, input, tap, ctx.shape, ctx.block)
        need_x, need_values, need_adjacency, need_bias, need_offset = ctx.needs_input_grad[:5]
        dx = dvalues = dadjacency = dbias = doffset = None
        if need_x or need_adjacency:
            dx, dadjacency = torch.ops.sparse_stgcn.adjacency_conv_dx(x, dy, values, adjacency, bias, *pattern, need_x,
                                                                      need_adjacency)
        if need_values or need_bias:
            dvalues, dbias = torch.ops.sparse_stgcn.adjacency_conv_dw(x, dy, values, adjacency, masked, scale, *pattern)
        if need_offset:
            doffset = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype)
        return (dx if need_x else None, dvalues if need_values else None, dadjacency if need_adjacency else None,
                dbias if need_bias else None, doffset, *([None] * 7))


LIBRARY.define(f"adjacency_conv(Tensor x, Tensor values, Tensor adjacency, Tensor? bias, Tensor? offset, {PATTERN_SCHEMA}) "
               "-> Tensor")
LIBRARY.define(f"adjacency_conv_dx(Tensor x, Tensor dy, Tensor values, Tensor adjacency, Tensor? bias, {PATTERN_SCHEMA}, "
               "bool need_x, bool need_adjacency) -> (Tensor, Tensor)")
LIBRARY.define("adjacency_conv_dw(Tensor x, Tensor dy, Tensor values, Tensor adjacency, Tensor? masked, Tensor? scale, "
               f"{PATTERN_SCHEMA}) -> (Tensor, Tensor)")


@torch.library.register_fake("sparse_stgcn::adjacency_conv", lib=LIBRARY)
def _fake_forward(x: Tensor, values: Tensor, adjacency: Tensor, bias: Tensor | None, offset: Tensor | None, row_ptr: Tensor,
                  input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> Tensor:
    return empty(x, (x.shape[0], shape[0], x.shape[2], x.shape[3]))


@torch.library.register_fake("sparse_stgcn::adjacency_conv_dx", lib=LIBRARY)
def _fake_dx(x: Tensor, dy: Tensor, values: Tensor, adjacency: Tensor, bias: Tensor | None, row_ptr: Tensor, input: Tensor,
             tap: Tensor, shape: list[int], block: list[int], need_x: bool, need_adjacency: bool) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape if need_x else (0,)), adjacency.new_empty(adjacency.shape if need_adjacency else (0,))


@torch.library.register_fake("sparse_stgcn::adjacency_conv_dw", lib=LIBRARY)
def _fake_dw(x: Tensor, dy: Tensor, values: Tensor, adjacency: Tensor, masked: Tensor | None, scale: Tensor | None,
             row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(shape[2], shape[0])
