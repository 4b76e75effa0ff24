"""optimize() never loses to the dense network: the engine is measured where both can win, and can be named."""
from __future__ import annotations

import copy

import pytest
import torch

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import _native
from sparse_stgcn.runtime import choice
from sparse_stgcn.sparsity import maskable_convs

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def network(name: str = "stgcn", sparsity: float = 0.0, block: str = "8x1", channels: int = 16):
    torch.manual_seed(0)
    model = sparse_stgcn.create_model(name, num_classes=7, base_channels=channels)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3), module.bias.data.normal_(0, 0.1)
    return sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, block)) if sparsity else model


X = torch.randn(2, 2, 12, 25, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", ["1x1", "8x1"])
@pytest.mark.parametrize("name", ["stgcn", "aagcn"])
@pytest.mark.parametrize("engine", choice.ENGINES)
def test_every_engine_is_the_network(name, engine, block):
    model = network(name, 0.3, block)
    with torch.inference_mode():
        want = sparse_stgcn.densify(copy.deepcopy(model)).double().eval()(X.double())
    fast = runtime.optimize(model, X, engine=engine)
    assert fast.choice == {12: engine}
    assert ((fast(X) - want).abs().max() / want.abs().max()).item() <= 1e-5


def test_a_dense_network_is_measured_once_a_clip_length(monkeypatch):
    calls = []

    def fastest(engines, keypoint):
        calls.append([name for name, _ in engines])
        return engines[-1][0]

    monkeypatch.setattr(runtime.recognizer, "fastest", fastest)
    fast = runtime.optimize(network())
    fast(X), fast(X), fast(X[:, :, :8])
    assert calls == [["fused", "torch", "torch channels_last"]] * 2
    assert fast.choice == {12: "torch channels_last", 8: "torch channels_last"}


def test_the_fastest_is_taken():
    import time

    slow = lambda x: time.sleep(0.02)
    quick = lambda x: x
    assert choice.fastest([("slow", slow), ("quick", quick)], X) == "quick"


def test_a_sparse_network_runs_its_program_unmeasured(monkeypatch):
    monkeypatch.setattr(runtime.recognizer, "fastest", None)
    model = network(sparsity=0.6)
    assert choice.density(model) == pytest.approx(0.4, abs=0.01)
    assert runtime.optimize(model, X).choice == {12: "fused"}


@pytest.mark.parametrize(("sparsity", "block", "names"), [
    (0.3, "1x1", choice.ENGINES), (0.6, "1x1", ("fused", "fused in 8x1")), (0.6, "4x1", ("fused", "fused in 8x1")),
    (0.8, "1x1", ("fused",)), (0.6, "8x1", ("fused",)), (0.6, "16x16", ("fused",))])
def test_what_can_be_the_fastest_is_measured(sparsity, block, names):
    assert choice.candidates(network("stgcn", sparsity, block)) == names


@pytest.mark.parametrize("channels", [16, 20])  # 20: the last block of 8 outputs is ragged
def test_wide_blocks_cover_what_was_kept(channels):
    model = network("ctrgcn", 0.6, "1x1", channels)
    before, after = (maskable_convs(m) for m in (model, choice.widened(model)))
    blocks = set()
    for name, conv in before.items():
        assert torch.equal(after[name].weight_oik(), conv.weight_oik())
        assert after[name].values.ne(0).flatten(1).any(1).all()  # no block that holds nothing
        blocks.add(after[name].pattern.block)
    assert (8, 1) in blocks
    assert all(conv.pattern.block == (1, 1) for conv in before.values())


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="engine to be one of fastest, fused"):
        runtime.optimize(network(), engine="tensorrt")


def test_a_network_that_is_watched_stays_in_torch():
    """A hook may change what comes out of a module, and a program would not call it."""
    model = network(sparsity=0.9).eval()
    model.backbone.gcn[1].register_forward_hook(lambda module, inputs, y: 0 * y)
    x = torch.randn(2, 2, 8, 25, 3)
    assert torch.equal(runtime.optimize(model)(x), model(x))


@pytest.mark.parametrize("name", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_batch_of_nothing(name, sparsity):
    model = network(name, sparsity).eval()
    empty = torch.zeros(0, 2, 8, 25, 3)
    assert model(empty).shape == runtime.optimize(model)(empty).shape == (0, 7)
