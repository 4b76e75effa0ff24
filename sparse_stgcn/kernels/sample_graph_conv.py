"""graph_conv with a graph of its own for every sample. Definition: reference.py; native code: csrc/cpu/sample_graphs.inl."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, PATTERN_SCHEMA, Lasso, implement
from ._memory import empty
from .pattern import BlockPattern


def sample_graph_conv(x: Tensor, values: Tensor, pattern: BlockPattern, graphs: Tensor, offset: Tensor | None = None,
                      lasso: Lasso | None = None) -> Tensor:
    """Y[n,o,t,w] = B[o,w] + sum over k, v and live (o,i,k) of W[o,i,k] X[n,i,t,v] G[n,k,v,w], natively on a CPU.

    Shapes: x (N, I, T, V), any strides; values (blocks, bi, bo); graphs (N, K, V, V); offset B (O, V) or None; all of
    one dtype, which the caller has checked, but x and Y may be bfloat16 beside float32. Stored for the backward pass: the
    arguments.
    """
    return _SampleGraphConv.apply(x, values, graphs, offset, pattern.row_ptr, pattern.input, pattern.tap, pattern.shape,
                                  pattern.block, *(lasso or Lasso(None, None)))


class _SampleGraphConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, graphs: Tensor, offset: Tensor | None, row_ptr: Tensor, input: Tensor,
                tap: Tensor, shape: tuple[int, ...], block: tuple[int, ...], masked: Tensor | None, scale: Tensor | None
                ) -> Tensor:
        ctx.save_for_backward(x, values, graphs, row_ptr, input, tap, masked, scale)
        ctx.shape, ctx.block = list(shape), list(block)
        return torch.ops.sparse_stgcn.sample_graph_conv(x, values, graphs, offset, row_ptr, input, tap, ctx.shape, ctx.block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, values, graphs, row_ptr, input, tap, masked, scale = ctx.saved_tensors
        pattern = (row_ptr, input, tap, ctx.shape, ctx.block)
        need_x, need_values, need_graphs, need_offset = ctx.needs_input_grad[:4]
        dx = dvalues = dgraphs = doffset = None
        if need_x or need_graphs:
            dx, dgraphs = torch.ops.sparse_stgcn.sample_graph_conv_dx(x, dy, values, graphs, *pattern, need_graphs)
        if need_values or need_offset:
            dvalues, doffset = torch.ops.sparse_stgcn.sample_graph_conv_dw(x, dy, values, graphs, masked, scale, *pattern)
        return (dx if need_x else None, dvalues if need_values else None, dgraphs if need_graphs else None,
                doffset if need_offset else None, *([None] * 7))


LIBRARY.define(f"sample_graph_conv(Tensor x, Tensor values, Tensor graphs, Tensor? offset, {PATTERN_SCHEMA}) -> Tensor")
LIBRARY.define(f"sample_graph_conv_dx(Tensor x, Tensor dy, Tensor values, Tensor graphs, {PATTERN_SCHEMA}, bool need_graphs) "
               "-> (Tensor, Tensor)")
LIBRARY.define("sample_graph_conv_dw(Tensor x, Tensor dy, Tensor values, Tensor graphs, Tensor? masked, Tensor? scale, "
               f"{PATTERN_SCHEMA}) -> (Tensor, Tensor)")


def _shape(x: Tensor, shape: list[int]) -> list[int]:
    return [x.shape[0], shape[2], 1, 1, x.shape[2], x.shape[3]]


def _fake_forward(x: Tensor, values: Tensor, graphs: Tensor, offset: Tensor | None, row_ptr: Tensor, input: Tensor,
                  tap: Tensor, shape: list[int], block: list[int]) -> Tensor:
    return empty(x, (x.shape[0], shape[0], x.shape[2], x.shape[3]))


@implement("sample_graph_conv", _fake_forward)
def _forward(x: Tensor, values: Tensor, graphs: Tensor, offset: Tensor | None, row_ptr: Tensor, input: Tensor, tap: Tensor,
             shape: list[int], block: list[int]) -> Tensor:
    y = _fake_forward(x, values, graphs, offset, row_ptr, input, tap, shape, block)
    values, graphs, offset = values.contiguous(), graphs.contiguous(), None if offset is None else offset.contiguous()
    _native.module.sample_graph_forward(
        _native.storage(x), _shape(x, shape), _native.sizes(shape, block, values.shape[0]),
        _native.index(row_ptr, input, tap), x.data_ptr(), x.stride(), values.data_ptr(), graphs.data_ptr(),
        _native.address(offset), y.data_ptr(), torch.get_num_threads())
    return y


def _fake_dx(x: Tensor, dy: Tensor, values: Tensor, graphs: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor,
             shape: list[int], block: list[int], need_graphs: bool) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape), graphs.new_empty(graphs.shape if need_graphs else (0,))


@implement("sample_graph_conv_dx", _fake_dx)
def _dx(x: Tensor, dy: Tensor, values: Tensor, graphs: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int],
        block: list[int], need_graphs: bool) -> tuple[Tensor, Tensor]:
    dx, dgraphs = _fake_dx(x, dy, values, graphs, row_ptr, input, tap, shape, block, need_graphs)
    values, graphs = values.contiguous(), graphs.contiguous()
    _native.module.sample_graph_dx(
        _native.storage(x), _shape(x, shape), _native.sizes(shape, block, values.shape[0]),
        _native.index(row_ptr, input, tap), x.data_ptr(), x.stride(), dy.data_ptr(), dy.stride(), values.data_ptr(),
        graphs.data_ptr(), dx.data_ptr(), dgraphs.data_ptr() if need_graphs else 0, torch.get_num_threads())
    return dx, dgraphs


def _fake_dw(x: Tensor, dy: Tensor, values: Tensor, graphs: Tensor, masked: Tensor | None, scale: Tensor | None,
             row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(shape[0], x.shape[3])


@implement("sample_graph_conv_dw", _fake_dw)
def _dw(x: Tensor, dy: Tensor, values: Tensor, graphs: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor,
        input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor]:
    dw, doffset = _fake_dw(x, dy, values, graphs, masked, scale, row_ptr, input, tap, shape, block)
    values, graphs = values.contiguous(), graphs.contiguous()
    _native.module.sample_graph_dw(
        _native.storage(x), _shape(x, shape), _native.sizes(shape, block, values.shape[0]),
        _native.index(row_ptr, input, tap), x.data_ptr(), x.stride(), dy.data_ptr(), dy.stride(), graphs.data_ptr(),
        _native.address(masked), values.data_ptr(), 0.0 if scale is None else float(scale), dw.data_ptr(), doffset.data_ptr(),
        torch.get_num_threads())
    return dw, doffset
