"""graph_conv: the block-sparse spatial graph convolution.

Definition: reference.py; on a CPU: csrc/cpu/graph_conv.inl; on a GPU: adjacency_conv.py and gpu.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from . import _native, reference
from ._library import LIBRARY, PATTERN_SCHEMA, Lasso, check_lasso, check_plane, check_values, implement
from ._memory import empty
from .adjacency_conv import adjacency_conv
from .dispatch import backend_for
from .pattern import BlockPattern
from .sample_graph_conv import sample_graph_conv


@dataclass(frozen=True, eq=False)
class Support:
    """Where a shared adjacency (K, V, V) may be non-zero: entries sorted by subset k, target w, then source v.

    ptr: int32 (K * V + 1,), source: int32 (entries,), flat: int64 (entries,) positions in the flat (K, V, V) tensor.
    """

    shape: tuple[int, int, int]
    ptr: Tensor
    source: Tensor
    flat: Tensor

    @classmethod
    def of(cls, where: Tensor) -> Support:
        """The support of a bool tensor (K, V, V)."""
        subsets, joints, _ = where.shape
        with torch.inference_mode(False):  # it is kept, and may be needed by a later training step
            k, w, v = where.cpu().transpose(1, 2).nonzero(as_tuple=True)
            counts = torch.bincount(k * joints + w, minlength=subsets * joints)
            ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
            return cls((subsets, joints, joints), ptr, v.int(), (k * joints + v) * joints + w)


_supports: Any = WeakIdKeyDictionary()  # bool tensor -> (its version, Support): a layer's support is built once


def support_of(adjacency: Tensor, support: Tensor | Support | None) -> Support:
    """The entries of a shared adjacency that may differ from 0, see ``graph_conv``."""
    check_support(adjacency, support)
    if isinstance(support, Support):
        return support
    if support is None:
        # A trainable adjacency needs the gradient of every entry; a constant one only its non-zeros.
        return Support.of(torch.ones_like(adjacency, dtype=torch.bool) if adjacency.requires_grad else adjacency != 0)
    if support.is_inference():  # it has no version by which a change could be seen
        return Support.of(support)
    known = _supports.get(support)
    if known is None or known[0] != support._version:
        known = (support._version, Support.of(support))
        _supports[support] = known
    return known[1]


def check_support(adjacency: Tensor, support: Tensor | Support | None) -> None:
    """Raises ValueError: ``support`` is not of the adjacency's shape (K, V, V), or a tensor not bool or on another device."""
    if support is None:
        return
    if adjacency.dim() != 3:
        raise ValueError("Expected support=None, or a shared adjacency (K, V, V). "
                         f"Got an adjacency of shape {tuple(adjacency.shape)}.")
    if tuple(support.shape) != tuple(adjacency.shape) or (isinstance(support, Tensor) and support.dtype != torch.bool):
        found = f"{support.dtype} {tuple(support.shape)}" if isinstance(support, Tensor) else f"a Support of {support.shape}"
        raise ValueError(f"Expected support to be a bool tensor of adjacency's shape {tuple(adjacency.shape)}, or its Support. "
                         f"Got {found}.")
    if isinstance(support, Tensor) and support.device != adjacency.device:
        raise ValueError(f"Expected support on the device of adjacency, {adjacency.device}. Got {support.device}; use "
                         ".to(adjacency.device).")


def inside(adjacency: Tensor, support: Tensor | Support | None) -> Tensor:
    """A shared adjacency, 0 outside of its support: for what does not skip those entries."""
    check_support(adjacency, support)
    if support is None:
        return adjacency
    return adjacency * (support if isinstance(support, Tensor) else _mask(support, adjacency))


