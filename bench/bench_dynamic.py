"""Graphs from the sample: native aggregations against the dense PyTorch reference, forward and backward. 4 persons, V = 25."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, reference, reference_dynamic
from sparse_stgcn.kernels.aa_unit import aa_unit_graph
from sparse_stgcn.kernels.ctr import ctr_aggregate
from sparse_stgcn.kernels.ctr_unit import ctr_unit
from sparse_stgcn.kernels.dg_unit import dg_unit
from sparse_stgcn.kernels.dynamic import aa_graph, dg_aggregate

SHAPES = [(64, 100), (128, 50), (256, 25)]
OPS = ["aa", "aa_unit", "ctr", "ctr_sparse", "ctr_unit", "dg", "dg_unit"]
N, V, K = 4, 25, 8


def case(op: str, channels: int, frames: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """The native op, its reference and their arguments, in the sizes of the backbones; conv4 of ctr_sparse keeps one of its
    inputs for every eight channels."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    graph, alpha = normal(V, V) / 5, torch.tensor([0.7])
    x = normal(N, channels, frames, V)
    if op == "aa":
        embedded = normal(N, 2, 3, channels // 4, frames, V)
        return aa_graph, reference_dynamic.aa_graph, [embedded, alpha, normal(3, V, V) / 5]
    if op in ("dg", "dg_unit"):
        inner = channels // K
        graphs = [normal(N, K, inner, V), normal(N, K, inner, V), alpha, alpha / 2, normal(K, V, V) / 5]
        if op == "dg":
            return dg_aggregate, reference_dynamic.dg_aggregate, [x.unflatten(1, (K, inner)), *graphs]

        def plain(x, weight, bias, *graphs):
            h, _, _ = reference.norm([x], weight, bias, relu=True)
            return reference_dynamic.dg_aggregate(h.unflatten(1, (K, inner)), *graphs).flatten(1, 2)

        # On a grid, so that float32 and float64 agree in every ReLU.
        return lambda *given: dg_unit(*given)[0], plain, [(4 * x).round() / 4, normal(channels), normal(channels), *graphs]
    if op.endswith("unit"):
        return unit(op, channels, x, alpha, normal, generator)
    rank = channels // 8
    weight, pattern = normal(channels, rank), None
    if op == "ctr_sparse":
        live = torch.arange(rank)[:, None, None] == torch.randint(rank, (1, rank, 1), generator=generator)
        pattern = BlockPattern.from_blocks(live.transpose(0, 1), (channels, rank, 1), (8, 1))
        weight = pattern.gather(weight[..., None])
    arguments = [normal(N, rank, V), normal(N, rank, V), x, weight / rank**0.5, normal(channels), alpha, graph]
    native, plain = (partial(op, conv4_pattern=pattern) for op in (ctr_aggregate, reference_dynamic.ctr_aggregate))
    return native, plain, arguments


def unit(op: str, channels: int, x: Tensor, alpha: Tensor, normal: Callable[..., Tensor], generator: torch.Generator
         ) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Three subsets with the convolution before them, 0.95 of whose blocks of eight outputs are masked."""
    outputs, rank = 3 * (channels // 2 if op == "aa_unit" else channels), channels // 8
    live = torch.rand(outputs // 8, channels, 1, generator=generator) < 0.05
    pattern = BlockPattern.from_blocks(live, (outputs, channels, 1), (8, 1))
    values = pattern.gather(normal(outputs, channels, 1)) / (channels / 20)**0.5
    arguments = [x, values, normal(outputs), alpha, normal(3, V, V) / 5]
    if op == "aa_unit":
        def plain(x, values, bias, alpha, A):
            embedded = reference.temporal_conv(x, values, pattern, bias).unflatten(1, (2, 3, -1))
            return reference_dynamic.aa_graph(embedded, alpha, A)

        return lambda x, values, bias, *rest: aa_unit_graph(x, values, pattern, bias, *rest), plain, arguments

    def native(x, values, bias, alpha, A, embedded, weights, biases):
        return ctr_unit(embedded, x, values, pattern, bias, list(weights), list(biases), alpha, A)

    def apart(x, values, bias, alpha, A, embedded, weights, biases):
        wide = reference.temporal_conv(x, values, pattern, bias).unflatten(1, (3, -1))
        return sum(reference_dynamic.ctr_aggregate(*embedded[:, k].unbind(1), wide[:, k], weights[k], biases[k], alpha, A[k])
                   for k in range(3))

    return native, apart, [*arguments, normal(N, 3, 2, rank, V), normal(3, channels, rank) / rank**0.5, normal(3, channels)]


def in_double(function: Callable[..., Tensor], arguments: list[Tensor]) -> Tensor:
    return function(*(argument.double() for argument in arguments))


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("op", OPS)
def bench_forward(checked, op, engine, channels, frames):
    native, reference, arguments = case(op, channels, frames)
    run = native if engine == "native" else reference

    def forward() -> Tensor:
        with torch.inference_mode():
            return run(*arguments)

    checked(forward, lambda: in_double(reference, arguments), tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("op", OPS)
def bench_backward(checked, op, engine, channels, frames):
    """The gradients of all arguments together; that of x, or of the embeddings, is compared."""
    native, reference, arguments = case(op, channels, frames)
    at = 2 if op in ("ctr", "ctr_sparse") else 0
    dy = torch.randn(reference(*arguments).shape, generator=torch.Generator().manual_seed(1))

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
        leaves = [argument.to(dtype).clone().requires_grad_() for argument in arguments]
        y, probe = function(*leaves), dy.to(dtype)
        return lambda: torch.autograd.grad(y, leaves, probe, retain_graph=True)[at]

    run = gradient(native if engine == "native" else reference, torch.float32)
    checked(run, gradient(reference, torch.float64), tolerance=1e-5)
