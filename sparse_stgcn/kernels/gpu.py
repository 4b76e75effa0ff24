"""The raw ops on a GPU: every product runs on Triton or on CUDA, whichever the table of dispatch.py names for it.

Importing this module needs neither a GPU nor triton nor the compiled CUDA module. A size that no kernel takes runs on the dense
reference, with one warning.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import cuda, dispatch, preference, reference, triton
from ._library import LIBRARY
from .device import multiplies_in_tf32
from .pattern import BlockPattern

_CUDA_NAMES = {"forward": "forward", "dX": "input_gradient", "dW": "weight_gradient"}
_patterns: Any = WeakIdKeyDictionary()  # row_ptr -> BlockPattern


def on_gpu(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the kernel of ``sparse_stgcn::name`` for tensors on a GPU.

    It runs without autocast: the result has the dtype of x, whatever computes it.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(kernel)
        def alone(x: Tensor, *rest: Any) -> Any:
            if not dispatch.autocasts(x):
                return kernel(x, *rest)
            with torch.autocast(x.device.type, enabled=False):
                return kernel(x, *rest)

        LIBRARY.impl(name, alone, "CUDA")
        return alone

    return register


def pattern_of(row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> BlockPattern:
    """The pattern with its transposed index, of which the raw ops get one side only. The first call waits for the GPU."""
    pattern = _patterns.get(row_ptr)
    if pattern is None:
        rows, cols = row_ptr.numel() - 1, -(-shape[1] // block[1])
        live = torch.zeros(rows, cols, shape[2], dtype=torch.bool, device=row_ptr.device)
        row = torch.repeat_interleave(torch.arange(rows, device=row_ptr.device), (row_ptr[1:] - row_ptr[:-1]).long())
        live[row, input.long(), tap.long()] = True
        (o, i, k), (bo, bi) = shape, block
        with torch.inference_mode(False):
            pattern = BlockPattern.from_blocks(live, (o, i, k), (bo, bi)).to(row_ptr.device)
        _patterns[row_ptr] = pattern
    return pattern


def _arithmetic(dtype: torch.dtype) -> str | None:
    name = preference.ARITHMETIC.get(dtype)
    return "tf32" if name == "float32" and multiplies_in_tf32() else name


def _backend(op: str, direction: str, x: Tensor, index: tuple[Any, ...], frames: int, *more: int) -> str:
    """Which kernel runs this product; more: stride and dilation, or the dimensions of the adjacency."""
    *_, tap, shape, block = index
    graph = op == "graph_conv"
    refused, found = None, dispatch.gpu_of(x.device)
    if found is not None and found.cuda is None and cuda.unsupported(x.dtype) is None:
        name = "GraphConv" if graph else "TemporalConv"
        refused = cuda.refusal(name, _CUDA_NAMES[direction], x, shape, block, tap, frames, *more)
    density = tap.numel() * prod(block) / prod(shape)
    dims = more[0] if graph else 3
    product = dispatch.Product(op, direction, block, dims, x.shape[3], _arithmetic(x.dtype), refused, density)
    return dispatch.backend_of_product(product, x.device, x.dtype)


def _device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _index(row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Any, Any, Any, Any, Any]:
    return row_ptr, input, tap, tuple(shape), tuple(block)


def _by_reference(of: Callable[..., Tensor], wanted: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a function of the reference in some of its arguments."""
    with torch.enable_grad():
        leaves = tuple(t.detach().requires_grad_() for t in wanted)
        return torch.autograd.grad(of(*leaves), leaves, dy)


def _with_lasso(dw: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None) -> Tensor:
    return dw if masked is None or scale is None else dw + scale * values * masked[:, None, None]


