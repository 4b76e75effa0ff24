"""Graphs that depend on the sample: those of AA-GCN, and the aggregation of DG-STGCN; that of CTR-GCN is in ctr.py.

Everywhere index v is the joint that sends and w the joint that receives: out[w] = sum over v of in[v] G[v, w].
Definition: reference_dynamic.py; native code: csrc/cpu/dynamic_aa.inl, dynamic_dg.inl.

Natively the graphs of DG-STGCN and CTR-GCN are made where they are used, one or eight at a time, and all of them again in the
backward pass: the arguments are stored and nothing else. tanh has an absolute error of 3 eps, which is what a sum of numbers
of size 1 can use.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference_dynamic
from ._library import LIBRARY, check_plane, implement
from ._memory import empty
from .dispatch import backend_for, widened

__all__ = ["aa_graph", "dg_aggregate"]

_ops = torch.ops.sparse_stgcn


def aa_graph(embedded: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    """G[n,k,v,w] = A[k,v,w] + alpha tanh(1 / (R T) sum over r, t of a[n,k,r,t,v] b[n,k,r,t,w]).

    The adaptive graphs of 2s-AGCN (Shi et al. 2019, Eq. 3) with PYSKL's tanh in place of the softmax, of all subsets;
    graph_conv and graph_product apply them.

    Args:
        embedded: (N, 2, K, R, T, V): all a, then all b; any strides.
        alpha: one number.
        A: (K, V, V).

    Returns:
        (N, K, V, V), contiguous. Stored for the backward pass: the arguments.

    Raises:
        ValueError: a shape does not fit.
    """
    if embedded.dim() != 6 or embedded.shape[1] != 2:
        raise ValueError(f"Expected embedded of shape (N, 2, K, R, T, V). Got {tuple(embedded.shape)}.")
    check_plane(embedded=embedded)
    joints = embedded.shape[5]
    check_graph(A, (embedded.shape[2], joints, joints), alpha=alpha)
    embedded = widened(embedded)
    arguments = like(embedded, embedded, alpha, A)
    if backend_for("aa_graph", embedded.device, embedded.dtype) == "reference":
        return reference_dynamic.aa_graph(*arguments)
    return _AaGraph.apply(*arguments)


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
    check_dg(x, x1, x2, alpha, beta, A)
    x = widened(x)
    arguments = like(x, x, x1, x2, alpha, beta, A)
    if backend_for("dg_aggregate", x.device, x.dtype) == "reference":
        return reference_dynamic.dg_aggregate(*arguments)
    return _DgAggregate.apply(*arguments)


def check_dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> None:
    """Shapes of ``dg_aggregate``'s arguments."""
    if x.dim() != 5 or x1.shape != x2.shape or tuple(x1.shape) != (*x.shape[:3], x.shape[4]):
        raise ValueError("Expected x of shape (N, K, C, T, V), x1 and x2 of shape (N, K, C, V). "
                         f"Got {tuple(x.shape)}, {tuple(x1.shape)} and {tuple(x2.shape)}.")
    check_plane(x=x)
    check_graph(A, (x.shape[1], x.shape[4], x.shape[4]), alpha=alpha, beta=beta)


def check_graph(A: Tensor, shape: tuple[int, ...], **scales: Tensor) -> None:
    if tuple(A.shape) != shape:
        raise ValueError(f"Expected A of shape {shape}. Got {tuple(A.shape)}.")
    for name, scale in scales.items():
        if scale.numel() != 1:
            raise ValueError(f"Expected {name} to be one number. Got shape {tuple(scale.shape)}.")


def like(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of ``x``: under autocast parameters are float32 beside half-precision activations."""
    return [tensor.to(x.dtype) for tensor in tensors]


class _AaGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return _ops.aa_graph(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgraphs: Tensor) -> tuple[Tensor, ...]:
        return _ops.aa_graph_backward(dgraphs, *ctx.saved_tensors)


class _DgAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return _ops.dg_aggregate(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return _ops.dg_aggregate_backward(dy, *ctx.saved_tensors)


_DG = "Tensor x, Tensor x1, Tensor x2, Tensor alpha, Tensor beta, Tensor A"
LIBRARY.define(f"dg_aggregate({_DG}) -> Tensor")
LIBRARY.define(f"dg_aggregate_backward(Tensor dy, {_DG}) -> ({', '.join(['Tensor'] * 6)})")

_EMBEDDED = "Tensor embedded, Tensor alpha, Tensor A"
LIBRARY.define(f"aa_graph({_EMBEDDED}) -> Tensor")
LIBRARY.define(f"aa_graph_backward(Tensor dgraphs, {_EMBEDDED}) -> (Tensor, Tensor, Tensor)")


def new(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(empty(tensor, tensor.shape) for tensor in tensors)


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in tensors]


def _fake_aa_graph(embedded: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    return embedded.new_empty((embedded.shape[0], *A.shape))


def _aa_sizes(embedded: Tensor) -> list[int]:
    batch, _, subsets, rows, frames, joints = embedded.shape
    return [batch, subsets, 1, rows, frames, joints]


@implement("aa_graph", _fake_aa_graph)
def _aa_graph(embedded: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    (a, b), graphs, A = embedded.unbind(1), _fake_aa_graph(embedded, alpha, A), A.contiguous()
    _native.module.aa_graphs(a.dtype == torch.float64, _aa_sizes(embedded), addresses(a, b, alpha, A, graphs), strides(a, b),
                             torch.get_num_threads())
    return graphs


def _fake_aa_graph_backward(dgraphs: Tensor, embedded: Tensor, alpha: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    return new(embedded, alpha, A)


@implement("aa_graph_backward", _fake_aa_graph_backward)
def _aa_graph_backward(dgraphs: Tensor, embedded: Tensor, alpha: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    dembedded, dalpha, dA = gradients = new(embedded, alpha, A)
    (a, b), (da, db), dgraphs = embedded.unbind(1), dembedded.unbind(1), dgraphs.contiguous()
    _native.module.aa_graphs_backward(
        a.dtype == torch.float64, _aa_sizes(embedded), addresses(a, b, alpha, dgraphs, da, db, dalpha, dA),
        strides(a, b, da, db), torch.get_num_threads())
    return gradients


def dg_sizes(x: Tensor) -> list[int]:
    batch, subsets, channels, frames, joints = x.shape
    return [batch, subsets, channels, channels, frames, joints]


def _fake_dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    return new(x)[0]


@implement("dg_aggregate", _fake_dg)
def _dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    y, A = _fake_dg(x, x1, x2, alpha, beta, A), A.contiguous()
    _native.module.dg_forward(x.dtype == torch.float64, dg_sizes(x), addresses(x, x1, x2, alpha, beta, A, y),
                              strides(x, x1, x2), [], 0, 0.0, torch.get_num_threads())
    return y


def _fake_dg_backward(dy: Tensor, x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor
                      ) -> tuple[Tensor, ...]:
    return new(x, x1, x2, alpha, beta, A)


@implement("dg_aggregate_backward", _fake_dg_backward)
def _dg_backward(dy: Tensor, x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    gradients, A = _fake_dg_backward(dy, x, x1, x2, alpha, beta, A), A.contiguous()
    _native.module.dg_backward(x.dtype == torch.float64, dg_sizes(x),
                               addresses(x, x1, x2, alpha, beta, A, dy, *gradients), strides(x, x1, x2, dy), [], 0,
                               torch.get_num_threads())
    return gradients
