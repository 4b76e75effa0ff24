"""group_lasso: the penalty of the warm-up stage. Definition: reference.py; native code: csrc/cpu/group_lasso.inl."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference
from ._library import LIBRARY, Lasso, implement
from .dispatch import backend_for
from .pattern import BlockPattern


def group_lasso(weights: Sequence[Tensor], patterns: Sequence[BlockPattern], groups: Sequence[int] | None = None) -> Tensor:
    """L_c = sum over groups of the 2-norm of all masked weights of the group (paper, Eq. 9; unsquared norm).

    The gradient is W* / norm on masked entries, exactly 0 on kept ones, and 0 where a group's norm is 0.

    Args:
        weights: dense weights, (O, I, K) each, any strides (a layer's own layout is viewed, not copied).
        patterns: the pattern of each; masked means not kept.
        groups: group id of each weight; None makes every weight a group of its own.

    Returns:
        A 0-dim tensor, 0 for no weights of a group masked.

    Raises:
        ValueError: the lists differ in length or a weight does not have its pattern's shape.
        TypeError: the dtypes of the weights differ.
    """
    ids = list(range(len(weights))) if groups is None else list(groups)
    if not weights or not len(weights) == len(patterns) == len(ids):
        raise ValueError(f"Expected weights, patterns and groups of one length, at least 1. "
                         f"Got {len(weights)}, {len(patterns)} and {len(ids)}.")
    for number, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
        if tuple(weight.shape) != pattern.shape:
            raise ValueError(f"Expected weights[{number}] of its pattern's shape {pattern.shape}. Got {tuple(weight.shape)}.")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"Expected weights of one dtype, {weights[0].dtype}. Got {weight.dtype} in weights[{number}].")
    if backend_for("group_lasso", weights[0].device, weights[0].dtype) == "reference":
        return reference.group_lasso(weights, patterns, ids)
    members: dict[int, list[int]] = {}
    for number, group in enumerate(ids):
        members.setdefault(group, []).append(number)
    total = weights[0].new_zeros(())
    for chosen in members.values():
        tensors = [t for number in chosen for t in (weights[number], patterns[number].mask())]
        total = total + _GroupNorm.apply(*tensors)
    return total


class _GroupNorm(torch.autograd.Function):
    """The 2-norm of the masked entries of one group: weight, mask, weight, mask, ..."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        square = torch.zeros((), dtype=torch.float64)
        for weight, kept in zip(tensors[::2], tensors[1::2], strict=True):
            square = square + torch.ops.sparse_stgcn.lasso_square(weight, kept)
        norm = square.sqrt()
        ctx.save_for_backward(*tensors, norm)
        return norm.to(tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, norm = ctx.saved_tensors
        scale = torch.where(norm > 0, gradient.double() / norm.clamp(min=torch.finfo(torch.float64).tiny), 0)
        result: list[Tensor | None] = []
        for weight, kept in zip(tensors[::2], tensors[1::2], strict=True):
            result += [torch.ops.sparse_stgcn.lasso_gradient(weight, kept, scale), None]
        return tuple(result)


def lasso_terms(weights: Sequence[Tensor], patterns: Sequence[BlockPattern], strength: float) -> list[Lasso]:
    """The Lasso terms of one group, for weights whose values hold EVERY block (BlockPattern.full): lambda / norm.

    ``patterns`` say which blocks are kept; the terms' ``masked`` flags follow the block order of the full pattern.
    """
    norm = torch.stack([(w * ~p.mask()).double().square().sum() for w, p in zip(weights, patterns, strict=True)]).sum().sqrt()
    scale = torch.where(norm > 0, strength / norm, 0).to(weights[0].dtype)
    return [Lasso(~p.blocks().permute(0, 2, 1).reshape(-1), scale) for p in patterns]


LIBRARY.define("lasso_square(Tensor weight, Tensor kept) -> Tensor")
LIBRARY.define("lasso_gradient(Tensor weight, Tensor kept, Tensor scale) -> Tensor")


def _fake_square(weight: Tensor, kept: Tensor) -> Tensor:
    return weight.new_empty((), dtype=torch.float64)


@implement("lasso_square", _fake_square)
def _square(weight: Tensor, kept: Tensor) -> Tensor:
    square = _native.module.lasso_square(weight.dtype == torch.float64, weight.shape, weight.data_ptr(), weight.stride(),
                                         kept.data_ptr())
    return torch.tensor(square, dtype=torch.float64)


def _fake_gradient(weight: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight)


@implement("lasso_gradient", _fake_gradient)
def _gradient(weight: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
    gradient = torch.empty_like(weight)  # the strides of the weight, unless its entries overlap or have gaps
    if gradient.stride() != weight.stride():
        weight, gradient = weight.contiguous(), weight.new_empty(weight.shape)
    _native.module.lasso_gradient(weight.dtype == torch.float64, weight.shape, weight.data_ptr(), weight.stride(),
                                  kept.data_ptr(), float(scale), gradient.data_ptr())
    return gradient