@on_gpu("temporal_conv")
def temporal_conv(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int],
                  block: list[int], stride: int, dilation: int) -> Tensor:
    index = _index(row_ptr, input, tap, shape, block)
    backend = _backend("temporal_conv", "forward", x, index, x.shape[2], stride, dilation)
    if backend == "reference":
        return reference.temporal_conv(x, values, pattern_of(row_ptr, input, tap, shape, block), bias, stride, dilation)
    if backend == "cuda":
        return cuda.temporal_conv(x, values, bias, *index, stride, dilation)
    with _device(x):
        return triton.function("temporal_conv")(x, values, bias, *index, stride, dilation)


@on_gpu("temporal_conv_dx")
def temporal_conv_dx(dy: Tensor, values: Tensor, row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int],
                     block: list[int], stride: int, dilation: int, frames: int) -> Tensor:
    index = _index(row_ptr, input, tap, shape, block)
    backend = _backend("temporal_conv", "dX", dy, index, frames, stride, dilation)
    if backend == "triton":
        with _device(dy):
            return triton.function("temporal_conv_dx")(dy, values, *index, stride, dilation, frames)
    pattern = pattern_of(row_ptr, input, tap, shape, block)
    if backend == "cuda":
        return cuda.temporal_conv_input_gradient(dy, values, pattern.t_ptr, pattern.t_perm, pattern.t_row, tap, *index[3:],
                                                 stride, dilation, frames)
    x = dy.new_zeros((dy.shape[0], shape[1], frames, dy.shape[3]))
    return _by_reference(lambda x: reference.temporal_conv(x, values, pattern, None, stride, dilation), (x,), dy)[0]


@on_gpu("temporal_conv_dw")
def temporal_conv_dw(x: Tensor, dy: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor,
                     input: Tensor, tap: Tensor, shape: list[int], block: list[int], stride: int, dilation: int
                     ) -> tuple[Tensor, Tensor]:
    index = _index(row_ptr, input, tap, shape, block)
    backend = _backend("temporal_conv", "dW", x, index, x.shape[2], stride, dilation)
    if backend == "reference":
        pattern = pattern_of(row_ptr, input, tap, shape, block)
        dw, = _by_reference(lambda values: reference.temporal_conv(x, values, pattern, None, stride, dilation), (values,), dy)
        return _with_lasso(dw, values, masked, scale), dy.sum((0, 2, 3), dtype=torch.float32).to(values.dtype)
    if backend == "cuda":
        return cuda.temporal_conv_weight_gradient(x, dy, values, masked, scale, *index, stride, dilation)
    with _device(x):
        return triton.function("temporal_conv_dw")(x, dy, values, masked, scale, *index, stride, dilation)


