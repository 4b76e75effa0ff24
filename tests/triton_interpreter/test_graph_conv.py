"""graph_conv in Triton, run by its interpreter, against the reference in float64 with a bound from theory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_conv_cases import LAYOUTS, padded_with_nan, zoo
from graph_conv_cases import CASES, Case, Problem, check, check_gradients, make, named
from torch import Tensor

from sparse_stgcn.kernels.triton.graph_conv import graph_conv
from sparse_stgcn.kernels.triton.graph_conv_adjacency import graph_conv_dadjacency
from sparse_stgcn.kernels.triton.graph_conv_backward import graph_conv_dw, graph_conv_dx

DTYPE = {"float32": torch.float32, "float16": torch.float16}
KINDS = [named(name) for name in ("plain", "adjacency per sample", "adjacency per channel")]
HALF = [*KINDS, named("(1, 1)"), named("(16, 16), ragged")]


def forward(problem: Problem, x: Tensor, residual: Tensor | None, padded: bool = False) -> Tensor:
    return graph_conv(
        x, problem.values, problem.adjacency, problem.bias, *problem.index, scale=problem.scale, shift=problem.shift,
        residual=residual, relu=problem.case.epilogue, padded=padded, tf32=False,
    )  # fmt: skip


def backward(problem: Problem, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    values, adjacency, index = problem.values, problem.adjacency, problem.index
    dw, dbias = graph_conv_dw(x, dy, values, adjacency, None, None, *index, tf32=False)
    return {
        "dx": graph_conv_dx(dy, values, adjacency, *index, tf32=False),
        "dw": dw,
        "dadjacency": graph_conv_dadjacency(x, dy, values, adjacency, problem.bias, *index, tf32=False),
        "dbias": dbias,
    }


@pytest.mark.parametrize(
    ("case", "arithmetic"),
    [(case, "float32") for case in CASES] + [(case, "float16") for case in HALF],
    ids=lambda c: getattr(c, "name", c),
)
def test_matches_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, forward(problem, problem.x, problem.residual), arithmetic)
    check_gradients(problem, backward(problem, problem.x, problem.dy), arithmetic)


@pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
@pytest.mark.parametrize("arithmetic", list(DTYPE))
def test_wide_frames_with_nan_behind_each(case: Case, arithmetic: str) -> None:
    problem = make(replace(case, N=1), DTYPE[arithmetic])
    x, dy = padded_with_nan(problem.x), padded_with_nan(problem.dy)
    check(problem, forward(problem, x, problem.residual, padded=True), arithmetic)
    check_gradients(problem, backward(problem, x, dy), arithmetic)


@pytest.mark.parametrize("case", KINDS, ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case, frames: str) -> None:
    problem = make(replace(case, N=1), torch.float32, integers=True)
    want = problem.expected()
    want = want.clamp(min=0) if case.epilogue else want
    assert torch.equal(forward(problem, problem.x, problem.residual), want.float())
    gradients = problem.gradients()
    for name, got in backward(problem, problem.x, problem.dy).items():
        assert torch.equal(got, gradients[name].float()), name


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", KINDS[1:], ids=lambda c: c.name)
def test_strides_do_not_matter(case: Case, layout: str) -> None:
    problem = make(replace(case, K=1, O=8), torch.float32)
    if layout == "expanded":
        problem.dy = problem.dy[:1, :, :1, :1].expand_as(problem.dy)
        x, dy, residual = problem.x, problem.dy, problem.residual
    else:
        x, dy, residual = (zoo(t)[layout] for t in (problem.x, problem.dy, problem.residual))
    check(problem, forward(problem, x, residual), "float32")
    check_gradients(problem, backward(problem, x, dy), "float32")


def test_dx_adds_a_residual_and_passes_a_relu_back() -> None:
    problem = make(CASES[0], torch.float32, integers=True)
    plain = graph_conv_dx(problem.dy, problem.values, problem.adjacency, *problem.index)
    residual = torch.arange(plain.numel()).remainder(7).view_as(plain).float()
    fused = graph_conv_dx(problem.dy, problem.values, problem.adjacency, *problem.index, residual=residual, gate=problem.x)
    assert torch.equal(fused, (plain + residual) * (problem.x > 0))


@pytest.mark.parametrize("case", [CASES[0], named("(4, 1)")], ids=lambda c: c.name)
def test_the_lasso_term_is_added_once_to_masked_blocks(case: Case) -> None:
    problem = make(case, torch.float32, integers=True)
    masked = torch.arange(problem.pattern.num_blocks) % 3 == 0
    arguments = (problem.x, problem.dy, problem.values, problem.adjacency)
    plain, _ = graph_conv_dw(*arguments, None, None, *problem.index)
    with_lasso, _ = graph_conv_dw(*arguments, masked, torch.tensor(0.5), *problem.index)
    assert torch.equal(with_lasso, plain + 0.5 * problem.values * masked[:, None, None])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("too wide", N=1, V=65), "up to 64 vertices, not 65"),
        (Case("too wide", N=1, V=33, adjacency="channel"), "up to 32 vertices with an adjacency per channel, not 33"),
    ],
    ids=["shared", "per channel"],
)
def test_more_vertices_than_a_tile_are_refused(case: Case, says: str) -> None:
    problem = make(case, torch.float32)
    for run in (lambda: forward(problem, problem.x, None), lambda: backward(problem, problem.x, problem.dy)):
        with pytest.raises(ValueError, match=says):
            run()
