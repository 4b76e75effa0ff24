"""AA-GCN's graphs with their embeddings made on the way, eight channels at a time. Native code: csrc/cpu/dynamic_wide.inl."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, check_plane, check_values, implement
from .ctr_unit import pays
from .dispatch import beside, runs_natively, widened
from .dynamic import aa_graph, addresses, check_graph, like, new
from .pattern import BlockPattern
from .temporal_conv import temporal_conv

__all__ = ["aa_unit_graph"]

_ops = torch.ops.sparse_stgcn


def aa_unit_graph(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, alpha: Tensor, A: Tensor) -> Tensor:
    """``aa_graph`` of the embeddings W x + b, of which eight channels of a sample exist at a time, in both passes.

    G[n,k,v,w] = A[k,v,w] + alpha tanh(sum over r, t of a[n,k,r,t,v] b[n,k,r,t,w] / (R T)), a_k and b_k being rows of W x + b.

    Args:
        x: (N, I, T, V), any strides.
        values, pattern, bias: W of all a_k, then of all b_k, one below the other: the pattern is (2 K R, I, 1), the bias
            (2 K R,) or None.
        alpha: one number.
        A: (K, V, V).

    Returns:
        (N, K, V, V), contiguous. Stored for the backward pass: the arguments, and as many numbers as the result has.

    Raises:
        ValueError: a shape does not fit.
        TypeError: values or bias differ in dtype from x.
    """
    outputs, inputs, taps = pattern.shape
    if x.dim() != 4 or x.shape[1] != inputs:
        raise ValueError(f"Expected x of shape (N, {inputs}, T, V). Got {tuple(x.shape)}.")
    if A.dim() != 3 or not A.shape[0] or taps != 1 or outputs % (2 * A.shape[0]):
        raise ValueError("Expected A of shape (K, V, V) and pattern of shape (2 K R, I, 1). "
                         f"Got {tuple(A.shape)} and {pattern.shape}.")
    check_graph(A, (A.shape[0], x.shape[3], x.shape[3]), alpha=alpha)
    check_plane(x=x)
    x = beside(widened(x), values)
    check_values(x, values, pattern, bias, (outputs,))
    if not pays(pattern) or not runs_natively("aa_unit_graph", x):
        embedded = temporal_conv(x, values, pattern, bias).unflatten(1, (2, A.shape[0], -1))
        return aa_graph(embedded, alpha, A)
    alpha, A = like(x, alpha, A)
    graphs, _ = _AaUnitGraph.apply(x, values, bias, alpha, A, pattern.row_ptr, pattern.input, pattern.tap, pattern.shape,
                                   pattern.block)
    return graphs


class _AaUnitGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, alpha: Tensor, A: Tensor, row_ptr: Tensor,
                input: Tensor, tap: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.sizes = list(shape), list(block)
        graphs, similar = _ops.aa_unit_graph(x, values, bias, alpha, A, row_ptr, input, tap, *ctx.sizes)
        ctx.mark_non_differentiable(similar)
        ctx.save_for_backward(x, values, bias, alpha, similar, row_ptr, input, tap)
        return graphs, similar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgraphs: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx, dvalues, dbias, dalpha, dA = _ops.aa_unit_graph_backward(dgraphs, *saved, *ctx.sizes)
        return dx, dvalues, None if saved[2] is None else dbias, dalpha, dA, *[None] * 5


_CONV = "Tensor row_ptr, Tensor input, Tensor tap, int[] shape, int[] block"
LIBRARY.define(f"aa_unit_graph(Tensor x, Tensor values, Tensor? bias, Tensor alpha, Tensor A, {_CONV}) -> (Tensor, Tensor)")
LIBRARY.define("aa_unit_graph_backward(Tensor dgraphs, Tensor x, Tensor values, Tensor? bias, Tensor alpha, Tensor similar, "
               f"{_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def _fake_graph(x: Tensor, values: Tensor, bias: Tensor | None, alpha: Tensor, A: Tensor, row_ptr: Tensor, input: Tensor,
                tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], *A.shape)), x.new_empty((x.shape[0], *A.shape))


def _sizes(x: Tensor, subsets: int, shape: list[int]) -> list[int]:
    return [x.shape[0], subsets, 1, shape[0] // (2 * subsets), x.shape[2], x.shape[3]]


@implement("aa_unit_graph", _fake_graph)
def _graph(x: Tensor, values: Tensor, bias: Tensor | None, alpha: Tensor, A: Tensor, row_ptr: Tensor, input: Tensor,
           tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor]:
    graphs, similar = _fake_graph(x, values, bias, alpha, A, row_ptr, input, tap, shape, block)
    values, bias, A = values.contiguous(), None if bias is None else bias.contiguous(), A.contiguous()
    _native.module.aa_unit_graphs(
        x.dtype == torch.float64, _sizes(x, A.shape[0], shape),
        [*addresses(x, values), _native.address(bias), *addresses(alpha, A, graphs, similar)], x.stride(),
        _native.sizes(shape, block, values.shape[0]), _native.index(row_ptr, input, tap), torch.get_num_threads())
    return graphs, similar


def _fake_backward(dgraphs: Tensor, x: Tensor, values: Tensor, bias: Tensor | None, alpha: Tensor, similar: Tensor,
                   row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dvalues, dalpha = new(x, values, alpha)
    return dx, dvalues, values.new_empty(shape[0]), dalpha, similar.new_empty(similar.shape[1:])


@implement("aa_unit_graph_backward", _fake_backward)
def _backward(dgraphs: Tensor, x: Tensor, values: Tensor, bias: Tensor | None, alpha: Tensor, similar: Tensor, row_ptr: Tensor,
              input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _fake_backward(dgraphs, x, values, bias, alpha, similar, row_ptr, input, tap, shape, block)
    dgraphs, values, bias = dgraphs.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
    _native.module.aa_unit_graphs_backward(
        x.dtype == torch.float64, _sizes(x, similar.shape[1], shape),
        [*addresses(x, values), _native.address(bias), *addresses(alpha, similar, dgraphs, *gradients)], x.stride(),
        _native.sizes(shape, block, values.shape[0]), _native.index(row_ptr, input, tap), torch.get_num_threads())
    return gradients
