"""Tensors of 4 MB and more are written past the caches, in rows: what lies in them is what smaller tensors get, bit for bit."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, _native, graph_conv, norm, share, temporal_conv
from sparse_stgcn.kernels.ctr import ctr_aggregate_sum
from sparse_stgcn.kernels.dynamic import aa_graph, dg_aggregate

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

STREAMED = 4 << 20  # bytes: is_streamed of csrc/cpu/simd.inl
SAMPLES, FRAMES, JOINTS = 8, 100, 25


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pattern(shape: tuple[int, int, int], block: tuple[int, int]) -> BlockPattern:
    counts = -(-shape[0] // block[0]), -(-shape[1] // block[1]), shape[2]
    return BlockPattern.from_blocks(torch.rand(counts, generator=torch.Generator().manual_seed(1)) < 0.2, shape, block)


def results(op: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What op returns, and the gradients of its inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = op(*leaves)
    y.backward(torch.sin(7 * y.detach()))
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]  # backward has made them


def check_halves(op: Callable[..., Tensor], *inputs: Tensor, tensors: int = 1) -> None:
    """Samples do not see each other: one call on all of them is two calls on halves that are too small to be streamed.

    tensors: as many as the largest tensor is made of.
    """
    whole, half = results(op, inputs), SAMPLES // 2
    halves = [results(op, [x[part] for x in inputs]) for part in (slice(half), slice(half, None))]
    sizes = [4 * tensor.numel() // tensors for tensor in whole]
    assert STREAMED <= max(sizes) < 2 * STREAMED, sizes
    for all_samples, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(all_samples, torch.cat(parts))


@pytest.mark.parametrize("block", [(8, 1), (4, 1), (1, 1), (16, 16)])
@pytest.mark.parametrize("taps", [1, 3])
def test_temporal_conv(block, taps):
    p = pattern((53, 53, taps), block)
    values, bias = draw(*p.values_shape), draw(53)
    check_halves(lambda x: temporal_conv(x, values, p, bias), draw(SAMPLES, 53, FRAMES, JOINTS))
    values.requires_grad_()  # then a 1 x 1 convolution makes both gradients in one pass
    check_halves(lambda x: temporal_conv(x, values, p, bias), draw(SAMPLES, 53, FRAMES, JOINTS))


@pytest.mark.parametrize("of_samples", [False, True])
def test_graph_conv(of_samples):
    p = pattern((53, 53, 3), (8, 1))
    values, x = draw(*p.values_shape), draw(SAMPLES, 53, FRAMES, JOINTS)
    if of_samples:
        check_halves(lambda x, A: graph_conv(x, values, p, A, offset=draw(53)), x, draw(SAMPLES, 3, JOINTS, JOINTS, seed=2))
    else:
        check_halves(lambda x: graph_conv(x, values, p, draw(3, JOINTS, JOINTS), draw(3, 53)), x)


def test_graphs_of_the_sample():
    joints, scale = JOINTS, torch.tensor([0.3])
    A = draw(8, joints, joints, seed=3)
    weights, biases = [draw(18, 4, seed=k) for k in range(3)], [draw(18, seed=k) for k in range(3)]
    check_halves(lambda e, x: ctr_aggregate_sum(e, x, weights, biases, scale, A[:3]),
                 draw(SAMPLES, 3, 2, 4, joints), draw(SAMPLES, 3, 18, FRAMES, joints))
    check_halves(lambda x, a, b: dg_aggregate(x, a, b, scale, scale, A),
                 draw(SAMPLES, 8, 7, FRAMES, joints), draw(SAMPLES, 8, 7, joints), draw(SAMPLES, 8, 7, joints, seed=1))
    check_halves(lambda e: aa_graph(e, scale, A[:3]), draw(SAMPLES, 2, 3, 18, FRAMES, joints), tensors=2)


def test_sums_of_gradients():
    check_halves(lambda x: (lambda a, b, mean: a * b + mean)(*share(x, 2, mean=True)), draw(SAMPLES, 53, FRAMES, JOINTS))



@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_channel_by_channel(with_residual):
    x, residual = draw(SAMPLES, 230, 25, JOINTS), draw(SAMPLES, 230, 25, JOINTS, seed=1) if with_residual else None
    assert 4 * x.numel() >= STREAMED
    weight, bias = draw(230), draw(230, seed=1)

    def run(at: slice) -> list[Tensor]:
        add = None if residual is None else residual[:, at]
        return results(lambda x: norm(x, weight[at], bias[at], residual=add, relu=True)[0], [x[:, at]])

    for c in (0, 1, 6, 7, 100, 229):  # of groups of several channels, the last one ragged
        for all_channels, one in zip(run(slice(None)), run(slice(c, c + 1)), strict=True):
            assert torch.equal(all_channels[:, c:c + 1], one)
