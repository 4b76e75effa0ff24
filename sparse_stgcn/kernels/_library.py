"""What the ops share: the torch.library they are registered in, argument checks, and the lasso term of a weight gradient."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from .pattern import BlockPattern

LIBRARY = torch.library.Library("sparse_stgcn", "DEF")
# The pattern travels as tensors and sizes, so that torch.compile sees no Python state.
PATTERN_SCHEMA = "Tensor row_ptr, Tensor input, Tensor tap, int[] shape, int[] block"


class Lasso(NamedTuple):
    """The group lasso's gradient, fused into a weight gradient: dW[b] += scale * W[b] for every masked block b.

    masked: bool (blocks,), True where a block is to vanish; scale: 0-dim tensor, lambda / norm of the whole group
    (0 where the norm is 0). See group_lasso.lasso_scale.
    """

    masked: Tensor | None
    scale: Tensor | None

    def wrap(self, values: Tensor) -> Tensor:
        """values, with this term in its gradient: for backends that do not fuse it."""
        if self.masked is None or self.scale is None:
            return values
        return _WithLasso.apply(values, self.masked, self.scale)


class _WithLasso(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, masked: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, masked, scale)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        values, masked, scale = ctx.saved_tensors
        return gradient + scale * values * masked[:, None, None], None, None


def check_values(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None, bias_shape: tuple[int, ...],
                 **others: Tensor | None) -> None:
    """Shapes, dtypes and devices of an op's arguments; of ``others`` the devices.

    Raises:
        ValueError: values or bias has another shape, or one of them lies on another device than x.
        TypeError: the dtypes differ.
    """
    if values.shape != pattern.values_shape:
        raise ValueError(f"Expected values of shape {pattern.values_shape} (blocks, bi, bo). Got {tuple(values.shape)}.")
    if bias is not None and tuple(bias.shape) != bias_shape:
        raise ValueError(f"Expected bias of shape {bias_shape}. Got {tuple(bias.shape)}.")
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"Expected {name} to have the dtype of x, {x.dtype}. Got {tensor.dtype}.")
    for name, tensor in (("values", values), ("bias", bias), ("pattern", pattern.row_ptr), *others.items()):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"Expected {name} on the device of x, {x.device}. Got {tensor.device}; use .to(x.device).")


def check_lasso(lasso: Lasso | None, pattern: BlockPattern, x: Tensor) -> Lasso:
    """The term as the ops take it, with flags side by side in memory; without one, ``Lasso(None, None)``.

    Raises:
        ValueError: not a flag for every block of the pattern, more than one scale, or either on another device than x.
        TypeError: the flags are not bool.
    """
    if lasso is None or lasso.masked is None or lasso.scale is None:
        return Lasso(None, None)
    if tuple(lasso.masked.shape) != (pattern.num_blocks,) or lasso.scale.numel() != 1:
        raise ValueError(f"Expected lasso.masked of shape ({pattern.num_blocks},), a flag for each block, and one lasso.scale. "
                         f"Got shapes {tuple(lasso.masked.shape)} and {tuple(lasso.scale.shape)}.")
    if lasso.masked.dtype != torch.bool:
        raise TypeError(f"Expected lasso.masked to be a bool tensor. Got {lasso.masked.dtype}; use masked != 0.")
    if {lasso.masked.device, lasso.scale.device} != {x.device}:
        raise ValueError(f"Expected lasso.masked and lasso.scale on the device of x, {x.device}. Got {lasso.masked.device} and "
                         f"{lasso.scale.device}; use .to(x.device).")
    return Lasso(lasso.masked.contiguous(), lasso.scale)


def check_plane(**tensors: Tensor) -> None:
    """Raises ValueError: a tensor (..., T, V) has no frame or no joint. No sample and no channel are no error."""
    for name, tensor in tensors.items():
        if 0 in tensor.shape[-2:]:
            raise ValueError(f"Expected {name} with at least one frame and one joint. Got shape {tuple(tensor.shape)}.")


def implement(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the CPU kernel of ``sparse_stgcn::name``, and ``fake`` as its shape function."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"sparse_stgcn::{name}", fake, lib=LIBRARY)
        if _native.module is not None:
            LIBRARY.impl(name, kernel, "CPU")
        return kernel

    return register
