"""The CUDA and Triton kernels on a real GPU: the cases of the emulated and interpreted suites, and a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from fused_conv_cases import ARITHMETIC, CASES, DTYPE, Case, check, make

pytestmark = pytest.mark.gpu
BACKENDS = {"cuda": "sparse_stgcn.kernels.cuda", "triton": "sparse_stgcn.kernels.triton.temporal_conv"}


@pytest.fixture(params=list(BACKENDS))
def op(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    return import_module(BACKENDS[request.param]).temporal_conv


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_temporal_conv(op: Callable[..., torch.Tensor], case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, problem.to("cuda").run(op, arithmetic).cpu(), arithmetic)


def test_two_runs_are_bit_equal(op: Callable[..., torch.Tensor]) -> None:
    problem = make(CASES[-1], torch.float32).to("cuda")
    assert torch.equal(problem.run(op, "float32"), problem.run(op, "float32"))


def test_it_can_be_captured_in_a_graph(op: Callable[..., torch.Tensor]) -> None:
    problem = make(CASES[1], torch.float32).to("cuda")
    want = problem.run(op, "float32")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = problem.run(op, "float32")
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)
