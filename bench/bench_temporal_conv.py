"""9 x 1 temporal convolution: sparse against torch's dense one, forward and backward. 16 persons, V = 25."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_stgcn import masks
from sparse_stgcn.kernels import BlockPattern, reference

SHAPES = [(64, 100), (128, 50), (256, 25)]


def case(channels: int, frames: int, block: tuple[int, int], sparsity: float, batch: int = 16):
    generator = torch.Generator().manual_seed(0)
    shape = (channels, channels, 9)
    drawn = masks.draw([masks.Layer("conv", shape, block)], sparsity)["conv"]
    pattern = drawn if sparsity else BlockPattern.full(shape, block)
    weight = torch.randn(shape, generator=generator) / (9 * channels * (1 - sparsity)) ** 0.5
    x = torch.randn(batch, channels, frames, 25, generator=generator)
    dy = torch.randn(batch, channels, frames, 25, generator=generator)
    arguments = (pattern.row_ptr, pattern.input, pattern.tap, list(pattern.shape), list(pattern.block), 1, 1)
    return x, dy, pattern.gather(weight), pattern, arguments


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize(("block", "sparsity"), [((8, 1), 0.0), ((8, 1), 0.8), ((8, 1), 0.95), ((8, 1), 0.99), ((1, 1), 0.95)],
                         ids=lambda v: str(v))
def bench_forward(checked, channels, frames, block, sparsity):
    x, _, values, pattern, arguments = case(channels, frames, block, sparsity)
    checked(lambda: torch.ops.sparse_stgcn.temporal_conv(x, values, None, *arguments),
            lambda: reference.temporal_conv(x.double(), values.double(), pattern), tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
def bench_forward_dense_torch(checked, channels, frames):
    x, _, values, pattern, _ = case(channels, frames, (8, 1), 0.0)
    weight = pattern.scatter(values).unsqueeze(-1)
    checked(lambda: F.conv2d(x, weight, padding=(4, 0)),
            lambda: F.conv2d(x.double(), weight.double(), padding=(4, 0)), tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("block", [(8, 1), (1, 1)], ids=str)
def bench_dx(checked, channels, frames, block):
    x, dy, values, pattern, arguments = case(channels, frames, block, 0.95)
    leaf = x.double().requires_grad_()
    checked(lambda: torch.ops.sparse_stgcn.temporal_conv_dx(dy, values, *arguments, frames),
            lambda: torch.autograd.grad(reference.temporal_conv(leaf, values.double(), pattern), leaf, dy.double())[0],
            tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("block", [(8, 1), (1, 1)], ids=str)
def bench_dw(checked, channels, frames, block):
    x, dy, values, pattern, arguments = case(channels, frames, block, 0.95)
    leaf = values.double().requires_grad_()
    checked(lambda: torch.ops.sparse_stgcn.temporal_conv_dw(x, dy, values, None, None, *arguments)[0],
            lambda: torch.autograd.grad(reference.temporal_conv(x.double(), leaf, pattern), leaf, dy.double())[0],
            tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("block", [(8, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("product", ["forward", "dx", "dw"])
def bench_bfloat16(checked, channels, frames, block, product):
    x, dy, values, pattern, arguments = case(channels, frames, block, 0.95)
    x, dy, values, ops = x.bfloat16(), dy.bfloat16(), values.bfloat16().float(), torch.ops.sparse_stgcn
    leaves = [x.double().requires_grad_(), values.double().requires_grad_()]
    y = reference.temporal_conv(leaves[0], leaves[1], pattern)
    run, exact = {
        "forward": (lambda: ops.temporal_conv(x, values, None, *arguments), y.detach()),
        "dx": (lambda: ops.temporal_conv_dx(dy, values, *arguments, frames),
               torch.autograd.grad(y, leaves[0], dy.double(), retain_graph=True)[0]),
        "dw": (lambda: ops.temporal_conv_dw(x, dy, values, None, None, *arguments)[0],
               torch.autograd.grad(y, leaves[1], dy.double(), retain_graph=True)[0]),
    }[product]
    checked(run, lambda: exact, tolerance=1e-5 if product == "dw" else 2.0**-8)  # dw is float32, the others are rounded once