def graph_conv(x: Tensor, values: Tensor, pattern: BlockPattern, adjacency: Tensor, bias: Tensor | None = None,
               support: Tensor | Support | None = None, lasso: Lasso | None = None, offset: Tensor | None = None) -> Tensor:
    """Block-sparse spatial graph convolution over K subsets of the skeleton graph.

    Y[n,o,t,w] = sum over k, v of A_k[v,w] (b_k[o] + sum over live (o,i,k) of W[o,i,k] X[n,i,t,v])

    Args:
        x: (N, I, T, V), any strides. bfloat16 is summed in float32 and rounded once.
        values: (blocks, bi, bo), the live weights; see BlockPattern.gather.
        pattern: of shape (O, I, K): the subsets take the place of the taps.
        adjacency: shared (K, V, V), per sample (N, K, V, V) or per channel (N, K, O, V, V).
        bias: (K, O) or None.
        support: bool (K, V, V) of a shared adjacency: entries outside count as 0 and get gradient 0, and cost nothing.
            None: the non-zeros of a constant adjacency, every entry of a trainable one.
        lasso: as in temporal_conv.
        offset: (O,) or None, added to Y as it is: a bias that does not pass through the graph.

    Returns:
        (N, O, T, V), contiguous. Stored for the backward pass: x, values and the adjacency; neither W_k X nor X A_k
        exists as a whole tensor.

    Raises:
        ValueError: a shape does not fit. TypeError: x, values, bias and adjacency differ in dtype.
    """
    out_channels, in_channels, subsets = pattern.shape
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"Expected x of shape (N, {in_channels}, T, V). Got {tuple(x.shape)}.")
    joints = x.shape[3]
    wanted = {3: (subsets, joints, joints), 4: (x.shape[0], subsets, joints, joints),
              5: (x.shape[0], subsets, out_channels, joints, joints)}.get(adjacency.dim())
    if wanted is None or tuple(adjacency.shape) != wanted:
        raise ValueError(f"Expected adjacency of shape (K, V, V), (N, K, V, V) or (N, K, O, V, V) with N={x.shape[0]}, "
                         f"K={subsets}, O={out_channels}, V={joints}. Got {tuple(adjacency.shape)}.")
    if adjacency.dtype != x.dtype:
        raise TypeError(f"Expected adjacency to have the dtype of x, {x.dtype}. Got {adjacency.dtype}.")
    check_support(adjacency, support)
    check_plane(x=x)
    check_values(x, values, pattern, bias, (subsets, out_channels), adjacency=adjacency, offset=offset)
    term = check_lasso(lasso, pattern, x)
    if offset is not None and (tuple(offset.shape) != (out_channels,) or offset.dtype != x.dtype):
        raise ValueError(f"Expected offset of shape ({out_channels},) and dtype {x.dtype}. "
                         f"Got {tuple(offset.shape)}, {offset.dtype}.")
    backend = backend_for("graph_conv", x.device, x.dtype, adjacency.dim(), joints)
    if backend != "native":
        adjacency = inside(adjacency, support)
        if backend != "reference":
            return adjacency_conv(x, values, pattern, adjacency, bias, offset, term)
        y = reference.graph_conv(x, term.wrap(values), pattern, adjacency, bias)
        return y if offset is None else y + offset[:, None, None]
    # Gradients of what is small are float32 until the end too: they are rounded once.
    values, adjacency, bias = _native.wide(values), _native.wide(adjacency), None if bias is None else _native.wide(bias)
    of_joints = None if offset is None else _native.wide(offset)[:, None].expand(out_channels, joints)
    if adjacency.dim() == 4:
        y = sample_graph_conv(x, values, pattern, adjacency, of_joints, term)
        if bias is None:
            return y
        # A product and a sum, not a matrix product: BLAS may split its sum differently for other thread counts.
        return y + (bias[:, :, None] * adjacency.sum(2)[:, :, None]).sum(1)[:, :, None].to(y.dtype)
    entries, coefficients, bias_map = prepare(adjacency, bias, support)
    if of_joints is not None:
        bias_map = of_joints if bias_map is None else bias_map + of_joints
    return _GraphConv.apply(x, values, coefficients, bias_map, pattern.row_ptr, pattern.input, pattern.tap, entries.ptr,
                            entries.source, pattern.shape, pattern.block, *term)


