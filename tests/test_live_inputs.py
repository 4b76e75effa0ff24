"""Inputs that no live block reads: they are neither packed nor sent anything, and gradients that are 0 end there."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_stgcn import compact, create_model, sparsify
from sparse_stgcn.kernels import BlockPattern, _native, temporal_conv
from sparse_stgcn.kernels.dispatch import forced_backend
from tests import tiny
from tests.kernel_cases import normal, random_pattern

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def pattern_of(outputs: int, inputs: int, taps: int, block: tuple[int, int], read: list[int]) -> BlockPattern:
    """A pattern whose live blocks read the block columns ``read`` alone, each at one tap of one block row."""
    live = torch.zeros(-(-outputs // block[0]), -(-inputs // block[1]), taps, dtype=torch.bool)
    for place, column in enumerate(read):
        live[place % live.shape[0], column, place % taps] = True
    return BlockPattern.from_blocks(live, (outputs, inputs, taps), block)


def test_inputs_read() -> None:
    assert pattern_of(16, 5, 3, (8, 1), [1, 4]).inputs_read().tolist() == [-1, 0, -1, -1, 0]
    assert pattern_of(4, 5, 1, (4, 2), [2]).inputs_read().tolist() == [-1, -1, -1, -1, 0]
    assert BlockPattern.full((16, 5, 3)).inputs_read() is None
    pattern = random_pattern((8, 6, 1), (8, 1), 0.5)
    assert pattern.inputs_read() is pattern.inputs_read()


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("taps", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 2), (9, 2, 1), (5, 3, 2)])
@pytest.mark.parametrize(("block", "inputs", "read"), [((8, 1), 12, [3, 4, 11]), ((8, 1), 12, []), ((4, 4), 11, [2]),
                                                       ((1, 1), 7, [5, 6])])
def test_temporal_conv(block, inputs, read, taps, stride, dilation, dtype) -> None:
    """As the reference, and what nobody reads does not matter: NaN there reaches nothing."""
    pattern = pattern_of(10, inputs, taps, block, read)
    x, dense = normal(3, inputs, 13, 25, seed=1).to(dtype), normal(10, inputs, taps, seed=2).to(dtype)
    dy = normal(3, 10, -(-13 // stride), 25, seed=3).to(dtype)

    def run(x: Tensor) -> list[Tensor]:
        bias = normal(10, seed=4).to(dtype)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, pattern.gather(dense), bias)]
        y = temporal_conv(leaves[0], leaves[1], pattern, leaves[2], stride, dilation)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    got = run(x)
    with forced_backend("reference"):
        exact = run(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, e in zip(got, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, float(e.abs().max()) if e.numel() else 0))
    unread = pattern.inputs_read() < 0
    assert not got[1][:, unread].any()
    for a, b in zip(run(x.masked_fill(unread[:, None, None], float("nan"))), got, strict=True):
        assert torch.equal(a, b)


@native
@pytest.mark.parametrize("backbone", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
@pytest.mark.parametrize(("sparsity", "block"), [(0.95, (8, 1)), (0.99, (8, 1)), (0.9, (1, 1))], ids=str)
def test_networks(backbone, sparsity, block) -> None:
    """A training step as on the reference backend, at sparsities that leave most inputs unread."""
    torch.manual_seed(0)
    persons = {"num_person": 1} if backbone in ("aagcn", "ctrgcn") else {}
    model = create_model(backbone, 3, layout=tiny.SKELETON, base_channels=16, **persons).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # some begin near 0, which hides what they scale; no constant channel lies at 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    compact(sparsify(model, sparsity, block))
    x, label, results = normal(5, 1, 12, 5, 3, seed=1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]), []
    for backend in ("native", "reference"):
        other = copy.deepcopy(model)
        with forced_backend(backend):
            logits = other(x)
            F.cross_entropy(logits, label).backward()
        results.append({"logits": logits.detach(), **{name: p.grad for name, p in other.named_parameters()},
                        **dict(other.named_buffers())})
    for name, exact in results[1].items():
        worst = float((results[0][name] - exact).abs().max())
        assert worst <= 1e-7 * max(1e-3, float(exact.abs().max())), name
