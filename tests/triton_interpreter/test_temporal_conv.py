"""temporal_conv in Triton, run by its interpreter, against the reference in float64 with a bound from theory.

bfloat16 and tf32 are left to the compile-only suite: the interpreter multiplies bfloat16 by its bit patterns and does
not round to tf32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from fused_conv_cases import AWKWARD, BRIEF, CASES, DTYPE, LAYOUTS, Case, check, make, padded_with_nan, zoo

from sparse_stgcn.kernels import BlockPattern
from sparse_stgcn.kernels.triton.launch import is_wide
from sparse_stgcn.kernels.triton.temporal_conv import temporal_conv

EXTRA = [
    Case("(64, 64)", I=100, O=70, T=4, K=3, block=(64, 64), density=0.7),
    Case("600 vertices", V=600, T=2, I=2),
    Case("(1, 1)", O=21, T=5, block=(1, 1), density=0.05, residual=True, relu=True),
    Case("(4, 1)", O=21, T=5, block=(4, 1)),
    Case("(4, 4), stride 2", I=11, O=21, T=5, stride=2, block=(4, 4)),
    Case("(3, 5)", I=11, O=14, T=5, block=(3, 5)),
]
ARITHMETIC = ["float32", "float16"]


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


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.name)
def test_wide_frames(case: Case, arithmetic: str, frames: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, problem.run(temporal_conv, arithmetic), arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", AWKWARD, ids=lambda c: c.name)
def test_wide_frames_with_nan_behind_each(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    x = padded_with_nan(problem.x)
    assert is_wide(x, clean=False)
    check(problem, problem.run(partial(temporal_conv, padded=True), arithmetic, x=x), arithmetic)


def test_float64_is_refused() -> None:
    problem = make(CASES[0], torch.float64)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, not float64"):
        problem.run(temporal_conv, "float32")
