"""Fewer persons than threads: the threads share the steps of a person, and the bits stay the same."""
from __future__ import annotations

import pytest
import torch

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import _native

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


@pytest.mark.parametrize("name", ["stgcn", "aagcn"])
@pytest.mark.parametrize(("sparsity", "block"), [(0.0, "8x1"), (0.9, "8x1"), (0.9, "1x1"), (0.9, "16x16")])
@pytest.mark.parametrize("frames", [1, 23, 64])
def test_bit_equal_to_one_thread(name, sparsity, block, frames):
    torch.manual_seed(0)
    model = sparse_stgcn.create_model(name, num_classes=7, base_channels=16)
    if name == "aagcn":
        for key, parameter in model.named_parameters():
            if key.endswith("alpha"):
                parameter.data.fill_(0.3)
    if sparsity:
        model = sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, block))
    fused = runtime.optimize(model, engine="fused")
    x = torch.randn(2, 2, frames, 25, 3, generator=torch.Generator().manual_seed(1))
    x[0, 1] = 0
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((fused(x), fused(x[:1]), fused(x[:1, :1].expand(1, 2, -1, -1, -1))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0][:1], results[0][1])


def test_an_empty_batch_has_no_logits():
    fused = runtime.optimize(sparse_stgcn.create_model("stgcn", num_classes=7, base_channels=16), engine="fused")
    assert fused(torch.zeros(0, 2, 20, 25, 3)).shape == (0, 7)
