"""Fresh networks start where PYSKL's do: laws of weights, norms, graphs."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparse_stgcn import Recognizer, Skeleton, create_model
from sparse_stgcn.layers import SparseConv2d
from sparse_stgcn.sparsity import maskable_convs


def fresh(name: str) -> Recognizer:
    torch.manual_seed(0)
    return create_model(name, 60)


def law(conv: SparseConv2d) -> str:
    """Which of the two laws a big weight follows: PyTorch's bounded uniform, or normal over fan_out."""
    weight, bound = conv.weight.detach(), 1 / math.sqrt(conv.in_channels * conv.kernel_size)
    if weight.abs().max() <= bound:
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert conv.bias.abs().max() <= bound
        return "default"
    assert weight.std() == pytest.approx(math.sqrt(2 / (conv.out_channels * conv.kernel_size)), rel=0.15)
    assert (conv.bias == 0).all()
    return "fan_out"


def laws(name: str) -> dict[str, set[str]]:
    """Laws by role; layers below 500 weights are too small to judge."""
    found: dict[str, set[str]] = {}
    for key, conv in maskable_convs(fresh(name)).items():
        if conv.weight.numel() >= 500 and ".conv_d." not in key:
            found.setdefault("residual" if ".residual." in key else "unit", set()).add(law(conv))
    return found


@pytest.mark.parametrize(("name", "unit"), [
    ("stgcn", "default"), ("aagcn", "fan_out"), ("ctrgcn", "fan_out"), ("dgstgcn", "default")])
def test_convolutions(name: str, unit: str) -> None:
    assert laws(name) == {"residual": {"default"}, "unit": {unit}}


def test_output_convolutions_of_aagcn() -> None:
    conv = fresh("aagcn").backbone.gcn[9].gcn.conv_d[1]
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 256 * 3)), rel=0.05)
    assert (conv.bias == 0).all()


@pytest.mark.parametrize(("name", "small"), [
    ("stgcn", ()), ("aagcn", ("gcn.bn",)), ("ctrgcn", ("gcn1.bn",)), ("dgstgcn", ())])
def test_norms(name: str, small: tuple[str, ...]) -> None:
    for key, module in fresh(name).named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            want = 1e-6 if key.endswith(small or "-") else 1
            assert (module.weight == want).all(), key
            assert (module.bias == 0).all(), key
            assert (module.eps, module.momentum) == (1e-5, 0.1)


def test_attention_of_aagcn() -> None:
    unit = fresh("aagcn").backbone.gcn[9].gcn
    for zero in (unit.conv_ta.weight, unit.fc2c.weight, unit.conv_ta.bias, unit.conv_sa.bias, unit.fc1c.bias,
                 unit.fc2c.bias):
        assert (zero == 0).all()
    assert unit.conv_sa.weight.std().item() == pytest.approx(math.sqrt(2 / (25 * (256 + 1))), rel=0.05)
    assert unit.fc1c.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert (unit.alpha == 0).all()


@pytest.mark.parametrize(("name", "mode"), [("stgcn", "stgcn_spatial"), ("aagcn", "spatial"), ("ctrgcn", "spatial")])
def test_graphs(name: str, mode: str) -> None:
    want = Skeleton.load("nturgb+d").adjacency(mode)
    for block in fresh(name).backbone.blocks:
        assert torch.equal(getattr(block, block.names[0]).A, want)
        assert getattr(block, block.names[0]).A.requires_grad is (name != "stgcn")
    assert torch.equal(fresh("stgcn").backbone.gcn[0].gcn.PA, torch.ones(3, 25, 25))


def test_random_graph_of_dgstgcn() -> None:
    graphs: list[Tensor] = [block.gcn.A for block in fresh("dgstgcn").backbone.blocks]
    assert all(torch.equal(graph, graphs[0]) for graph in graphs)
    assert len({graph.data_ptr() for graph in graphs}) == 10
    assert graphs[0].mean().item() == pytest.approx(0.04, abs=0.002)
    other = create_model("dgstgcn", 60, graph_seed=1).backbone.gcn[0].gcn.A
    assert not torch.equal(other, graphs[0])
    unit = fresh("dgstgcn").backbone.gcn[0]
    assert (torch.cat([unit.gcn.alpha, unit.gcn.beta, unit.tcn.add_coeff]) == 0).all()


def test_head() -> None:
    head = fresh("stgcn").cls_head.fc_cls
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (head.bias == 0).all()
