"""The aggregations of AA-GCN, CTR-GCN and DG-STGCN in plain PyTorch, any dtype and device: the definition of correct.

The formulas are in dynamic.py and ctr.py. Graphs are made as whole tensors; those of ctr and dg again in the backward pass.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .dispatch import autocasts
from .pattern import BlockPattern

__all__ = ["aa_graph", "ctr_aggregate", "dg_aggregate"]


def _in_float32(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op without autocast, on arguments that are float32 where that made them narrower.

    Autocast covers the forward pass alone: a backward pass that is written out would meet a gradient of another dtype than what
    it has stored.
    """

    @wraps(op)
    def run(x: Tensor, *others: Any, **options: Any) -> Tensor:
        if not autocasts(x):
            return op(x, *others, **options)
        with torch.autocast(x.device.type, enabled=False):
            return op(*(_widened(argument) for argument in (x, *others)), **options)

    return run


def _widened(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16) else argument


@_in_float32
def aa_graph(embedded: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    """Stored for the backward pass: embedded and a map for each graph."""
    rows = embedded.flatten(3, 4)  # (N, 2, K, R T, V)
    return A + alpha * torch.tanh(rows[:, 0].transpose(-1, -2) @ rows[:, 1] / rows.shape[3])


@_in_float32
def ctr_aggregate(x1: Tensor, x2: Tensor, x3: Tensor, conv4_weight: Tensor, conv4_bias: Tensor, alpha: Tensor,
                  A: Tensor, conv4_pattern: BlockPattern | None = None) -> Tensor:
    """Stored for the backward pass: the arguments. The maps (N, R, V, V) and the graphs (N, C, V, V) exist during a pass."""
    weight = conv4_weight if conv4_pattern is None else conv4_pattern.scatter(conv4_weight)[..., 0]
    return _CtrAggregate.apply(x1, x2, x3, weight, conv4_bias, alpha, A)


@_in_float32
def dg_aggregate(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    """Stored for the backward pass: the arguments. The graphs (N, K, C, V, V) exist during a pass."""
    return _DgAggregate.apply(x, x1, x2, alpha, beta, A)


class _CtrAggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, x3: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, A: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x1, x2, x3, weight, bias, alpha, A)
        refined = _ctr_refinement(_differences(x1, x2), weight, bias)
        return torch.matmul(x3, refined.mul_(alpha).add_(A))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x1, x2, x3, weight, bias, alpha, A = ctx.saved_tensors
        joints = x1.shape[2]
        maps = _differences(x1, x2)
        refined = _ctr_refinement(maps, weight, bias)
        d_graph = torch.matmul(x3.transpose(2, 3), grad)
        d_alpha = (d_graph * refined).sum().reshape(alpha.shape)
        d_x3 = torch.matmul(grad, refined.mul_(alpha).add_(A).transpose(2, 3))
        d_A = d_graph.sum((0, 1))
        d_refined = d_graph.mul_(alpha).flatten(2)
        d_weight = torch.bmm(d_refined, maps.flatten(2).transpose(1, 2)).sum(0)
        d_bias = d_refined.sum((0, 2))
        d_maps = torch.matmul(weight.t(), d_refined).view(*maps.shape[:2], joints, joints)
        d_maps = d_maps.mul_(1 - maps.square())
        return d_maps.sum(3), d_maps.sum(2).neg_(), d_x3, d_weight, d_bias, d_alpha, d_A


class _DgAggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, x1, x2, alpha, beta, A)
        return torch.matmul(x, _differences(x1, x2).mul_(alpha).add_(_dg_shared(_attention(x1, x2), beta, A)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, x1, x2, alpha, beta, A = ctx.saved_tensors
        maps, attention = _differences(x1, x2), _attention(x1, x2)
        d_graph = torch.matmul(x.transpose(3, 4), grad)
        d_x = torch.matmul(grad, (maps * alpha).add_(_dg_shared(attention, beta, A)).transpose(3, 4))
        d_alpha = (d_graph * maps).sum().reshape(alpha.shape)
        d_shared = d_graph.sum(2)
        d_A = d_shared.sum(0)
        d_beta = (d_shared * attention).sum().reshape(beta.shape)
        d_score = (d_shared - (d_shared * attention).sum(2, keepdim=True)) * attention * beta
        d_maps = d_graph.mul_(alpha).mul_(1 - maps.square_())
        d_x1 = d_maps.sum(4) + torch.matmul(x2, d_score.transpose(2, 3))
        d_x2 = torch.matmul(x1, d_score) - d_maps.sum(3)
        return d_x, d_x1, d_x2, d_alpha, d_beta, d_A


def _differences(x1: Tensor, x2: Tensor) -> Tensor:
    """(..., V, V): tanh(x1[v] - x2[w])."""
    return (x1.unsqueeze(-1) - x2.unsqueeze(-2)).tanh_()


def _ctr_refinement(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, C, V, V): the maps (N, R, V, V) mixed into C channels."""
    mixed = torch.matmul(weight, maps.flatten(2)).add_(bias[:, None])
    return mixed.view(maps.shape[0], weight.shape[0], *maps.shape[2:])


def _attention(x1: Tensor, x2: Tensor) -> Tensor:
    """(N, K, V, V): softmax over the sending joint v of the products over channels."""
    return torch.matmul(x1.transpose(2, 3), x2).softmax(2)


def _dg_shared(attention: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    """(N, K, 1, V, V): the part of the graph that all channels share."""
    return (attention * beta + A).unsqueeze(2)
