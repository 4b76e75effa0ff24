from __future__ import annotations

import copy

import pytest
import torch

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import _native


def member(seed: int, sparsity: float = 0.8, name: str = "stgcn", **kwargs):
    torch.manual_seed(seed)
    model = sparse_stgcn.create_model(name, num_classes=7, base_channels=16, **kwargs)
    torch.nn.init.normal_(model.cls_head.fc_cls.weight)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    return sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, "8x1", seed=seed))


def keypoint(batch: int = 3, persons: int = 2):
    x = torch.randn(batch, persons, 20, 25, 3, generator=torch.Generator().manual_seed(1))
    x[0, 1] = 0
    return x


def expected(ensemble, x):
    with torch.inference_mode():
        doubles = [sparse_stgcn.densify(copy.deepcopy(m)).double().eval() for m in ensemble.members]
        return torch.stack([m(x.double()).softmax(1) for m in doubles]).mean(0)


def test_mean_of_probabilities():
    ensemble = sparse_stgcn.Ensemble([member(0), member(1, 0.95)]).eval()
    x = keypoint()
    with torch.inference_mode():
        p = ensemble(x)
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    torch.testing.assert_close(p.double(), expected(ensemble, x), atol=1e-5, rtol=0)


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
@pytest.mark.parametrize("names", [("stgcn", "stgcn", "stgcn"), ("stgcn", "aagcn"), ("aagcn",)])
def test_optimize_runs_the_members_as_one_call(names, monkeypatch):
    ensemble = sparse_stgcn.Ensemble([member(seed, 0.9 - 0.1 * seed, name) for seed, name in enumerate(names)])
    fast, x = runtime.optimize(ensemble), keypoint()
    assert isinstance(fast, runtime.FusedEnsemble)
    torch.testing.assert_close(fast(x).double(), expected(ensemble, x), atol=2e-6, rtol=0)
    calls = []
    monkeypatch.setattr(runtime.recognizer, "run", lambda networks, x, run=runtime.recognizer.run: calls.append(len(networks))
                        or run(networks, x))
    alone = torch.stack([m(x).softmax(1) for m in fast.members]).mean(0)
    calls.clear()
    assert torch.equal(fast(x), alone)
    assert calls == [len(names)]


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
@pytest.mark.parametrize("names", [("stgcn", "stgcn", "stgcn"), ("stgcn", "ctrgcn")])
@pytest.mark.parametrize(("batch", "persons"), [(1, 1), (1, 2), (3, 1), (5, 2)])
def test_threads_that_share_members_and_persons_change_no_bit(names, batch, persons):
    kinds = {"stgcn": {}, "ctrgcn": {"num_person": persons}}
    members = [member(seed, 0.8, name, **kinds[name]) for seed, name in enumerate(names)]
    fast = runtime.optimize(sparse_stgcn.Ensemble(members))
    x = torch.randn(batch, persons, 20, 25, 3, generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(fast(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[0], torch.cat([fast(sample[None]) for sample in x]))


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
def test_a_member_may_run_in_torch():
    ensemble = sparse_stgcn.Ensemble([member(0), member(1), member(2)])
    fast, x = runtime.optimize(ensemble), keypoint()
    fast.members[1].engine = "torch"
    torch.testing.assert_close(fast(x).double(), expected(ensemble, x), atol=2e-6, rtol=0)


def test_members_must_fit():
    with pytest.raises(ValueError, match="at least one model"):
        sparse_stgcn.Ensemble([])
    with pytest.raises(TypeError, match="Linear"):
        sparse_stgcn.Ensemble([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="number of joints. Got 17, 25"):
        sparse_stgcn.Ensemble([member(0), member(0, layout="coco")])
    with pytest.raises(ValueError, match="number of persons. Got 2, 3"):
        sparse_stgcn.Ensemble([member(0, name="aagcn"), member(0, name="aagcn", num_person=3)])
