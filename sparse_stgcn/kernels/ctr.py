"""CTR-GCN's product with a graph for every channel. Definition: reference_dynamic.py; native code: csrc/cpu/dynamic_ctr.inl."""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference_dynamic
from ._library import LIBRARY, check_plane, implement
from ._memory import empty
from .dispatch import backend_for, widened
from .dynamic import addresses, check_graph, like, new, strides
from .pattern import BlockPattern

__all__ = ["ctr_aggregate", "ctr_aggregate_sum"]

_ops = torch.ops.sparse_stgcn
_GIVEN: tuple[list[int], ...] = ([], [0, 0, 0], [])  # x3 is a tensor, see ctr_unit.py
_DENSE = (8, 1)  # a dense W4 is taken in rows of eight channels, which share each map that is read


def ctr_aggregate(x1: Tensor, x2: Tensor, x3: Tensor, conv4_weight: Tensor, conv4_bias: Tensor, alpha: Tensor,
                  A: Tensor, conv4_pattern: BlockPattern | None = None) -> Tensor:
    """out[n,c,t,w] = sum over v of x3[n,c,t,v] G[n,c,v,w]: ``ctr_aggregate_sum`` of one subset.

    Args:
        x1, x2: (N, R, V), the embedded means over time, any strides.
        x3: (N, C, T, V), any strides.
        conv4_weight: W4 (C, R), or its live blocks (blocks, bi, bo) where ``conv4_pattern`` is given.
        conv4_bias: b4 (C,).
        alpha: one number.
        A: (V, V), the same for all samples and channels.
        conv4_pattern: of shape (C, R, 1).

    Returns:
        (N, C, T, V), contiguous.

    Raises:
        ValueError: a shape does not fit.
    """
    if x3.dim() != 4 or x1.dim() != 3 or x1.shape != x2.shape or (x1.shape[0], x1.shape[2]) != (x3.shape[0], x3.shape[3]):
        raise ValueError("Expected x1 and x2 of shape (N, R, V), x3 of shape (N, C, T, V). "
                         f"Got {tuple(x1.shape)}, {tuple(x2.shape)} and {tuple(x3.shape)}.")
    check_graph(A, (x3.shape[3], x3.shape[3]), alpha=alpha)
    return ctr_aggregate_sum(torch.stack([x1, x2], 1)[:, None], x3[:, None], [conv4_weight], [conv4_bias], alpha, A[None],
                             None if conv4_pattern is None else [conv4_pattern])


