"""What only a real GPU can show, and the bodies of those tests on a CPU, so that they are right when a card comes.

    pytest -m gpu

Without a card the tests marked `gpu` are skipped with the reason. Bounds against float64 come from theory (gpu_checks.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module

import fused_conv_cases
import graph_conv_cases
import pytest
import torch
from fused_conv_cases import ARITHMETIC, CASES, DTYPE, Case, check, make
from gpu_checks import (
    GRAPH_EPS,
    check_compiled,
    check_graph_conv,
    check_group_lasso,
    check_strides,
    check_temporal_conv,
    check_training_step,
    within,
)
from kernel_cases import BLOCKS, STRIDES
from test_temporal_conv import CASES as CPU_CASES

from sparse_stgcn.backbones import BACKBONES
from sparse_stgcn.kernels import BlockPattern, backends, graph_conv, temporal_conv

gpu = pytest.mark.gpu
KERNELS = {"cuda": "sparse_stgcn.kernels.cuda", "triton": "sparse_stgcn.kernels.triton.temporal_conv"}
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public ops run on this backend."""
    if not backends()[request.param].startswith("available"):
        pytest.skip(backends()[request.param])
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", request.param)
    return request.param


@pytest.fixture
def op(backend: str) -> Callable[..., torch.Tensor]:
    return import_module(KERNELS[backend]).temporal_conv


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision("highest")


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fused_epilogues(op: Callable[..., torch.Tensor], case: Case, arithmetic: str, backend: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, problem.to("cuda").run(op, arithmetic).cpu(), arithmetic, backend)


def test_bounds_allow_the_tf32_of_each_backend() -> None:
    """The number that loses most when the last 13 bits of its mantissa are left out; rounded, it would lose next to nothing."""
    problem = make(Case("worst", I=1, O=8, T=1, V=1, K=1, density=1.0, bias=False), torch.float32)
    worst, truncated = 1 + 2**-10 - 2**-23, torch.ones(1, 8, 1, 1)
    problem.x.fill_(worst)
    problem.values.fill_(worst)
    check(problem, truncated, "tf32", "triton")
    through_graph = truncated.double() * worst**3
    within(truncated, through_graph, through_graph, "tf32", "triton", "y", GRAPH_EPS)
    for refused in (lambda: check(problem, truncated, "tf32", "cuda"),
                    lambda: within(truncated, through_graph, through_graph, "tf32", "cuda", "y", GRAPH_EPS)):  # fmt: skip
        with pytest.raises(AssertionError, match="largest error / bound"):
            refused()


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_temporal_conv(backend: str, case: Case, arithmetic: str) -> None:
    check_temporal_conv(case, arithmetic, "cuda", backend, lasso=case.N > 1)


@gpu
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", CPU_CASES)
def test_temporal_conv_on_the_cases_of_the_cpu(backend: str, name: str, block: tuple[int, int]) -> None:
    (O, I, K), T, V, stride, dilation = CPU_CASES[name]
    case = Case(name, N=2, I=I, O=O, T=T, V=V, K=K, stride=stride, dilation=dilation, block=block)
    check_temporal_conv(case, "float32", "cuda", backend)


@gpu
@pytest.mark.parametrize("case", graph_conv_cases.CASES, ids=lambda c: c.name)
def test_graph_conv(backend: str, case: graph_conv_cases.Case, arithmetic: str) -> None:
    check_graph_conv(case, arithmetic, "cuda", backend, lasso=case.epilogue)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", STRIDES)
def test_strides_of_x_and_dy(kind: str, device: str) -> None:
    check_strides(kind, device)


@pytest.mark.parametrize("device", DEVICES)
def test_group_lasso(device: str) -> None:
    check_group_lasso(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [(8, 1), (16, 16), (1, 1)], ids=str)
@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_training_step_is_that_of_the_cpu_in_float64(name: str, block: tuple[int, int], device: str) -> None:
    check_training_step(name, block, device, torch.float32)


@gpu
@pytest.mark.parametrize("name", list(BACKBONES))
def test_float64_falls_back_and_is_exact(name: str) -> None:
    check_training_step(name, (8, 1), "cuda", torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(device: str) -> None:
    check_compiled(device, "aot_eager" if device == "cpu" else "inductor")


@gpu
def test_two_runs_are_bit_equal(backend: str) -> None:
    runs = [_step(torch.float32) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_can_be_captured_in_a_graph(backend: str, dtype: torch.dtype) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # patterns are planned, kernels compiled
        for _ in range(3):
            want = _step(dtype)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _step(dtype)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    assert all(map(torch.equal, got, want))


@gpu
def test_the_current_stream_is_used(backend: str) -> None:
    """On a stream that waits, nothing may run ahead of what it waits for."""
    pattern = BlockPattern.full((32, 32, 9)).to("cuda")
    values = torch.randn(pattern.values_shape, device="cuda")
    x = torch.zeros(8, 32, 100, 25, device="cuda")
    temporal_conv(x, values, pattern)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.fill_(1.0)
        y = temporal_conv(x, values, pattern)
    side.synchronize()
    assert torch.equal(y, temporal_conv(torch.ones_like(x), values, pattern))


@gpu
def test_offsets_beyond_2_31_elements(backend: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    pattern = BlockPattern.full((8, 8, 1)).to("cuda")
    values = torch.randn(pattern.values_shape, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(1_100_000, 8, 10, 25, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[:-2].zero_()
    x[-2:].normal_()
    y = temporal_conv(x, values, pattern)
    assert torch.equal(y[-2:], temporal_conv(x[-2:].clone(), values, pattern))
    assert not y[:-2].any()


@gpu
def test_every_device_of_the_machine(backend: str) -> None:
    for index in range(torch.cuda.device_count()):
        check_temporal_conv(fused_conv_cases.named("plain 9x1"), "float32", f"cuda:{index}", backend)


def _step(dtype: torch.dtype) -> list[torch.Tensor]:
    """y and all gradients of both ops, on fixed inputs that live as long as the process."""
    if dtype not in _inputs:
        random = torch.Generator().manual_seed(0)
        pattern = BlockPattern.from_blocks(torch.rand(8, 64, 9, generator=random) < 0.1, (64, 64, 9), (8, 1)).to("cuda")
        subsets = BlockPattern.from_blocks(torch.rand(8, 64, 3, generator=random) < 0.3, (64, 64, 3), (8, 1)).to("cuda")
        draw = lambda *shape: torch.randn(shape, generator=random).to("cuda", dtype).requires_grad_()
        _inputs[dtype] = (pattern, subsets, draw(4, 64, 20, 25), draw(*pattern.values_shape), draw(*subsets.values_shape),
                          draw(3, 25, 25), draw(3, 64))  # fmt: skip
    pattern, subsets, x, w, u, a, b = _inputs[dtype]
    y = graph_conv(temporal_conv(x, w, pattern), u, subsets, a, b)
    return [y.detach(), *torch.autograd.grad(y, (x, w, u, a, b), torch.ones_like(y))]


_inputs: dict[torch.dtype, tuple] = {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(("target", "least"), [("tests/test_gpu.py", 400), ("bench/bench_gpu.py", 54)])
def test_without_a_card_they_are_collected_and_skipped_with_a_reason(target: str, least: int) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", target]
    command += ["--benchmark-only"] if target.startswith("bench") else []
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # not a worker
    with warnings.catch_warnings():
        done = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    count = int(done.stdout.rsplit(" skipped", 1)[0].rsplit(None, 1)[-1])
    assert count >= least
    assert "GPU" in done.stdout or "without CUDA" in done.stdout
