"""temporal_conv of csrc/cuda, executed on the CPU, against the reference in float64 with a bound from theory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from fused_conv_cases import ARITHMETIC, AWKWARD, BRIEF, CASES, DTYPE, LAYOUTS, Case, check, make, zoo

from sparse_stgcn.kernels import BlockPattern, cuda


COVERED = [  # blocks that no matrix unit has the shape of: groups of 8, or of 32, channels gather what covers them
    Case("(4, 1)", block=(4, 1), residual=True),
    Case("(4, 4), ragged", I=10, O=18, block=(4, 4)),
    Case("(1, 1)", I=5, O=11, T=8, block=(1, 1), relu=True),
    Case("(3, 5)", I=11, O=14, T=6, block=(3, 5)),
    Case("(64, 64)", I=100, O=70, T=4, K=3, block=(64, 64), density=0.7),
]


@pytest.fixture(autouse=True)
def _shared_memory(request: pytest.FixtureRequest, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with as much shared memory as the case says, and too few blocks so that slices are shared out."""
    case = request.getfixturevalue("case") if "case" in request.fixturenames else CASES[0]
    monkeypatch.setattr(cuda, "_device", lambda index: emulated.Device(case.shared, max(case.shared, 100 << 10), 8))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", CASES + COVERED, ids=lambda c: c.name)
def test_matches_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, problem.run(cuda.temporal_conv, arithmetic), arithmetic)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_the_order_of_threads_does_not_matter(
    case: Case, arithmetic: str, order: str, thread_order: Callable[[str, int], None]
) -> None:
    problem = make(case, DTYPE[arithmetic])
    thread_order("forward", 0)
    plain = problem.run(cuda.temporal_conv, arithmetic)
    thread_order(order, 5)
    try:
        assert torch.equal(problem.run(cuda.temporal_conv, arithmetic), plain)
    finally:
        thread_order("forward", 0)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case, arithmetic: str) -> None:
    problem = make(replace(case, density=0.1), DTYPE[arithmetic], integers=True)
    want = problem.expected()
    want = want.clamp(min=0) if case.relu else want
    assert torch.equal(problem.run(cuda.temporal_conv, arithmetic), want.to(DTYPE[arithmetic]))


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [replace(case, N=2) for case in AWKWARD], ids=lambda c: c.name)
def test_strides_do_not_matter(case: Case, layout: str, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    assert problem.residual is not None
    y = problem.run(cuda.temporal_conv, arithmetic, x=zoo(problem.x)[layout], residual=zoo(problem.residual)[layout])
    check(problem, y, arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_nan_in_a_channel_that_no_block_reads(arithmetic: str) -> None:
    problem = make(CASES[0], DTYPE[arithmetic])
    live = problem.pattern.blocks()
    live[:, 1] = False
    problem.pattern = BlockPattern.from_blocks(live, problem.pattern.shape, problem.pattern.block)
    problem.values = problem.values[: problem.pattern.num_blocks]
    x = problem.x.clone()
    x[:, 1] = float("nan")
    check(problem, problem.run(cuda.temporal_conv, arithmetic, x=x), arithmetic)


def test_launches_of_one_shape_are_cut_once() -> None:
    problem = make(CASES[0], torch.float32)
    first = problem.run(cuda.temporal_conv, "float32")
    before = cuda._launch.cache_info().misses
    assert torch.equal(problem.run(cuda.temporal_conv, "float32"), first)
    assert cuda._launch.cache_info().misses == before


def test_sizes_that_do_not_fit_are_refused() -> None:
    problem = make(Case("too wide", V=600, T=1), torch.float32)
    with pytest.raises(ValueError, match="more vertices than a block has pixels"):
        problem.run(cuda.temporal_conv, "float32")
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, not float64"):
        make(CASES[0], torch.float64).run(cuda.temporal_conv, "float32")
