"""Products with graphs that depend on the sample: the aggregations of AA-GCN, CTR-GCN and DG-STGCN.

Everywhere index v is the joint that sends and w the joint that receives: out[w] = sum over v of in[v] G[v, w].
Definition: reference_dynamic.py; native code: csrc/cpu/dynamic_aa.inl, dynamic_ctr.inl, dynamic_dg.inl.

Natively a graph is made where it is used, one or eight at a time, and made again in the backward pass: for that the arguments
are stored and nothing else. tanh has an absolute error of 3 eps, which is what a sum of numbers of size 1 can use.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference_dynamic
from ._library import LIBRARY, implement
from .dispatch import backend_for
from .pattern import BlockPattern
from .split import memory, place_of

__all__ = ["aa_aggregate", "ctr_aggregate", "dg_aggregate"]

_ops = torch.ops.sparse_stgcn


def aa_aggregate(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    """out[n,c,t,w] = sum over v of x[n,c,t,v] G[n,v,w], with a graph of its own for every sample.

    G[n,v,w] = A[v,w] + alpha tanh(1 / (R T) sum over r, t of a[n,r,t,v] b[n,r,t,w]): the adaptive graph of
    2s-AGCN (Shi et al. 2019, Eq. 3) with PYSKL's tanh in place of the softmax.

    Args:
        x: (N, C, T, V), any strides.
        a, b: (N, R, T, V), any strides.
        alpha: one number.
        A: (V, V).

    Returns:
        (N, C, T, V), contiguous.

    Stored for the backward pass: the arguments only. Natively four maps (V, V) a sample exist during the forward pass and
    nine during the backward pass, which makes the graph again; in the reference two maps a sample are stored.

    Raises:
        ValueError: a shape does not fit.
    """
    if x.dim() != 4 or a.dim() != 4 or a.shape != b.shape or (a.shape[0], *a.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError("Expected x of shape (N, C, T, V), a and b of shape (N, R, T, V). "
                         f"Got {tuple(x.shape)}, {tuple(a.shape)} and {tuple(b.shape)}.")
    _check_graph(A, (x.shape[3], x.shape[3]), alpha=alpha)
    arguments = _like(x, x, a, b, alpha, A)
    if backend_for("aa_aggregate", x.device, x.dtype) == "reference":
        return reference_dynamic.aa_aggregate(*arguments)
    return _AaAggregate.apply(*arguments)


def ctr_aggregate(x1: Tensor, x2: Tensor, x3: Tensor, conv4_weight: Tensor, conv4_bias: Tensor, alpha: Tensor,
                  A: Tensor, conv4_pattern: BlockPattern | None = None) -> Tensor:
    """out[n,c,t,w] = sum over v of x3[n,c,t,v] G[n,c,v,w], with a graph of its own for every channel.

    G[n,c,v,w] = A[v,w] + alpha (b4[c] + sum over r of W4[c,r] tanh(x1[n,r,v] - x2[n,r,w])): the refined
    topology of CTR-GCN (Chen et al. 2021, Eq. 2-3) as PYSKL orients it.

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

    Stored for the backward pass: the arguments only. Natively a thread holds the tanh maps (V, V) of one sample, of those r
    only that a live block reads, and the graphs of eight channels; in the reference the maps (N, R, V, V) and the graphs
    (N, C, V, V) exist during either pass.

    Raises:
        ValueError: a shape does not fit.
    """
    if x3.dim() != 4 or x1.dim() != 3 or x1.shape != x2.shape or (x1.shape[0], x1.shape[2]) != (x3.shape[0], x3.shape[3]):
        raise ValueError("Expected x1 and x2 of shape (N, R, V), x3 of shape (N, C, T, V). "
                         f"Got {tuple(x1.shape)}, {tuple(x2.shape)} and {tuple(x3.shape)}.")
    shape = (x3.shape[1], x1.shape[1])
    if conv4_pattern is not None and conv4_pattern.shape != (*shape, 1):
        raise ValueError(f"Expected conv4_pattern of shape (C, R, 1) = {(*shape, 1)}. Got {conv4_pattern.shape}.")
    wanted = shape if conv4_pattern is None else conv4_pattern.values_shape
    if tuple(conv4_weight.shape) != wanted or tuple(conv4_bias.shape) != shape[:1]:
        raise ValueError(f"Expected conv4_weight of shape {wanted} and conv4_bias of shape {shape[:1]}. "
                         f"Got {tuple(conv4_weight.shape)} and {tuple(conv4_bias.shape)}.")
    _check_graph(A, (x3.shape[3], x3.shape[3]), alpha=alpha)
    arguments = _like(x3, x1, x2, x3, conv4_weight, conv4_bias, alpha, A)
    if backend_for("ctr_aggregate", x3.device, x3.dtype) == "reference":
        x1, x2, x3, conv4_weight, conv4_bias, alpha, A = arguments
        return reference_dynamic.ctr_aggregate(x1, x2, x3, conv4_weight, conv4_bias, alpha, A, conv4_pattern)
    index = (None, None) if conv4_pattern is None else (conv4_pattern.row_ptr, conv4_pattern.input)
    block = _DENSE if conv4_pattern is None else conv4_pattern.block
    return _CtrAggregate.apply(*arguments, *index, (*shape, 1), block)


def dg_aggregate(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    """out[n,k,c,t,w] = sum over v of x[n,k,c,t,v] G[n,k,c,v,w], with a graph for every subset and channel.

    G[n,k,c,v,w] = A[k,v,w] + alpha tanh(x1[n,k,c,v] - x2[n,k,c,w])
                 + beta softmax over v of (sum over c of x1[n,k,c,v] x2[n,k,c,w]);
    the dynamic group graph of DG-STGCN (Duan et al. 2022, section 3.2).

    Args:
        x: (N, K, C, T, V), any strides.
        x1, x2: (N, K, C, V), the embedded means over time, any strides.
        alpha, beta: one number each.
        A: (K, V, V).

    Returns:
        (N, K, C, T, V), contiguous.

    Stored for the backward pass: the arguments only. Natively a thread holds one graph at a time; in the reference the graphs
    (N, K, C, V, V) exist during either pass.

    Raises:
        ValueError: a shape does not fit.
    """
    if x.dim() != 5 or x1.shape != x2.shape or tuple(x1.shape) != (*x.shape[:3], x.shape[4]):
        raise ValueError("Expected x of shape (N, K, C, T, V), x1 and x2 of shape (N, K, C, V). "
                         f"Got {tuple(x.shape)}, {tuple(x1.shape)} and {tuple(x2.shape)}.")
    _check_graph(A, (x.shape[1], x.shape[4], x.shape[4]), alpha=alpha, beta=beta)
    arguments = _like(x, x, x1, x2, alpha, beta, A)
    if backend_for("dg_aggregate", x.device, x.dtype) == "reference":
        return reference_dynamic.dg_aggregate(*arguments)
    return _DgAggregate.apply(*arguments)


def _check_graph(A: Tensor, shape: tuple[int, ...], **scales: Tensor) -> None:
    if tuple(A.shape) != shape:
        raise ValueError(f"Expected A of shape {shape}. Got {tuple(A.shape)}.")
    for name, scale in scales.items():
        if scale.numel() != 1:
            raise ValueError(f"Expected {name} to be one number. Got shape {tuple(scale.shape)}.")


def _like(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of ``x``: under autocast parameters are float32 beside half-precision activations."""
    return [tensor.to(x.dtype) for tensor in tensors]


