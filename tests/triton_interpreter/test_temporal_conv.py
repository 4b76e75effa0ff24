"""temporal_conv in Triton, run by its interpreter, against the reference in float64 with a bound from theory.

bfloat16 and tf32 are left to the compile-only suite: the interpreter multiplies bfloat16 by its bit patterns and does
not round to tf32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_conv_cases import AWKWARD, BRIEF, CASES, DTYPE, LAYOUTS, Case, check, make, zoo

from sparse_stgcn.kernels import BlockPattern
from sparse_stgcn.kernels.triton.temporal_conv import temporal_conv

EXTRA = [Case("(64, 64)", I=100, O=70, T=4, K=3, block=(64, 64), density=0.7), Case("600 vertices", V=600, T=2, I=2)]
ARITHMETIC = ["float32", "float16"]


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda c: c.name)
def test_matches_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, problem.run(temporal_conv, arithmetic), arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case, arithmetic: str) -> None:
    problem = make(replace(case, density=0.1), DTYPE[arithmetic], integers=True)
    want = problem.expected()
    want = want.clamp(min=0) if case.relu else want
    assert torch.equal(problem.run(temporal_conv, arithmetic), want.to(DTYPE[arithmetic]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [replace(case, N=2) for case in AWKWARD], ids=lambda c: c.name)
def test_strides_do_not_matter(case: Case, layout: str) -> None:
    problem = make(case, torch.float32)
    assert problem.residual is not None
    y = problem.run(temporal_conv, "float32", x=zoo(problem.x)[layout], residual=zoo(problem.residual)[layout])
    check(problem, y, "float32")


def test_nan_in_a_channel_that_no_block_reads() -> None:
    problem = make(CASES[0], torch.float32)
    live = problem.pattern.blocks()
    live[:, 1] = False
    problem.pattern = BlockPattern.from_blocks(live, problem.pattern.shape, problem.pattern.block)
    problem.values = problem.values[: problem.pattern.num_blocks]
    x = problem.x.clone()
    x[:, 1] = float("nan")
    check(problem, problem.run(temporal_conv, "float32", x=x), "float32")


def test_block_shapes_without_a_kernel_are_refused() -> None:
    problem = make(Case("block of four", block=(4, 1)), torch.float32)
    with pytest.raises(ValueError, match="8, 16, 32 or 64 output channels, not 4x1"):
        problem.run(temporal_conv, "float32")
