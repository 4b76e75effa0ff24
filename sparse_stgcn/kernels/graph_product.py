"""graph_product: x times every subset of a graph, what a dense convolution reads. Native code: csrc/cpu/graph_product.inl."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, check_plane, implement
from ._memory import empty
from .dispatch import backend_for
from .graph_conv import Support, check_support, inside, support_of


def graph_product(x: Tensor, adjacency: Tensor, support: Tensor | Support | None = None) -> Tensor:
    """Z[n, k I + i, t, w] = sum over v of X[n,i,t,v] A_k[v,w]: (N, I, T, V) -> (N, K I, T, V), contiguous.

    Args:
        x: (N, I, T, V), any strides.
        adjacency: shared (K, V, V), or of every sample (N, K, V, V).
        support: of a shared adjacency, see ``graph_conv``: entries outside count as 0, get gradient 0 and cost nothing.

    Stored for the backward pass: the arguments.

    Raises:
        ValueError: a shape does not fit.
    """
    joints = x.shape[3] if x.dim() == 4 else -1
    wanted = (*adjacency.shape[:-2], joints, joints)
    if x.dim() != 4 or adjacency.dim() not in (3, 4) or tuple(adjacency.shape) != wanted or (
            adjacency.dim() == 4 and adjacency.shape[0] != x.shape[0]):
        raise ValueError("Expected x of shape (N, I, T, V) and adjacency of shape (K, V, V) or (N, K, V, V). "
                         f"Got {tuple(x.shape)} and {tuple(adjacency.shape)}.")
    check_plane(x=x)
    check_support(adjacency, support)
    adjacency = adjacency.to(x.dtype)
    if backend_for("graph_product", x.device, x.dtype) == "reference":
        adjacency = inside(adjacency, support)
        return torch.matmul(x.flatten(1, 2)[:, None], adjacency).unflatten(2, x.shape[1:3]).flatten(1, 2)
    if adjacency.dim() == 4:
        return _GraphProduct.apply(x, adjacency, None, None)
    entries = support_of(adjacency, support)
    return _GraphProduct.apply(x, adjacency.reshape(-1)[entries.flat], entries.ptr, entries.source)


class _GraphProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: Tensor, ptr: Tensor | None, source: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, graphs, ptr, source)
        return torch.ops.sparse_stgcn.graph_product(x, graphs, ptr, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        dx, dgraphs = torch.ops.sparse_stgcn.graph_product_backward(dz, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, dgraphs if ctx.needs_input_grad[1] else None, None, None


# graphs: (N, K, V, V), or with ptr and source the coefficients (entries,) of a shared adjacency.
_ARGUMENTS = "Tensor x, Tensor graphs, Tensor? ptr, Tensor? source"
LIBRARY.define(f"graph_product({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"graph_product_backward(Tensor dz, {_ARGUMENTS}, bool need_graphs) -> (Tensor, Tensor)")


def _subsets(x: Tensor, graphs: Tensor, ptr: Tensor | None) -> int:
    return graphs.shape[1] if ptr is None else (ptr.shape[0] - 1) // x.shape[3]


def _shape(x: Tensor, graphs: Tensor, ptr: Tensor | None) -> list[int]:
    return [x.shape[0], _subsets(x, graphs, ptr), x.shape[1], 1, x.shape[2], x.shape[3]]


def _adjacency(graphs: Tensor, ptr: Tensor | None, source: Tensor | None) -> list[int]:
    if ptr is None or source is None:
        return [0, graphs.data_ptr(), 0]
    # A graph without a single entry has no address; any other than 0 says that there is nothing to read.
    return [source.shape[0], ptr.data_ptr(), source.data_ptr() or ptr.data_ptr()]


def _fake(x: Tensor, graphs: Tensor, ptr: Tensor | None, source: Tensor | None) -> Tensor:
    return empty(x, (x.shape[0], _subsets(x, graphs, ptr) * x.shape[1], *x.shape[2:]))


@implement("graph_product", _fake)
def _forward(x: Tensor, graphs: Tensor, ptr: Tensor | None, source: Tensor | None) -> Tensor:
    z, graphs = _fake(x, graphs, ptr, source), graphs.contiguous()
    _native.module.graph_product(x.dtype == torch.float64, _shape(x, graphs, ptr), _adjacency(graphs, ptr, source),
                                 x.data_ptr(), x.stride(), graphs.data_ptr(), z.data_ptr(), torch.get_num_threads())
    return z


def _fake_backward(dz: Tensor, x: Tensor, graphs: Tensor, ptr: Tensor | None, source: Tensor | None, need_graphs: bool
                   ) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape), graphs.new_empty(graphs.shape if need_graphs else (0,))


@implement("graph_product_backward", _fake_backward)
def _backward(dz: Tensor, x: Tensor, graphs: Tensor, ptr: Tensor | None, source: Tensor | None, need_graphs: bool
              ) -> tuple[Tensor, Tensor]:
    (dx, dgraphs), graphs = _fake_backward(dz, x, graphs, ptr, source, need_graphs), graphs.contiguous()
    _native.module.graph_product_backward(
        x.dtype == torch.float64, _shape(x, graphs, ptr), _adjacency(graphs, ptr, source), x.data_ptr(), x.stride(),
        dz.data_ptr(), dz.stride(), graphs.data_ptr(), dx.data_ptr(), dgraphs.data_ptr() if need_graphs else 0,
        torch.get_num_threads())
    return dx, dgraphs