def ctr_aggregate_sum(embedded: Tensor, wide: Tensor, conv4_weights: Sequence[Tensor], conv4_biases: Sequence[Tensor],
                      alpha: Tensor, A: Tensor, conv4_patterns: Sequence[BlockPattern | None] | None = None) -> Tensor:
    """out[n,c,t,w] = sum over k, v of x3[n,k,c,t,v] G[n,k,c,v,w], with a graph of its own for every channel.

    G[n,k,c,v,w] = A[k,v,w] + alpha (b4_k[c] + sum over r of W4_k[c,r] tanh(x1[n,k,r,v] - x2[n,k,r,w])): the refined
    topology of CTR-GCN (Chen et al. 2021, Eq. 2-3) as PYSKL orients it, summed over the subsets k.

    Args:
        embedded: (N, K, 2, R, V), x1 and x2: the embedded means over time, any strides.
        wide: (N, K, C, T, V), x3, any strides.
        conv4_weights: of each subset W4 (C, R), or its live blocks (blocks, bi, bo) where ``conv4_patterns`` is given.
        conv4_biases: of each subset b4 (C,).
        alpha: one number.
        A: (K, V, V), the same for all samples and channels.
        conv4_patterns: of shape (C, R, 1), None for a dense W4; subsets of different block sizes run one by one.

    Returns:
        (N, C, T, V), contiguous.

    Stored for the backward pass: the arguments only. Natively a thread holds the tanh maps (V, V) of one sample and subset, of
    those r only that a live block reads, and the graphs of eight channels; in the reference the maps (N, R, V, V) and the
    graphs (N, C, V, V) of a subset exist during either pass.

    Raises:
        ValueError: a shape does not fit.
    """
    if wide.dim() != 5 or embedded.dim() != 5:
        raise ValueError("Expected embedded of shape (N, K, 2, R, V), wide of shape (N, K, C, T, V). "
                         f"Got {tuple(embedded.shape)} and {tuple(wide.shape)}.")
    check_plane(wide=wide)
    subsets = wide.shape[1]
    patterns = check_subsets(embedded, tuple(wide.shape), conv4_weights, conv4_biases, alpha, A, conv4_patterns)
    if not alike(patterns):  # one by one
        parts = [ctr_aggregate_sum(embedded[:, k:k + 1], wide[:, k:k + 1], conv4_weights[k:k + 1], conv4_biases[k:k + 1], alpha,
                                   A[k:k + 1], patterns[k:k + 1]) for k in range(subsets)]
        return reduce(add, parts)
    wide = widened(wide)
    embedded, wide, alpha, A = like(wide, embedded, wide, alpha, A)
    if backend_for("ctr_aggregate", wide.device, wide.dtype) == "reference":
        weights, biases = like(wide, *conv4_weights), like(wide, *conv4_biases)
        parts = [reference_dynamic.ctr_aggregate(embedded[:, k, 0], embedded[:, k, 1], wide[:, k], weights[k], biases[k], alpha,
                                                 A[k], patterns[k]) for k in range(subsets)]
        return reduce(add, parts)
    weight, bias, *of_patterns = of_subsets(wide, conv4_weights, conv4_biases, patterns)
    return _CtrAggregate.apply(embedded, wide, weight, bias, alpha, A, *of_patterns)


def check_subsets(embedded: Tensor, wide: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor], alpha: Tensor,
                  A: Tensor, patterns: Sequence[BlockPattern | None] | None) -> list[BlockPattern | None]:
    """The pattern of every subset, where the arguments fit x3 of shape ``wide`` (N, K, C, T, V).

    Raises:
        ValueError: a shape does not fit.
    """
    batch, subsets, channels, _, joints = wide
    if embedded.shape[2] != 2 or (*embedded.shape[:2], embedded.shape[4]) != (batch, subsets, joints):
        raise ValueError("Expected embedded of shape (N, K, 2, R, V), wide of shape (N, K, C, T, V). "
                         f"Got {tuple(embedded.shape)} and {wide}.")
    shape = (channels, embedded.shape[3])
    found: list[BlockPattern | None] = [None] * subsets if patterns is None else list(patterns)
    if not len(weights) == len(biases) == len(found) == subsets:
        raise ValueError(f"Expected weights, biases and patterns of {subsets} subsets. "
                         f"Got {len(weights)}, {len(biases)} and {len(found)}.")
    for weight, bias, pattern in zip(weights, biases, found, strict=True):
        if pattern is not None and pattern.shape != (*shape, 1):
            raise ValueError(f"Expected conv4_pattern of shape (C, R, 1) = {(*shape, 1)}. Got {pattern.shape}.")
        wanted = shape if pattern is None else pattern.values_shape
        if tuple(weight.shape) != wanted or tuple(bias.shape) != shape[:1]:
            raise ValueError(f"Expected conv4_weight of shape {wanted} and conv4_bias of shape {shape[:1]}. "
                             f"Got {tuple(weight.shape)} and {tuple(bias.shape)}.")
    check_graph(A, (subsets, joints, joints), alpha=alpha)
    return found


def alike(patterns: Sequence[BlockPattern | None]) -> bool:
    """Whether one call takes all subsets: all dense, or all in blocks of one size."""
    return len({None if pattern is None else pattern.block for pattern in patterns}) == 1


