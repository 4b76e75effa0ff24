"""The public ops with their autograd on Triton's kernels, run by the interpreter on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import fused_conv_cases
import graph_conv_cases
import pytest
import torch
from gpu_checks import OPS, as_on_a_gpu, check_graph_conv, check_temporal_conv

from sparse_stgcn.kernels import BlockPattern, dispatch, temporal_conv

TEMPORAL = [replace(fused_conv_cases.named(n), N=1, V=9) for n in ("stride 2, T odd", "1x1", "(16, 16), ragged")]
KINDS = ("adjacency per sample", "adjacency per channel", "(1, 1)")
GRAPH = [replace(graph_conv_cases.named(n), N=2, T=2, V=9, K=2) for n in KINDS]


@pytest.fixture(autouse=True)
def _triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with as_on_a_gpu(monkeypatch, dispatch.Gpu(80, triton=None, cuda="not built")):
        yield


@pytest.mark.parametrize(("arithmetic", "lasso"), [("float32", True), ("float16", False)])
@pytest.mark.parametrize("case", TEMPORAL, ids=lambda c: c.name)
def test_temporal_conv(case: fused_conv_cases.Case, arithmetic: str, lasso: bool) -> None:
    check_temporal_conv(case, arithmetic, "cpu", "triton", lasso)


@pytest.mark.parametrize(("arithmetic", "lasso"), [("float32", True), ("float16", False)])
@pytest.mark.parametrize("case", GRAPH, ids=lambda c: c.name)
def test_graph_conv(case: graph_conv_cases.Case, arithmetic: str, lasso: bool) -> None:
    check_graph_conv(case, arithmetic, "cpu", "triton", lasso)


def test_it_is_triton_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_stgcn.kernels.triton import temporal_conv as kernels

    called = []
    monkeypatch.setattr(kernels, "temporal_conv", lambda *a, **k: called.append(1) or a[0].new_zeros(1, 8, 4, 5))
    pattern = BlockPattern.full((8, 4, 1))
    temporal_conv(torch.randn(1, 4, 4, 5), torch.randn(pattern.values_shape), pattern)
    assert called


def test_every_op_of_the_table_is_tested() -> None:
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_stgcn::{name}", "CUDA") for name in OPS)
