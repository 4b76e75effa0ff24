"""The public ops with their autograd on the CUDA kernels, executed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import fused_conv_cases
import graph_conv_cases
import pytest
import torch
from fused_conv_cases import ARITHMETIC
from gpu_checks import as_on_a_gpu, check_graph_conv, check_temporal_conv

from sparse_stgcn.kernels import cuda, dispatch

TEMPORAL = [fused_conv_cases.named(n) for n in ("stride 2, T odd", "1x1", "(16, 16), ragged")]
KINDS = ("adjacency per sample", "adjacency per channel", "(1, 1)")
GRAPH = [replace(graph_conv_cases.named(n), T=2, V=9, K=2) for n in KINDS]


@pytest.fixture(autouse=True)
def _cuda_alone(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "_device", lambda index: emulated.Device(227 << 10, 228 << 10, 3))
    with as_on_a_gpu(monkeypatch, dispatch.Gpu(80, triton="not installed", cuda=None)):
        yield


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ARITHMETIC, indirect=True)
@pytest.mark.parametrize("case", TEMPORAL, ids=lambda c: c.name)
def test_temporal_conv(case: fused_conv_cases.Case, precision: str) -> None:
    check_temporal_conv(case, precision, "cpu", "cuda", lasso=True)


@pytest.mark.parametrize("precision", ARITHMETIC, indirect=True)
@pytest.mark.parametrize("case", GRAPH, ids=lambda c: c.name)
def test_graph_conv(case: graph_conv_cases.Case, precision: str) -> None:
    check_graph_conv(case, precision, "cpu", "cuda", lasso=True)