def prepare(adjacency: Tensor, bias: Tensor | None, support: Tensor | Support | None) -> tuple[Support, Tensor, Tensor | None]:
    """The entries of a shared adjacency, their coefficients, and what a bias (K, O) becomes behind the adjacency: (O, V)."""
    entries = support_of(adjacency, support)
    coefficients = adjacency.reshape(-1)[entries.flat]
    bias_map = None
    if bias is not None:
        # B[o,w] = sum_k b_k[o] sum_v A_k[v,w]: the bias passes through the adjacency, so it differs from joint to joint.
        whole = adjacency.new_zeros(adjacency.numel()).index_put((entries.flat,), coefficients).view_as(adjacency)
        bias_map = (bias[:, :, None] * whole.sum(1)[:, None, :]).sum(0)
    return entries, coefficients, bias_map


def _mask(support: Support, adjacency: Tensor) -> Tensor:
    flat = torch.zeros(adjacency.numel(), dtype=torch.bool, device=adjacency.device)
    flat[support.flat.to(adjacency.device)] = True
    return flat.view_as(adjacency)


class _GraphConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, coefficients: Tensor, bias_map: Tensor | None, row_ptr: Tensor,
                input: Tensor, tap: Tensor, ptr: Tensor, source: Tensor, shape: tuple[int, ...], block: tuple[int, ...],
                masked: Tensor | None, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, values, coefficients, row_ptr, input, tap, ptr, source, masked, scale)
        ctx.shape, ctx.block, ctx.bias = list(shape), list(block), bias_map is not None
        return torch.ops.sparse_stgcn.graph_conv(x, values, coefficients, bias_map, ptr, source, row_ptr, input, tap, ctx.shape,
                                                 ctx.block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, values, coefficients, row_ptr, input, tap, ptr, source, masked, scale = ctx.saved_tensors
        pattern = (row_ptr, input, tap, ctx.shape, ctx.block)
        need_x, need_values, need_coefficients, need_bias = ctx.needs_input_grad[:4]
        dx = dvalues = dcoefficients = dbias = None
        if need_x or need_coefficients:
            dx, dcoefficients = torch.ops.sparse_stgcn.graph_conv_dx(x, dy, values, coefficients, ptr, source, *pattern,
                                                                     need_coefficients)
        if need_values or need_bias:
            dvalues, dbias = torch.ops.sparse_stgcn.graph_conv_dw(x, dy, values, coefficients, masked, scale, ptr, source,
                                                                  *pattern)
        return (dx if need_x else None, dvalues if need_values else None, dcoefficients if need_coefficients else None,
                dbias if need_bias else None, *([None] * 9))


_GRAPH = "Tensor ptr, Tensor source"
LIBRARY.define("graph_conv(Tensor x, Tensor values, Tensor coefficients, Tensor? bias_map, "
               f"{_GRAPH}, {PATTERN_SCHEMA}) -> Tensor")
LIBRARY.define(f"graph_conv_dx(Tensor x, Tensor dy, Tensor values, Tensor coefficients, {_GRAPH}, {PATTERN_SCHEMA}, "
               "bool need_coefficients) -> (Tensor, Tensor)")
LIBRARY.define("graph_conv_dw(Tensor x, Tensor dy, Tensor values, Tensor coefficients, Tensor? masked, Tensor? scale, "
               f"{_GRAPH}, {PATTERN_SCHEMA}) -> (Tensor, Tensor)")


def _graph_shape(x: Tensor, ptr: Tensor, source: Tensor, shape: list[int]) -> list[int]:
    return [x.shape[0], x.shape[2], x.shape[3], shape[2], source.shape[0]]


def _fake_forward(x: Tensor, values: Tensor, coefficients: Tensor, bias_map: Tensor | None, ptr: Tensor, source: Tensor,
                  row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> Tensor:
    return empty(x, (x.shape[0], shape[0], x.shape[2], x.shape[3]))


@implement("graph_conv", _fake_forward)
def _forward(x: Tensor, values: Tensor, coefficients: Tensor, bias_map: Tensor | None, ptr: Tensor, source: Tensor,
             row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> Tensor:
    y = _fake_forward(x, values, coefficients, bias_map, ptr, source, row_ptr, input, tap, shape, block)
    values, coefficients = values.contiguous(), coefficients.contiguous()
    bias_map = None if bias_map is None else bias_map.contiguous()
    _native.module.graph_forward(
        _native.storage(x), _graph_shape(x, ptr, source, shape), _native.sizes(shape, block, values.shape[0]),
        _native.index(row_ptr, input, tap), [ptr.data_ptr(), source.data_ptr()], x.data_ptr(), x.stride(), values.data_ptr(),
        coefficients.data_ptr(), _native.address(bias_map), y.data_ptr(), torch.get_num_threads())
    return y


def _fake_dx(x: Tensor, dy: Tensor, values: Tensor, coefficients: Tensor, ptr: Tensor, source: Tensor, row_ptr: Tensor,
             input: Tensor, tap: Tensor, shape: list[int], block: list[int], need_coefficients: bool) -> tuple[Tensor, Tensor]:
    return (empty(x, x.shape),
            torch.empty_like(coefficients) if need_coefficients else coefficients.new_empty(0))


@implement("graph_conv_dx", _fake_dx)
def _dx(x: Tensor, dy: Tensor, values: Tensor, coefficients: Tensor, ptr: Tensor, source: Tensor, row_ptr: Tensor,
        input: Tensor, tap: Tensor, shape: list[int], block: list[int], need_coefficients: bool) -> tuple[Tensor, Tensor]:
    dx, dcoefficients = _fake_dx(x, dy, values, coefficients, ptr, source, row_ptr, input, tap, shape, block, need_coefficients)
    values, coefficients = values.contiguous(), coefficients.contiguous()
    _native.module.graph_dx(
        _native.storage(x), _graph_shape(x, ptr, source, shape), _native.sizes(shape, block, values.shape[0]),
        _native.index(row_ptr, input, tap), [ptr.data_ptr(), source.data_ptr()], x.data_ptr(), x.stride(), dy.data_ptr(),
        dy.stride(), values.data_ptr(), coefficients.data_ptr(), dx.data_ptr(),
        dcoefficients.data_ptr() if need_coefficients else 0, torch.get_num_threads())
    return dx, dcoefficients


def _fake_dw(x: Tensor, dy: Tensor, values: Tensor, coefficients: Tensor, masked: Tensor | None, scale: Tensor | None,
             ptr: Tensor, source: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]
             ) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, memory_format=torch.contiguous_format), values.new_empty(shape[0], x.shape[3])


@implement("graph_conv_dw", _fake_dw)
def _dw(x: Tensor, dy: Tensor, values: Tensor, coefficients: Tensor, masked: Tensor | None, scale: Tensor | None,
        ptr: Tensor, source: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]
        ) -> tuple[Tensor, Tensor]:
    dw, dbias_map = _fake_dw(x, dy, values, coefficients, masked, scale, ptr, source, row_ptr, input, tap, shape, block)
    values, coefficients = values.contiguous(), coefficients.contiguous()
    _native.module.graph_dw(
        _native.storage(x), _graph_shape(x, ptr, source, shape), _native.sizes(shape, block, values.shape[0]),
        _native.index(row_ptr, input, tap), [ptr.data_ptr(), source.data_ptr()], x.data_ptr(), x.stride(), dy.data_ptr(),
        dy.stride(), coefficients.data_ptr(), _native.address(masked), values.data_ptr(),
        0.0 if scale is None else float(scale), dw.data_ptr(), dbias_map.data_ptr(), torch.get_num_threads())
    return dw, dbias_map
