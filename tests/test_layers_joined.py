from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from sparse_stgcn import compact, create_model, sparsify
from sparse_stgcn.backbones.aagcn import AdaptiveGraphUnit
from sparse_stgcn.backbones.ctrgcn import ChannelGraphUnit
from sparse_stgcn.backbones.dgstgcn import GroupGraphUnit
from sparse_stgcn.joins import joined
from sparse_stgcn.kernels import BlockPattern, _native, means, share, temporal_conv
from sparse_stgcn.kernels.dispatch import forced_backend
from sparse_stgcn.layers import SparseConv2d
from tests.kernel_cases import normal, random_pattern, strided


def convolutions(widths, block, stage, stride=1, bias=True):
    convs = [SparseConv2d(12, width, stride=stride, bias=bias) for width in widths]
    for seed, conv in enumerate(convs):
        conv.double()
        if stage == "dense":
            continue
        conv.attach(random_pattern(conv.shape_oik, block, 0.4, seed=seed))
        if stage == "compact":
            conv.compact()
    return convs


def run(op, convs, x, dys):
    x = x.detach().requires_grad_()
    ys = op(x)
    parameters = [p for conv in convs for p in conv.parameters()]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *parameters], dys)]


@pytest.mark.parametrize("stage", ["dense", "warmup", "compact"])
@pytest.mark.parametrize(("widths", "block"), [
    ((16, 8, 24), (8, 1)), ((16, 14, 10), (8, 1)), ((10, 11, 9), (8, 1)), ((3, 2, 5), (8, 1)), ((16, 8), (4, 4)),
    ((8,), (1, 1)),
], ids=str)
@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, False)])
def test_equals_one_by_one(stage, widths, block, stride, bias):
    torch.manual_seed(0)
    convs = convolutions(widths, block, stage, stride, bias)
    x = strided(normal(2, 12, 9, 25, seed=1, dtype=torch.float64), "channels_last")
    dys = [normal(2, width, -(-9 // stride), 25, seed=2 + width, dtype=torch.float64) for width in widths]
    together, alone = (run(op, convs, x, dys) for op in (lambda x: joined(convs, x), lambda x: [conv(x) for conv in convs]))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_which_are_one_product(monkeypatch):
    calls = []
    for module in ("joins", "layers"):
        monkeypatch.setattr(f"sparse_stgcn.{module}.temporal_conv", lambda *given: calls.append(given) or temporal_conv(*given))
    x = normal(2, 12, 9, 25, seed=1, dtype=torch.float64)
    for widths, expected in (((16, 14, 10), 1), ((10, 11, 9), 1), ((3, 2, 5), 3)):
        joined(convolutions(widths, (8, 1), "compact"), x)
        assert len(calls) == expected, widths
        calls.clear()


@pytest.mark.parametrize("widths", [(10, 11, 9), (3, 2, 5)])
def test_aliases_serve_one_product_and_many(widths):
    convs, x = convolutions(widths, (8, 1), "compact"), normal(2, 12, 9, 25, seed=1, dtype=torch.float64)
    dys = [normal(2, width, 9, 25, seed=2 + width, dtype=torch.float64) for width in widths]
    together = run(lambda x: joined(convs, share(x, 3)), convs, x, dys)
    for a, b in zip(together, run(lambda x: [conv(x) for conv in convs], convs, x, dys), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_follows_a_change_of_pattern_and_stage():
    convs = convolutions((16, 8), (8, 1), "compact")
    x = normal(2, 12, 5, 25, seed=1, dtype=torch.float64)
    joined(convs, x)
    convs[1].densify()
    torch.testing.assert_close(torch.cat(joined(convs, x), 1), torch.cat([conv(x) for conv in convs], 1))
    convs[1].attach(BlockPattern.full((8, 12, 1), (8, 1)))
    convs[1].compact()
    torch.testing.assert_close(torch.cat(joined(convs, x), 1), torch.cat([conv(x) for conv in convs], 1))


def test_hooks_see_their_convolution():
    convs, seen = convolutions((16, 8), (8, 1), "compact"), []
    convs[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    joined(convs, normal(2, 12, 5, 25, seed=1, dtype=torch.float64))
    assert seen == [(2, 8, 5, 25)]


def test_other_convolutions_are_refused():
    with pytest.raises(ValueError, match="1 x 1 convolutions of one stride"):
        joined([SparseConv2d(4, 8), SparseConv2d(4, 8, stride=2)], torch.zeros(1, 4, 3, 5))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("form", ["dense", "compact"])
@pytest.mark.parametrize(("name", "most"), [("stgcn", 2), ("aagcn", 4), ("ctrgcn", 4), ("dgstgcn", 4)])
def test_the_gradients_of_a_block_s_input_are_one_sum(name, most, form, watched, monkeypatch):
    """The residual's goes into the sweep that adds up those of the spatial unit, unless a hook looks at that unit."""
    norm = {"num_person": 1} if name in ("aagcn", "ctrgcn") else {}
    model = create_model(name, 5, base_channels=8, **norm).double()
    model = compact(sparsify(model, 0.5, (2, 1))) if form == "compact" else model
    blocks = getattr(model.backbone, "net" if name == "ctrgcn" else "gcn")
    block, x = blocks[4].train(), normal(2, 8, 6, 25, seed=1, dtype=torch.float64)  # strided: a residual of its own
    if watched:
        getattr(block, block.names[0]).register_forward_hook(lambda *_: None)
    added = []
    real = means._ops.total
    monkeypatch.setattr(means, "_ops", SimpleNamespace(
        **{op: getattr(means._ops, op) for op in ("frame_mean", "append_mean", "append_mean_backward", "spread_mean",
                                                  "spread_mean_backward")},
        total=lambda parts, mean: added.append(len(parts) + (mean is not None)) or real(parts, mean)))
    results = []
    for backend in ("native", "reference"):
        with forced_backend(backend):
            leaf = x.clone().requires_grad_()
            copy.deepcopy(block)(leaf).square().sum().backward()
            results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    if _native.module is not None and not watched:
        assert max(added) == most


def test_a_spatial_unit_gives_its_input_to_one_more_reader():
    for unit in (ChannelGraphUnit(8, 8, torch.rand(3, 25, 25)), AdaptiveGraphUnit(8, 8, torch.rand(3, 25, 25)),
                 GroupGraphUnit(8, 8, torch.rand(8, 25, 25))):
        unit, x = unit.double(), normal(2, 8, 5, 25, seed=1, dtype=torch.float64).requires_grad_()
        plain = copy.deepcopy(unit)(x)
        y, other = unit.beside(x)
        assert torch.equal(y, plain) and torch.equal(other, x)
        (alone,) = torch.autograd.grad((plain * 2).sum() + (x * 3).sum(), x)
        (together,) = torch.autograd.grad((y * 2).sum() + (other * 3).sum(), x)
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
