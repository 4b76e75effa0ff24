"""stgcn_block: a block of ST-GCN in training mode as one op. Native code: csrc/cpu/block_{rows,forward,backward}.inl."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._library import LIBRARY, check_values, implement
from ._memory import empty
from .dispatch import backend_for
from .graph_conv import Support, graph_conv, prepare
from .norm import norm
from .pattern import BlockPattern
from .temporal_conv import out_frames, temporal_conv

__all__ = ["Normed", "Statistics", "fuses", "stgcn_block"]


class Normed(NamedTuple):
    """A convolution and the batch norm behind it: values (blocks, bi, bo), its bias, and weight, bias and eps of the norm."""

    values: Tensor
    pattern: BlockPattern
    bias: Tensor | None
    weight: Tensor
    shift: Tensor
    eps: float


class Statistics(NamedTuple):
    """Mean and unbiased variance of a batch, (C,) each, without gradient."""

    mean: Tensor
    variance: Tensor


def fuses(x: Tensor, temporal: BlockPattern, stride: int) -> bool:
    """Whether the block is one op: on the native backend, in float32 or float64, and no stride without taps."""
    return (x.dtype in (torch.float32, torch.float64) and (stride == 1 or temporal.shape[2] > 1)
            and all(backend_for(op, x.device, x.dtype) == "native" for op in ("graph_conv", "temporal_conv", "norm")))


def stgcn_block(x: Tensor, graph: Normed, adjacency: Tensor, temporal: Normed, residual: Tensor | None = None,
                identity: bool = False, support: Tensor | Support | None = None, stride: int = 1, dilation: int = 1
                ) -> tuple[Tensor, Statistics, Statistics]:
    """relu(bn2(temporal_conv(relu(bn1(graph_conv(x))))) + residual), norms with the statistics of the batch.

    Args:
        x: (N, I, T, V).
        graph: the graph convolution, its bias (K, O) or None; adjacency, support: as in ``graph_conv``, adjacency (K, V, V).
        temporal: the temporal convolution, its bias (O,) or None; stride, dilation: its own.
        residual: (N, O, T_out, V) or None; with ``identity`` it is x itself.

    Returns:
        (N, O, T_out, V), contiguous, and the statistics of both norms.

    Stored for the backward pass: x, the outputs of both convolutions and the block's own. What lies between the
    convolutions is computed again while it is read; gradients of the convolutions' outputs never exist as tensors.

    Raises:
        ValueError: a shape does not fit. TypeError: the dtypes differ.
    """
    out_channels, in_channels, subsets = graph.pattern.shape
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"Expected x of shape (N, {in_channels}, T, V). Got {tuple(x.shape)}.")
    if temporal.pattern.shape[1] != out_channels:
        raise ValueError(f"Expected a temporal convolution of {out_channels} inputs. Got {temporal.pattern.shape[1]}.")
    _check_weights(graph, adjacency, temporal, stride, dilation, x.shape[3])
    shape = (x.shape[0], temporal.pattern.shape[0], out_frames(x.shape[2], stride), x.shape[3])
    if identity and (residual is not None or shape != tuple(x.shape)):
        raise ValueError(f"Expected identity without another residual and with x of shape {shape}. Got x {tuple(x.shape)}.")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"Expected residual of shape {shape}. Got {tuple(residual.shape)}.")
    if not fuses(x, temporal.pattern, stride) or shape[0] * shape[2] * shape[3] < 2:
        z = graph_conv(x, graph.values, graph.pattern, adjacency, graph.bias, support=support)
        h, *first = norm(z, graph.weight, graph.shift, graph.eps, relu=True)
        y = temporal_conv(h, temporal.values, temporal.pattern, temporal.bias, stride, dilation)
        out, *second = norm(y, temporal.weight, temporal.shift, temporal.eps, x if identity else residual, relu=True)
        return out, Statistics(*first), Statistics(*second)
    check_values(x, graph.values, graph.pattern, graph.bias, (subsets, out_channels))
    check_values(x, temporal.values, temporal.pattern, temporal.bias, shape[1:2])
    for tensor in (adjacency, graph.weight, graph.shift, temporal.weight, temporal.shift, residual):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"Expected all tensors to have the dtype of x, {x.dtype}. Got {tensor.dtype}.")
    entries, coefficients, bias_map = prepare(adjacency, graph.bias, support)
    indices = [part for p in (graph.pattern, temporal.pattern) for part in (p.row_ptr, p.input, p.tap)]
    sizes = [part for p in (graph.pattern, temporal.pattern) for part in (*p.shape, *p.block)]
    out, mean1, variance1, mean2, variance2 = _Block.apply(
        x, residual, graph.values, coefficients, bias_map, temporal.values, temporal.bias, graph.weight, graph.shift,
        temporal.weight, temporal.shift, [entries.ptr, entries.source, *indices], [*sizes, stride, dilation],
        [graph.eps, temporal.eps], identity)
    return out, Statistics(mean1, variance1), Statistics(mean2, variance2)


def _check_weights(graph: Normed, adjacency: Tensor, temporal: Normed, stride: int, dilation: int, joints: int) -> None:
    """What neither ``check_values`` nor the support of the adjacency looks at. Raises ValueError."""
    wanted = (graph.pattern.shape[2], joints, joints)
    if tuple(adjacency.shape) != wanted:
        raise ValueError(f"Expected adjacency of shape (K, V, V) = {wanted}. Got {tuple(adjacency.shape)}.")
    for name, part in (("graph", graph), ("temporal", temporal)):
        channels = part.pattern.shape[:1]
        if tuple(part.weight.shape) != channels or tuple(part.shift.shape) != channels:
            raise ValueError(f"Expected {name}.weight and {name}.shift of shape {channels}. "
                             f"Got {tuple(part.weight.shape)} and {tuple(part.shift.shape)}.")
    if temporal.pattern.shape[2] % 2 == 0:
        raise ValueError(f"Expected temporal.pattern with an odd number of taps. Got {temporal.pattern.shape[2]}.")
    if stride < 1 or dilation < 1:
        raise ValueError(f"Expected stride and dilation of at least 1. Got stride {stride}, dilation {dilation}.")


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, graph_values: Tensor, coefficients: Tensor,
                bias_map: Tensor | None, temporal_values: Tensor, temporal_bias: Tensor | None, weight1: Tensor, shift1: Tensor,
                weight2: Tensor, shift2: Tensor, index: list[Tensor], sizes: list[int], eps: list[float], identity: bool
                ) -> tuple[Tensor, ...]:
        weights = (graph_values, coefficients, bias_map, temporal_values, temporal_bias, weight1, shift1, weight2, shift2)
        out, z, y, mean1, rstd1, variance1, mean2, rstd2, variance2 = torch.ops.sparse_stgcn.stgcn_block(
            x, residual, *weights, index, sizes, eps, identity)
        ctx.mark_non_differentiable(mean1, variance1, mean2, variance2)
        ctx.save_for_backward(x, z, y, out, mean1, rstd1, mean2, rstd2, *weights, *index)
        ctx.sizes, ctx.identity, ctx.residual = sizes, identity, residual is not None
        return out, mean1, variance1, mean2, variance2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *unused: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        dx, dresidual, *gradients = torch.ops.sparse_stgcn.stgcn_block_backward(
            dout, *tensors[:17], list(tensors[17:]), ctx.sizes, ctx.identity, ctx.needs_input_grad[3])
        wanted = zip(gradients, ctx.needs_input_grad[2:11], strict=True)
        given = [gradient if needed else None for gradient, needed in wanted]
        return dx, dresidual if ctx.residual else None, *given, None, None, None, None


_WEIGHTS = ("Tensor graph_values, Tensor coefficients, Tensor? bias_map, Tensor temporal_values, Tensor? temporal_bias, "
            "Tensor weight1, Tensor shift1, Tensor weight2, Tensor shift2, Tensor[] index, int[] sizes")
LIBRARY.define(f"stgcn_block(Tensor x, Tensor? residual, {_WEIGHTS}, float[] eps, bool identity) -> Tensor[]")
LIBRARY.define("stgcn_block_backward(Tensor dout, Tensor x, Tensor z, Tensor y, Tensor out, Tensor mean1, Tensor rstd1, "
               f"Tensor mean2, Tensor rstd2, {_WEIGHTS}, bool identity, bool need_coefficients) -> Tensor[]")


def _arguments(x: Tensor, frames: int, index: list[Tensor], sizes: list[int], graph_values: Tensor, temporal_values: Tensor
               ) -> tuple[Any, ...]:
    """What both native functions begin with. index: ptr, source, then row_ptr, input, tap of both patterns; sizes: shape and
    block of both, stride, dilation."""
    ptr, source, *patterns = index
    graph, temporal, (stride, dilation) = sizes[:5], sizes[5:10], sizes[10:]
    return (x.dtype == torch.float64, [x.shape[0], x.shape[2], frames, x.shape[3], stride, dilation],
            [*graph, graph_values.shape[0]], _native.index(*patterns[:3]), [graph[2], x.shape[3], source.shape[0]],
            [ptr.data_ptr(), source.data_ptr()], [*temporal, temporal_values.shape[0]], _native.index(*patterns[3:]))


def _fake_forward(x: Tensor, residual: Tensor | None, graph_values: Tensor, coefficients: Tensor, bias_map: Tensor | None,
                  temporal_values: Tensor, temporal_bias: Tensor | None, weight1: Tensor, shift1: Tensor, weight2: Tensor,
                  shift2: Tensor, index: list[Tensor], sizes: list[int], eps: list[float], identity: bool) -> list[Tensor]:
    z = empty(x, (x.shape[0], sizes[0], x.shape[2], x.shape[3]))
    out, y = (empty(x, (x.shape[0], sizes[5], out_frames(x.shape[2], sizes[10]), x.shape[3])) for _ in range(2))
    return [out, z, y, *(x.new_empty(c) for c in (sizes[0], sizes[5]) for _ in range(3))]


@implement("stgcn_block", _fake_forward)
def _forward(x: Tensor, residual: Tensor | None, graph_values: Tensor, coefficients: Tensor, bias_map: Tensor | None,
             temporal_values: Tensor, temporal_bias: Tensor | None, weight1: Tensor, shift1: Tensor, weight2: Tensor,
             shift2: Tensor, index: list[Tensor], sizes: list[int], eps: list[float], identity: bool) -> list[Tensor]:
    out, z, y, *statistics = outputs = _fake_forward(
        x, residual, graph_values, coefficients, bias_map, temporal_values, temporal_bias, weight1, shift1, weight2, shift2,
        index, sizes, eps, identity)
    x = x.contiguous()
    kept = [None if t is None else t.contiguous() for t in (
        x, x if identity else residual, graph_values, coefficients, bias_map, temporal_values, temporal_bias, weight1, shift1,
        *statistics[:3], weight2, shift2, *statistics[3:], z, y, out)]
    _native.module.block_forward(*_arguments(x, y.shape[2], index, sizes, graph_values, temporal_values), eps,
                                 [_native.address(t) for t in kept], torch.get_num_threads())
    return outputs


def _fake_backward(dout: Tensor, x: Tensor, z: Tensor, y: Tensor, out: Tensor, mean1: Tensor, rstd1: Tensor, mean2: Tensor,
                   rstd2: Tensor, graph_values: Tensor, coefficients: Tensor, bias_map: Tensor | None, temporal_values: Tensor,
                   temporal_bias: Tensor | None, weight1: Tensor, shift1: Tensor, weight2: Tensor, shift2: Tensor,
                   index: list[Tensor], sizes: list[int], identity: bool, need_coefficients: bool) -> list[Tensor]:
    like = lambda t: empty(x, (0,) if t is None else t.shape)
    return [like(t) for t in (x, y, graph_values, coefficients if need_coefficients else None, bias_map, temporal_values,
                              temporal_bias, weight1, shift1, weight2, shift2)]


@implement("stgcn_block_backward", _fake_backward)
def _backward(dout: Tensor, x: Tensor, z: Tensor, y: Tensor, out: Tensor, mean1: Tensor, rstd1: Tensor, mean2: Tensor,
              rstd2: Tensor, graph_values: Tensor, coefficients: Tensor, bias_map: Tensor | None, temporal_values: Tensor,
              temporal_bias: Tensor | None, weight1: Tensor, shift1: Tensor, weight2: Tensor, shift2: Tensor,
              index: list[Tensor], sizes: list[int], identity: bool, need_coefficients: bool) -> list[Tensor]:
    gradients = _fake_backward(dout, x, z, y, out, mean1, rstd1, mean2, rstd2, graph_values, coefficients, bias_map,
                               temporal_values, temporal_bias, weight1, shift1, weight2, shift2, index, sizes, identity,
                               need_coefficients)
    dx, g, dgraph, dcoef, dbias_map, dtemporal, dbias, dweight1, dshift1, dweight2, dshift2 = gradients
    x, dz = x.contiguous(), empty(z, z.shape)
    saved = [None if t is None else t.contiguous() for t in (
        x, None, graph_values, coefficients, bias_map, temporal_values, temporal_bias, weight1, shift1, mean1, rstd1, None,
        weight2, shift2, mean2, rstd2, None, z, y, out)]
    dout = dout.contiguous()
    made = [dout, g, dz, dx, dgraph, dcoef if need_coefficients else None, None if bias_map is None else dbias_map, dtemporal,
            None if temporal_bias is None else dbias, dweight1, dshift1, dweight2, dshift2]
    _native.module.block_backward(*_arguments(x, y.shape[2], index, sizes, graph_values, temporal_values),
                                  [_native.address(t) for t in saved], [_native.address(t) for t in made], identity,
                                  torch.get_num_threads())
    return gradients
