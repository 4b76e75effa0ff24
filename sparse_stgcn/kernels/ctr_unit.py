"""CTR-GCN's product with what it multiplies made on the way, eight channels at a time. Native: csrc/cpu/dynamic_wide.inl."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, check_plane, check_values, implement
from ._memory import empty
from .ctr import alike, check_subsets, ctr_aggregate_sum, of_subsets
from .dispatch import beside, runs_natively, widened
from .dynamic import addresses, like, new, strides
from .pattern import BlockPattern
from .temporal_conv import temporal_conv

__all__ = ["ctr_unit"]

_ops = torch.ops.sparse_stgcn


def ctr_unit(embedded: Tensor, x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None,
             conv4_weights: Sequence[Tensor], conv4_biases: Sequence[Tensor], alpha: Tensor, A: Tensor,
             conv4_patterns: Sequence[BlockPattern | None] | None = None) -> Tensor:
    """``ctr_aggregate_sum`` of x3 = W3 x + b3, which exists for eight channels of a sample at a time, in both passes.

    out[n,c,t,w] = sum over k, v of (b3[k,c] + sum over i of W3[k,c,i] x[n,i,t,v]) G[n,k,c,v,w], G as in ``ctr_aggregate_sum``.

    Args:
        embedded: (N, K, 2, R, V), x1 and x2.
        x: (N, I, T, V), any strides.
        values, pattern, bias: W3 of all subsets, one below the other: the pattern is (K C, I, 1), the bias (K C,) or None.
        conv4_weights, conv4_biases, alpha, A, conv4_patterns: as in ``ctr_aggregate_sum``.

    Returns:
        (N, C, T, V), contiguous.

    Stored for the backward pass: the arguments only, so K C channels of a tensor less than the two ops one after the other.

    Raises:
        ValueError: a shape does not fit.
        TypeError: values or bias differ in dtype from x.
    """
    if x.dim() != 4 or embedded.dim() != 5 or x.shape[1] != pattern.shape[1]:
        raise ValueError(f"Expected embedded of shape (N, K, 2, R, V) and x of shape (N, {pattern.shape[1]}, T, V). "
                         f"Got {tuple(embedded.shape)} and {tuple(x.shape)}.")
    subsets, (outputs, _, taps) = embedded.shape[1], pattern.shape
    if taps != 1 or not subsets or outputs % subsets:
        raise ValueError(f"Expected pattern of shape (K C, I, 1), K = {subsets}. Got {pattern.shape}.")
    check_plane(x=x)
    x = beside(widened(x), values)
    check_values(x, values, pattern, bias, (outputs,))
    shape = (x.shape[0], subsets, outputs // subsets, *x.shape[2:])
    patterns = check_subsets(embedded, shape, conv4_weights, conv4_biases, alpha, A, conv4_patterns)
    if not alike(patterns) or not pays(pattern) or not runs_natively("ctr_unit", x):
        wide = temporal_conv(x, values, pattern, bias).unflatten(1, (subsets, -1))
        return ctr_aggregate_sum(embedded, wide, conv4_weights, conv4_biases, alpha, A, conv4_patterns)
    embedded, alpha, A = like(x, embedded, alpha, A)
    return _CtrUnit.apply(embedded, x, values, bias, *of_subsets(x, conv4_weights, conv4_biases, patterns), alpha, A,
                          pattern.row_ptr, pattern.input, pattern.tap, pattern.shape, pattern.block)


def pays(pattern: BlockPattern) -> bool:
    """Making rows twice is cheaper than moving them, but for many live blocks of few outputs: a load for each."""
    return pattern.block[0] >= 4 or pattern.density < 0.3


class _CtrUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: Tensor, x: Tensor, values: Tensor, conv_bias: Tensor | None, weight: Tensor, bias: Tensor,
                row_ptr: Tensor | None, input: Tensor | None, blocks: list[int], shape: list[int], block: list[int],
                alpha: Tensor, A: Tensor, *conv: Any) -> Tensor:
        *index, conv_shape, conv_block = conv
        arguments = embedded, x, values, conv_bias, weight, bias, alpha, A, row_ptr, input, *index
        ctx.save_for_backward(*arguments)
        ctx.sizes = blocks, shape, block, list(conv_shape), list(conv_block)
        return _ops.ctr_unit(*arguments, *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dembedded, dx, dvalues, dconv_bias, dweight, dbias, dalpha, dA = _ops.ctr_unit_backward(dy, *saved, *ctx.sizes)
        return (dembedded, dx, dvalues, None if saved[3] is None else dconv_bias, dweight, dbias, *[None] * 5, dalpha, dA,
                *[None] * 5)


_UNIT = ("Tensor embedded, Tensor x, Tensor values, Tensor? conv_bias, Tensor weight, Tensor bias, Tensor alpha, Tensor A, "
         "Tensor? row_ptr, Tensor? input, Tensor conv_row_ptr, Tensor conv_input, Tensor conv_tap, int[] blocks, int[] shape, "
         "int[] block, int[] conv_shape, int[] conv_block")
LIBRARY.define(f"ctr_unit({_UNIT}) -> Tensor")
LIBRARY.define(f"ctr_unit_backward(Tensor dy, {_UNIT}) -> ({', '.join(['Tensor'] * 8)})")


def _fake_unit(embedded: Tensor, x: Tensor, values: Tensor, conv_bias: Tensor | None, weight: Tensor, bias: Tensor,
               alpha: Tensor, A: Tensor, row_ptr: Tensor | None, input: Tensor | None, conv_row_ptr: Tensor,
               conv_input: Tensor, conv_tap: Tensor, blocks: list[int], shape: list[int], block: list[int],
               conv_shape: list[int], conv_block: list[int]) -> Tensor:
    return empty(x, (x.shape[0], shape[0], x.shape[2], x.shape[3]))


def _sizes(embedded: Tensor, x: Tensor, shape: list[int]) -> list[int]:
    return [x.shape[0], embedded.shape[1], shape[0], embedded.shape[3], x.shape[2], x.shape[3]]


@implement("ctr_unit", _fake_unit)
def _unit(embedded: Tensor, x: Tensor, values: Tensor, conv_bias: Tensor | None, weight: Tensor, bias: Tensor, alpha: Tensor,
          A: Tensor, row_ptr: Tensor | None, input: Tensor | None, conv_row_ptr: Tensor, conv_input: Tensor, conv_tap: Tensor,
          blocks: list[int], shape: list[int], block: list[int], conv_shape: list[int], conv_block: list[int]) -> Tensor:
    y = empty(x, (x.shape[0], shape[0], x.shape[2], x.shape[3]))
    weight, bias, A, values = weight.contiguous(), bias.contiguous(), A.contiguous(), values.contiguous()
    conv_bias = None if conv_bias is None else conv_bias.contiguous()
    _native.module.ctr_forward(
        x.dtype == torch.float64, _sizes(embedded, x, shape), _native.sizes(shape, block, 0), blocks,
        [_native.address(row_ptr), _native.address(input)],
        [embedded.data_ptr(), 0, *addresses(weight, bias, alpha, A, y)], strides(embedded, x),
        _native.sizes(conv_shape, conv_block, values.shape[0]), _native.index(conv_row_ptr, conv_input, conv_tap),
        [*addresses(x, values), _native.address(conv_bias)], torch.get_num_threads())
    return y


def _fake_unit_backward(dy: Tensor, embedded: Tensor, x: Tensor, values: Tensor, conv_bias: Tensor | None, weight: Tensor,
                        bias: Tensor, alpha: Tensor, A: Tensor, row_ptr: Tensor | None, input: Tensor | None,
                        conv_row_ptr: Tensor, conv_input: Tensor, conv_tap: Tensor, blocks: list[int], shape: list[int],
                        block: list[int], conv_shape: list[int], conv_block: list[int]) -> tuple[Tensor, ...]:
    dembedded, dx, dvalues, dweight, dbias, dalpha, dA = new(embedded, x, values, weight, bias, alpha, A)
    return dembedded, dx, dvalues, values.new_empty(conv_shape[0]), dweight, dbias, dalpha, dA


@implement("ctr_unit_backward", _fake_unit_backward)
def _unit_backward(dy: Tensor, embedded: Tensor, x: Tensor, values: Tensor, conv_bias: Tensor | None, weight: Tensor,
                   bias: Tensor, alpha: Tensor, A: Tensor, row_ptr: Tensor | None, input: Tensor | None,
                   conv_row_ptr: Tensor, conv_input: Tensor, conv_tap: Tensor, blocks: list[int], shape: list[int],
                   block: list[int], conv_shape: list[int], conv_block: list[int]) -> tuple[Tensor, ...]:
    dembedded, dx, dvalues, dweight, dbias, dalpha, dA = new(embedded, x, values, weight, bias, alpha, A)
    dconv_bias = values.new_empty(conv_shape[0])
    weight, bias, A, values = weight.contiguous(), bias.contiguous(), A.contiguous(), values.contiguous()
    conv_bias = None if conv_bias is None else conv_bias.contiguous()
    _native.module.ctr_backward(
        x.dtype == torch.float64, _sizes(embedded, x, shape), _native.sizes(shape, block, 0), blocks,
        [_native.address(row_ptr), _native.address(input)],
        [embedded.data_ptr(), 0, *addresses(weight, bias, alpha, A, dy, dembedded), 0,
         *addresses(dweight, dbias, dalpha, dA)], strides(embedded, x, dy),
        _native.sizes(conv_shape, conv_block, values.shape[0]), _native.index(conv_row_ptr, conv_input, conv_tap),
        [*addresses(x, values), _native.address(conv_bias), *addresses(dx, dvalues, dconv_bias)], torch.get_num_threads())
    return dembedded, dx, dvalues, dconv_bias, dweight, dbias, dalpha, dA