@on_gpu("pointwise_conv_backward")
def pointwise_conv_backward(x: Tensor, dy: Tensor, values: Tensor, masked: Tensor | None, scale: Tensor | None, row_ptr: Tensor,
                            input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    index = (row_ptr, input, tap, shape, block)
    return (temporal_conv_dx(dy, values, *index, 1, 1, x.shape[2]),
            *temporal_conv_dw(x, dy, values, masked, scale, *index, 1, 1))


@on_gpu("adjacency_conv")
def adjacency_conv(x: Tensor, values: Tensor, adjacency: Tensor, bias: Tensor | None, offset: Tensor | None, row_ptr: Tensor,
                   input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> Tensor:
    index = _index(row_ptr, input, tap, shape, block)
    backend = _backend("graph_conv", "forward", x, index, x.shape[2], adjacency.dim())
    if backend == "reference":
        y = reference.graph_conv(x, values, pattern_of(row_ptr, input, tap, shape, block), adjacency, bias)
        return y.contiguous() if offset is None else y + offset[:, None, None]
    if backend == "cuda":
        return cuda.graph_conv(x, values, adjacency, bias, *index, shift=offset)
    with _device(x):
        return triton.function("graph_conv")(x, values, adjacency, bias, *index, shift=offset)


@on_gpu("adjacency_conv_dx")
def adjacency_conv_dx(x: Tensor, dy: Tensor, values: Tensor, adjacency: Tensor, bias: Tensor | None, row_ptr: Tensor,
                      input: Tensor, tap: Tensor, shape: list[int], block: list[int], need_x: bool, need_adjacency: bool
                      ) -> tuple[Tensor, Tensor]:
    index = _index(row_ptr, input, tap, shape, block)
    backend = _backend("graph_conv", "dX", x, index, x.shape[2], adjacency.dim())
    dx, da = x.new_empty(0), adjacency.new_empty(0)
    if backend == "triton":
        with _device(x):
            if need_x:
                dx = triton.function("graph_conv_dx")(dy, values, adjacency, *index)
            if need_adjacency:
                da = triton.function("graph_conv_dadjacency")(x, dy, values, adjacency, bias, *index)
        return dx, da
    pattern = pattern_of(row_ptr, input, tap, shape, block)
    if backend == "cuda":
        transposed = (pattern.t_ptr, pattern.t_perm, pattern.t_row)
        made_x, made_a = cuda.graph_conv_input_gradient(x, dy, values, adjacency, *index[:3], *transposed, *index[3:],
                                                        need_x=need_x, need_adjacency=need_adjacency)
        if made_a is not None and bias is not None:
            made_a = _through_bias(made_a, dy, bias)
        return dx if made_x is None else made_x, da if made_a is None else made_a
    made_x, made_a = _by_reference(lambda x, a: reference.graph_conv(x, values, pattern, a, bias), (x, adjacency), dy)
    return made_x.contiguous() if need_x else dx, made_a.contiguous() if need_adjacency else da


@on_gpu("adjacency_conv_dw")
def adjacency_conv_dw(x: Tensor, dy: Tensor, values: Tensor, adjacency: Tensor, masked: Tensor | None, scale: Tensor | None,
                      row_ptr: Tensor, input: Tensor, tap: Tensor, shape: list[int], block: list[int]) -> tuple[Tensor, Tensor]:
    index = _index(row_ptr, input, tap, shape, block)
    backend = _backend("graph_conv", "dW", x, index, x.shape[2], adjacency.dim())
    if backend == "triton":
        with _device(x):
            return triton.function("graph_conv_dw")(x, dy, values, adjacency, masked, scale, *index)
    if backend == "cuda":
        dw, of_joint = cuda.graph_conv_weight_gradient(x, dy, values, adjacency, masked, scale, *index)
        return dw, _dbias(of_joint.float(), adjacency).to(values.dtype)
    pattern = pattern_of(row_ptr, input, tap, shape, block)
    dw, = _by_reference(lambda values: reference.graph_conv(x, values, pattern, adjacency), (values,), dy)
    of_joint = dy.sum((0, 2) if adjacency.dim() == 3 else 2, dtype=torch.float32)
    return _with_lasso(dw, values, masked, scale), _dbias(of_joint, adjacency).to(values.dtype)


def _dbias(of_joint: Tensor, adjacency: Tensor) -> Tensor:
    """dbias[k,o] = sum over w (and n) of of_joint[o,w] sum over v of A_k[v,w]; products and sums, so that no matrix product
    in TF32 touches it."""
    arriving = adjacency.sum(-2, dtype=torch.float32)
    if adjacency.dim() == 3:
        return (of_joint[None] * arriving[:, None]).sum(-1)
    return (of_joint[:, None] * (arriving[:, :, None] if adjacency.dim() == 4 else arriving)).sum((0, 3))


def _through_bias(da: Tensor, dy: Tensor, bias: Tensor) -> Tensor:
    """da plus the gradient that reaches A through the biases: b_k[o] dy[n,o,t,w], summed over t (o, n), the same for all v."""
    of_joint = dy.sum((0, 2) if da.dim() == 3 else 2, dtype=torch.float32)
    if da.dim() == 3:
        more = (bias.float()[:, :, None] * of_joint).sum(1)[:, None]
    else:
        more = bias.float()[:, :, None] * of_joint[:, None]
        more = more[:, :, :, None] if da.dim() == 5 else more.sum(2)[:, :, None]
    return (da + more).to(da.dtype)
