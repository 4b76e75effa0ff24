"""The branches of temporal units in training: one op against norm, ReLU, convolutions and pooling in dense PyTorch.

4 persons, V = 25.
"""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, LiveConv, branches
from sparse_stgcn.kernels.branches import Map
from sparse_stgcn.kernels.dispatch import forced_backend

SHAPES = [(64, 100), (128, 50), (256, 25)]
N, V, KEPT = 4, 25, 0.05
# Taps and dilation of the convolutions; CTR-GCN's units are four wide, DG-STGCN's six with a joint mean.
UNITS = {"ctr": [(5, 1), (5, 2)], "dg": [(3, 1), (3, 2), (3, 3), (3, 4)], "point": [(1, 1)]}


def case(unit: str, channels: int, frames: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op on (xs, weight, bias, coef, values), one after the other.

    x lies on a grid, so that float32 and float64 agree in every ReLU and maximum.
    """
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    convs = UNITS[unit]
    width = channels if unit == "point" else channels // (len(convs) + 2) // 8 * 8
    others: list[Map] = {"ctr": ["max"], "dg": ["max", "pass"], "point": []}[unit]
    live = lambda taps: torch.rand(width // 8, width, taps, generator=generator) < KEPT
    patterns = [BlockPattern.from_blocks(live(taps), (width, width, taps), (8, 1)) for taps, _ in convs]
    xs = [(4 * normal(N, width, frames, V)).round() / 4 for _ in (*convs, *others)]
    normed = width * sum(way != "pass" for way in (*convs, *others))

    def run(*tensors: Tensor) -> Tensor:
        *inputs, weight, bias, coef = tensors[:len(xs) + 3]
        maps: list[Map] = [LiveConv(values, pattern, None, dilation) for values, pattern, (_, dilation)
                           in zip(tensors[len(xs) + 3:], patterns, convs, strict=True)]
        return branches(inputs, weight, bias, [*maps, *others], coef=coef if unit == "dg" else None)[0]

    return run, [*xs, normal(normed), normal(normed), normal(V), *(p.gather(normal(*p.shape)) for p in patterns)]


def on(engine: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        with forced_backend(engine):
            return function(*arguments)

    return run


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("unit", UNITS)
def bench_step(checked, unit, engine, channels, frames):
    """Forward and backward; the gradient of the first x is compared."""
    op, arguments = case(unit, channels, frames)
    run = on(engine, op)
    dy = torch.randn(op(*arguments).shape, generator=torch.Generator().manual_seed(1))

    def step(run: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
        leaves = [argument.to(dtype).clone().requires_grad_() for argument in arguments]

        def gradient() -> Tensor:
            return torch.autograd.grad(run(*leaves), leaves, dy.to(dtype), allow_unused=True)[0]

        return gradient

    checked(step(run, torch.float32), step(on("reference", op), torch.float64), tolerance=1e-4)
