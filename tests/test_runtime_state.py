"""What an optimized network keeps from call to call, and what it does with numbers that are none."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.backbones import BACKBONES
from sparse_stgcn.kernels import BlockPattern, _native, temporal_conv

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
X = torch.randn(2, 2, 12, 25, 3, generator=torch.Generator().manual_seed(1))


def network(name: str = "stgcn", sparsity: float = 0.8, seed: int = 0) -> sparse_stgcn.Recognizer:
    torch.manual_seed(seed)
    model = sparse_stgcn.create_model(name, num_classes=7, base_channels=16)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
    return sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity)).eval()


def fused(model: torch.nn.Module) -> torch.nn.Module:
    return runtime.optimize(model, engine="fused")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("name", BACKBONES)
def test_joints_that_are_no_numbers_are_no_answer(name: str, value: float) -> None:
    """1e38 is a number; sums that it enters may be none, and are none in both."""
    model, x = network(name), X.clone()
    x[1, 0, 5, 3] = value
    y = fused(model)(x)
    wanted = model(x)
    assert value == 1e38 or not wanted[1].isfinite().any()
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.allclose(y[0], wanted[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_that_are_no_numbers_are_no_answer(name: str) -> None:
    norms = [key for key, module in network(name).named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for key in (norms[0], norms[len(norms) // 2], norms[-1], "backbone.data_bn"):
        model = network(name)
        model.get_submodule(key).running_mean[2] = float("nan")
        if not model(X).isnan().all():
            continue  # a channel that no live block reads
        assert fused(model)(X).isnan().all(), key


@pytest.mark.parametrize("name", BACKBONES)
def test_what_lay_in_memory_before_is_not_read(name: str) -> None:
    fast = fused(network(name))
    wanted = fast(X)
    pattern = BlockPattern.full((8, 256, 9), (8, 1))
    noise = torch.full((8, 256, 64, 25), float("nan"))
    temporal_conv(noise, pattern.gather(torch.ones(8, 256, 9)), pattern)  # fills the threads' panels, where arenas lie
    assert torch.equal(fast(X), wanted)


def test_new_weights_are_packed_anew() -> None:
    first, second = network(seed=0), network(seed=1)
    fast = fused(first)
    before = fast(X)
    fast.model.load_state_dict(first.state_dict())  # a part of it does not know that it is one
    fast.load_state_dict(fused(second).state_dict(), strict=True)
    assert torch.equal(fast(X), fused(second)(X))
    assert not torch.allclose(before, fast(X))
    with pytest.raises(TypeError, match="Expected the network to be float32. Got torch.float16"):
        fast.half()(X)
    assert torch.allclose(fast.float()(X), fused(second)(X), atol=1e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deepcopy", "pickle"])
def test_copies_after_the_first_call(copied) -> None:
    single, ensemble = fused(network()), fused(sparse_stgcn.Ensemble([network(), network(sparsity=0.5)]))
    in_torch, measured = runtime.optimize(network(sparsity=0.1), engine="torch"), runtime.optimize(network(sparsity=0.1))
    for fast in (single, ensemble, in_torch, measured):
        wanted = fast(X)
        other = copied(fast)
        del fast
        assert torch.equal(other(X), wanted)


def test_programs_of_many_clip_lengths_are_not_kept_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(runtime.recognizer, "KEPT", 2)
    fast = fused(network())
    wanted = {frames: fast(X[:, :, :frames]) for frames in (4, 6, 8, 10)}
    assert list(fast._programs) == [8, 10]
    for frames, logits in wanted.items():
        assert torch.equal(fast(X[:, :, :frames]), logits)
    dense = runtime.optimize(network(sparsity=0.1), engine="torch")
    for frames in (4, 6, 8):
        dense(X[:, :, :frames])
    assert list(dense._dense) == ["torch"]


def test_values_of_another_mask_are_refused() -> None:
    first, second = network(seed=0), network(seed=0)

    def masked(seed: int) -> torch.nn.Module:
        model = sparse_stgcn.create_model("stgcn", num_classes=7, base_channels=16)
        return sparse_stgcn.compact(sparse_stgcn.sparsify(model, 0.8, seed=seed))

    second.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="Expected backbone.gcn.0.gcn.conv.values of the pattern that this network has"):
        masked(1).load_state_dict(masked(0).state_dict())
    plain: dict[str, Tensor] = dict(masked(0).state_dict())  # without what lies beside it, as safetensors gives it
    masked(1).load_state_dict(plain)
    assert set(masked(0).state_dict()) == {key for key, _ in (*masked(0).named_parameters(), *masked(0).named_buffers())}


def test_what_cannot_be_built_again_is_not_saved(tmp_path) -> None:
    model = network()
    with pytest.raises(TypeError, match="Got FusedRecognizer; save the network that optimize made it from"):
        sparse_stgcn.save(fused(model), tmp_path / "fast.safetensors")
    with pytest.raises(ValueError, match="Got a Recognizer without one"):
        sparse_stgcn.save(sparse_stgcn.Recognizer(model.backbone, 7), tmp_path / "bare.safetensors")
    assert not list(tmp_path.iterdir())