class _AaAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return _ops.aa_aggregate(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return _ops.aa_aggregate_backward(dy, *ctx.saved_tensors)


class _CtrAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, x3: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
                row_ptr: Tensor | None, input: Tensor | None, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
        arguments = (x1, x2, x3, weight, bias, alpha, A, row_ptr, input)
        ctx.save_for_backward(*arguments)
        ctx.sizes, ctx.place = (list(shape), list(block)), place_of(x3)
        return _ops.ctr_aggregate(*arguments, *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x3 = ctx.saved_tensors[2]
        dx3 = memory(x3, ctx.place)
        dx1, dx2, *rest = _ops.ctr_aggregate_backward(dy, *ctx.saved_tensors, *ctx.sizes, dx3)
        return dx1, dx2, dx3, *rest, None, None, None, None


class _DgAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return _ops.dg_aggregate(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return _ops.dg_aggregate_backward(dy, *ctx.saved_tensors)


_AA = "Tensor x, Tensor a, Tensor b, Tensor alpha, Tensor A"
_CTR = ("Tensor x1, Tensor x2, Tensor x3, Tensor weight, Tensor bias, Tensor alpha, Tensor A, Tensor? row_ptr, Tensor? input, "
        "int[] shape, int[] block")
_DG = "Tensor x, Tensor x1, Tensor x2, Tensor alpha, Tensor beta, Tensor A"
for _name, _schema, _written, _gradients in (("aa", _AA, "", 5), ("ctr", _CTR, ", Tensor(a!) dx3", 6), ("dg", _DG, "", 6)):
    LIBRARY.define(f"{_name}_aggregate({_schema}) -> Tensor")
    LIBRARY.define(f"{_name}_aggregate_backward(Tensor dy, {_schema}{_written}) -> ({', '.join(['Tensor'] * _gradients)})")

_DENSE = (8, 1)  # a dense W4 is taken in rows of eight channels, which share each map that is read


def _new(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in tensors]


def _fake_aa(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    return _new(x)[0]


@implement("aa_aggregate", _fake_aa)
def _aa(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    y, A = _fake_aa(x, a, b, alpha, A), A.contiguous()
    _native.module.aa_forward(x.dtype == torch.float64, _aa_sizes(x, a), _addresses(x, a, b, alpha, A, y), _strides(x, a, b),
                              torch.get_num_threads())
    return y


def _aa_sizes(x: Tensor, a: Tensor) -> list[int]:
    return [x.shape[0], 1, x.shape[1], a.shape[1], x.shape[2], x.shape[3]]


def _fake_aa_backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    return _new(x, a, b, alpha, A)


@implement("aa_aggregate_backward", _fake_aa_backward)
def _aa_backward(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    gradients, A = _fake_aa_backward(dy, x, a, b, alpha, A), A.contiguous()
    _native.module.aa_backward(x.dtype == torch.float64, _aa_sizes(x, a), _addresses(x, a, b, alpha, A, dy, *gradients),
                               _strides(x, a, b, dy), torch.get_num_threads())
    return gradients


def _ctr_sizes(x1: Tensor, x3: Tensor) -> list[int]:
    return [x3.shape[0], 1, x3.shape[1], x1.shape[1], x3.shape[2], x3.shape[3]]


def _ctr_pattern(weight: Tensor, row_ptr: Tensor | None, input: Tensor | None, shape: list[int], block: list[int]
                 ) -> tuple[list[int], list[int]]:
    return (_native.sizes(shape, block, 0 if row_ptr is None else weight.shape[0]),
            [_native.address(row_ptr), _native.address(input), 0])


def _embedded_strides(x1: Tensor, x2: Tensor) -> list[tuple[int, ...]]:
    return [(tensor.stride(0), tensor.stride(1), 0, tensor.stride(2)) for tensor in (x1, x2)]


def _fake_ctr(x1: Tensor, x2: Tensor, x3: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
              row_ptr: Tensor | None, input: Tensor | None, shape: list[int], block: list[int]) -> Tensor:
    return _new(x3)[0]


@implement("ctr_aggregate", _fake_ctr)
def _ctr(x1: Tensor, x2: Tensor, x3: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
         row_ptr: Tensor | None, input: Tensor | None, shape: list[int], block: list[int]) -> Tensor:
    y, = _new(x3)
    weight, bias, A = weight.contiguous(), bias.contiguous(), A.contiguous()
    _native.module.ctr_forward(
        x3.dtype == torch.float64, _ctr_sizes(x1, x3), *_ctr_pattern(weight, row_ptr, input, shape, block),
        _addresses(x1, x2, x3, weight, bias, alpha, A, y), [*_embedded_strides(x1, x2), x3.stride()], torch.get_num_threads())
    return y


def _fake_ctr_backward(dy: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
                       row_ptr: Tensor | None, input: Tensor | None, shape: list[int], block: list[int], dx3: Tensor
                       ) -> tuple[Tensor, ...]:
    return _new(x1, x2, weight, bias, alpha, A)


@implement("ctr_aggregate_backward", _fake_ctr_backward)
def _ctr_backward(dy: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor,
                  row_ptr: Tensor | None, input: Tensor | None, shape: list[int], block: list[int], dx3: Tensor
                  ) -> tuple[Tensor, ...]:
    dx1, dx2, *rest = gradients = _new(x1, x2, weight, bias, alpha, A)
    weight, bias, A = weight.contiguous(), bias.contiguous(), A.contiguous()
    _native.module.ctr_backward(
        x3.dtype == torch.float64, _ctr_sizes(x1, x3), *_ctr_pattern(weight, row_ptr, input, shape, block),
        _addresses(x1, x2, x3, weight, bias, alpha, A, dy, dx1, dx2, dx3, *rest),
        [*_embedded_strides(x1, x2), x3.stride(), dy.stride(), dx3.stride()], torch.get_num_threads())
    return gradients


def _dg_sizes(x: Tensor) -> list[int]:
    batch, subsets, channels, frames, joints = x.shape
    return [batch, subsets, channels, channels, frames, joints]


def _fake_dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    return _new(x)[0]


@implement("dg_aggregate", _fake_dg)
def _dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    y, A = _fake_dg(x, x1, x2, alpha, beta, A), A.contiguous()
    _native.module.dg_forward(x.dtype == torch.float64, _dg_sizes(x), _addresses(x, x1, x2, alpha, beta, A, y),
                              _strides(x, x1, x2), torch.get_num_threads())
    return y


def _fake_dg_backward(dy: Tensor, x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor
                      ) -> tuple[Tensor, ...]:
    return _new(x, x1, x2, alpha, beta, A)


@implement("dg_aggregate_backward", _fake_dg_backward)
def _dg_backward(dy: Tensor, x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    gradients, A = _fake_dg_backward(dy, x, x1, x2, alpha, beta, A), A.contiguous()
    _native.module.dg_backward(x.dtype == torch.float64, _dg_sizes(x),
                               _addresses(x, x1, x2, alpha, beta, A, dy, *gradients), _strides(x, x1, x2, dy),
                               torch.get_num_threads())
    return gradients
