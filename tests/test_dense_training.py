"""Dense weights that are trained by the kernels of live blocks: the same network, gradients and statistics."""
from __future__ import annotations

import copy
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_stgcn import create_model, densify, sparsify
from sparse_stgcn.kernels import BlockPattern, _native
from sparse_stgcn.layers import SparseConv2d
from tests import tiny
from tests.kernel_cases import normal

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
BACKBONES = ("stgcn", "aagcn", "ctrgcn", "dgstgcn")


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch):
    """Sets the longest sum that runs as blocks, on any instruction set."""
    return lambda value: monkeypatch.setattr("sparse_stgcn.layers._LONGEST_SUM", {_native.isa: value})


def step(model: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Logits, gradients by name and statistics after one training step, in float64."""
    model = copy.deepcopy(model)
    logits = model(x)
    F.cross_entropy(logits, label).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return {name: t.double() for name, t in ({"logits": logits.detach()} | gradients | dict(model.named_buffers())).items()}


@native
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stage", ["dense", "warmup", "masked"])
def test_a_step_is_that_of_torch(backbone, stage, longest, monkeypatch):
    torch.manual_seed(0)
    persons = {"num_person": 1} if backbone in ("aagcn", "ctrgcn") else {}
    model = create_model(backbone, 3, layout=tiny.SKELETON, base_channels=16, **persons)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # some begin near 0, which hides what they scale; no constant channel lies at 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    if stage != "dense":
        sparsify(model, 0.5, (4, 1))
    for module in model.modules():
        if isinstance(module, SparseConv2d):
            module.masked = stage == "masked"
    x, label = normal(4, 1, 16, 5, 3, seed=1), torch.tensor([0, 1, 2, 0])
    ran: list[SparseConv2d] = []
    real = SparseConv2d.live
    monkeypatch.setattr(SparseConv2d, "live", lambda self: (result := real(self)) and (ran.append(self), result)[1])
    longest(9 * 32)  # all but the 9 x 1 convolutions of the last blocks
    blocks = step(model, x, label)
    assert len(set(map(id, ran))) >= 19
    longest(0)
    del ran[:]
    plain = step(model, x, label)
    assert not ran
    exact = step(model.double(), x.double(), label)
    scales = {name: float(t.abs().max()) + 1e-3 for name, t in exact.items()}
    errors = [[float((result[name] - t).abs().max()) / scales[name] for name, t in exact.items()] for result in (blocks, plain)]
    # A ReLU that a rounding error turns may change single gradients by much, for torch as for us.
    assert median(errors[0]) < max(1e-6, 5 * median(errors[1])) and max(errors[0]) < max(1e-4, 5 * max(errors[1]))


@native
def test_when_a_dense_weight_runs_as_blocks(longest):
    conv = SparseConv2d(4, 16, kernel_size=3)
    longest(12)
    pattern = conv.live_pattern
    assert pattern is not None and pattern.density == 1 and conv.live_pattern is pattern
    assert copy.deepcopy(conv).live_pattern is not None
    longest(11)
    assert conv.live_pattern is None
    longest(12)
    with torch.no_grad():
        assert conv.live_pattern is None
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.live_pattern is None
    assert conv.eval().live_pattern is None
    assert conv.train().double().live_pattern is None
    assert SparseConv2d(4, 16, subsets=3).live_pattern is not None
    conv = SparseConv2d(4, 16, kernel_size=3)
    conv.attach(BlockPattern.from_blocks(torch.rand(2, 4, 3) < 0.5, (16, 4, 3), (8, 1)))
    conv.compact()
    assert conv.eval().live_pattern is conv.pattern


def test_where_torch_is_faster_it_stays(monkeypatch):
    monkeypatch.setattr("sparse_stgcn.layers._native.isa", "baseline")
    assert SparseConv2d(4, 16).live_pattern is None
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", "reference")
    monkeypatch.setattr("sparse_stgcn.layers._native.isa", "avx512")
    assert SparseConv2d(4, 16).live_pattern is None


@native
def test_state_and_checkpoints_do_not_know_of_it(longest):
    longest(1000)
    model = tiny.model(0.5)
    keys = list(model.state_dict())
    model.train()(torch.randn(2, 1, 8, 5, 3)).sum().backward()
    assert list(model.state_dict()) == keys
    assert {conv.stage for conv in model.modules() if isinstance(conv, SparseConv2d)} <= {"dense", "warmup"}
    densify(model, forget=True)


@pytest.mark.parametrize("block", [(8, 1), (4, 4), (1, 1), (3, 2)])
def test_every_block_is_gathered_as_any_other(block):
    """All blocks are permuted, not indexed: the same values, gradient and inverse."""
    shape = (21, 10, 3)
    pattern = BlockPattern.full(shape, block)
    dense = normal(*shape, seed=1, dtype=torch.float64).requires_grad_()
    index = pattern._flat_index()
    indexed = dense.reshape(-1)[index.clamp(min=0)].masked_fill(index < 0, 0)
    values = pattern.gather(dense)
    assert torch.equal(values, indexed)
    dy = normal(*values.shape, seed=2, dtype=torch.float64)
    assert torch.equal(*(torch.autograd.grad(v, dense, dy)[0] for v in (values, indexed)))
    assert torch.equal(pattern.scatter(values), dense)


@pytest.mark.parametrize(("shape", "block"), [((64, 64, 1), (64, 64)), ((16, 5, 1), (1, 1)), ((8, 1, 1), (8, 1)),
                                              ((1, 8, 3), (1, 1))])
def test_what_is_gathered_is_a_copy(shape, block):
    """Contiguous, as kernels take it, also where a permutation could be a view; a change of it leaves the weight as it was."""
    dense = normal(*shape, seed=1)
    before = dense.clone()
    values = BlockPattern.full(shape, block).gather(dense)
    assert values.is_contiguous() and values.data_ptr() != dense.data_ptr()
    values.zero_()
    assert torch.equal(dense, before)