def of_subsets(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], patterns: Sequence[BlockPattern | None]
               ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[int], list[int], list[int]]:
    """W4 and b4 of all subsets as raw ops take them, in the dtype of x: weight, bias, row_ptr, input, blocks, shape, block."""
    row_ptr = input = None
    live = [pattern for pattern in patterns if pattern is not None]
    if live:
        row_ptr = torch.stack([pattern.row_ptr for pattern in live])
        input = torch.cat([pattern.input for pattern in live])
    shape = list(live[0].shape) if live else [*weights[0].shape, 1]
    return (torch.cat([weight.flatten() for weight in like(x, *weights)]), torch.stack(like(x, *biases)), row_ptr, input,
            [0 if pattern is None else pattern.num_blocks for pattern in patterns], shape,
            list(live[0].block if live else _DENSE))


class _CtrAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: Tensor, wide: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
                row_ptr: Tensor | None, input: Tensor | None, blocks: list[int], shape: list[int], block: list[int]) -> Tensor:
        arguments = (embedded, wide, weight, bias, alpha, A, row_ptr, input)
        ctx.save_for_backward(*arguments)
        ctx.sizes = blocks, shape, block
        return _ops.ctr_aggregate(*arguments, *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_ops.ctr_aggregate_backward(dy, *ctx.saved_tensors, *ctx.sizes), *([None] * 5)


_CTR = ("Tensor embedded, Tensor wide, Tensor weight, Tensor bias, Tensor alpha, Tensor A, Tensor? row_ptr, Tensor? input, "
        "int[] blocks, int[] shape, int[] block")
LIBRARY.define(f"ctr_aggregate({_CTR}) -> Tensor")
LIBRARY.define(f"ctr_aggregate_backward(Tensor dy, {_CTR}) -> ({', '.join(['Tensor'] * 6)})")


def _ctr_sizes(embedded: Tensor, wide: Tensor) -> list[int]:
    batch, subsets, channels, frames, joints = wide.shape
    return [batch, subsets, channels, embedded.shape[3], frames, joints]


def _fake_ctr(embedded: Tensor, wide: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor, row_ptr: Tensor | None,
              input: Tensor | None, blocks: list[int], shape: list[int], block: list[int]) -> Tensor:
    return empty(wide, (wide.shape[0], *wide.shape[2:]))


@implement("ctr_aggregate", _fake_ctr)
def _ctr(embedded: Tensor, wide: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor, row_ptr: Tensor | None,
         input: Tensor | None, blocks: list[int], shape: list[int], block: list[int]) -> Tensor:
    y = _fake_ctr(embedded, wide, weight, bias, alpha, A, row_ptr, input, blocks, shape, block)
    weight, bias, A = weight.contiguous(), bias.contiguous(), A.contiguous()
    _native.module.ctr_forward(
        wide.dtype == torch.float64, _ctr_sizes(embedded, wide), _native.sizes(shape, block, 0), blocks,
        [_native.address(row_ptr), _native.address(input)], addresses(embedded, wide, weight, bias, alpha, A, y),
        strides(embedded, wide), *_GIVEN, torch.get_num_threads())
    return y


def _fake_ctr_backward(dy: Tensor, embedded: Tensor, wide: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
                       row_ptr: Tensor | None, input: Tensor | None, blocks: list[int], shape: list[int], block: list[int]
                       ) -> tuple[Tensor, ...]:
    return new(embedded, wide, weight, bias, alpha, A)


@implement("ctr_aggregate_backward", _fake_ctr_backward)
def _ctr_backward(dy: Tensor, embedded: Tensor, wide: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
                  row_ptr: Tensor | None, input: Tensor | None, blocks: list[int], shape: list[int], block: list[int]
                  ) -> tuple[Tensor, ...]:
    gradients = new(embedded, wide, weight, bias, alpha, A)
    weight, bias, A = weight.contiguous(), bias.contiguous(), A.contiguous()
    _native.module.ctr_backward(
        wide.dtype == torch.float64, _ctr_sizes(embedded, wide), _native.sizes(shape, block, 0), blocks,
        [_native.address(row_ptr), _native.address(input)],
        addresses(embedded, wide, weight, bias, alpha, A, dy, *gradients), strides(embedded, wide, dy),
        *_GIVEN, torch.get_num_threads())
    return gradients
