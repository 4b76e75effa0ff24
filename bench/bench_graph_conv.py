"""Spatial graph convolution of ST-GCN: sparse against torch's dense path, forward and backward. 16 persons, V = 25."""
from __future__ import annotations

import pytest
import torch

from sparse_stgcn import Skeleton, masks
from sparse_stgcn.kernels import BlockPattern, Support, graph_conv, reference
from sparse_stgcn.layers import SparseConv2d

SHAPES = [(64, 100), (128, 50), (256, 25)]
ADJACENCY = Skeleton.load("nturgb+d").adjacency("stgcn_spatial")


def case(channels: int, frames: int, block: tuple[int, int], sparsity: float, batch: int = 16):
    generator = torch.Generator().manual_seed(0)
    shape = (channels, channels, 3)
    drawn = masks.draw([masks.Layer("conv", shape, block)], sparsity)["conv"]
    pattern = drawn if sparsity else BlockPattern.full(shape, block)
    weight = torch.randn(shape, generator=generator) / (3 * channels * (1 - sparsity)) ** 0.5
    x = torch.randn(batch, channels, frames, 25, generator=generator)
    dy = torch.randn(batch, channels, frames, 25, generator=generator)
    return x, dy, pattern.gather(weight), pattern


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize(("block", "sparsity"), [((8, 1), 0.0), ((8, 1), 0.95), ((1, 1), 0.95)], ids=lambda v: str(v))
def bench_forward(checked, channels, frames, block, sparsity):
    x, _, values, pattern = case(channels, frames, block, sparsity)
    support = Support.of(ADJACENCY != 0)
    checked(lambda: graph_conv(x, values, pattern, ADJACENCY, support=support),
            lambda: reference.graph_conv(x.double(), values.double(), pattern, ADJACENCY.double()), tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
def bench_forward_dense_torch(checked, channels, frames):
    x, _, values, pattern = case(channels, frames, (8, 1), 0.0)
    conv = SparseConv2d(channels, channels, bias=False, subsets=3)
    conv.weight.data.copy_(conv.from_oik(pattern.scatter(values)))

    def run():
        with torch.inference_mode():
            return conv.aggregate(x, ADJACENCY)

    checked(run, lambda: reference.graph_conv(x.double(), values.double(), pattern, ADJACENCY.double()), tolerance=1e-5)


@pytest.mark.parametrize(("channels", "frames"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("block", [(8, 1), (1, 1)], ids=str)
def bench_backward(checked, channels, frames, block):
    """dX, dW and dA together."""
    x, dy, values, pattern = case(channels, frames, block, 0.95)
    support, graph = Support.of(ADJACENCY != 0), ADJACENCY.clone().requires_grad_()
    x.requires_grad_(), values.requires_grad_()
    y = graph_conv(x, values, pattern, graph, support=support)
    leaf = x.detach().double().requires_grad_()
    checked(lambda: torch.autograd.grad(y, (x, values, graph), dy, retain_graph=True)[0],
            lambda: torch.autograd.grad(reference.graph_conv(leaf, values.detach().double(), pattern, ADJACENCY.double()), leaf,
                                        dy.double())[0], tolerance=1e-5)
