"""The gradients of temporal_conv in Triton, run by its interpreter, against autograd of the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_conv_cases import AWKWARD, DTYPE, LAYOUTS, STORE_EPS, Case, Problem, make, named, zoo
from torch import Tensor

from sparse_stgcn.kernels import reference
from sparse_stgcn.kernels.triton.temporal_conv_backward import temporal_conv_dw, temporal_conv_dx

HALF = ("plain 9x1", "stride 2, T odd", "(16, 16), ragged")
# Fewer vertices than the forward's cases: the interpreter takes milliseconds for each product of two tiles.
CASES = [
    replace(named(name), V=v)
    for name, v in {
        "plain 9x1": 7, "a single value": 1, "several tiles": 17, "T odd, unaligned": 5, "T below the halo": 4,
        "stride 2, T odd": 7, "stride 3, dilation 2": 5, "1x1": 7, "ragged I and O": 7, "(16, 1)": 5, "(32, 1)": 3,
        "(16, 16), ragged": 7, "(32, 32), stride 2": 5, "no block": 3, "no sample": 25,
    }.items()
] + [
    Case("(64, 64)", I=100, O=70, T=4, V=5, K=3, block=(64, 64), density=0.7),
    Case("(1, 1)", O=21, T=5, V=7, block=(1, 1), density=0.05),
    Case("(4, 1), stride 2", O=21, T=5, V=7, stride=2, block=(4, 1)),
    Case("(4, 4)", I=11, O=21, T=5, V=7, block=(4, 4)),
    Case("(3, 5)", I=11, O=14, T=5, V=7, block=(3, 5)),
]


def gradients(problem: Problem, dy: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw and dbias in float64; or the sums of the sizes of all that they add up."""

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.double()
        return (tensor.abs() if absolute else tensor).detach().requires_grad_()

    x, values, bias = leaf(problem.x), leaf(problem.values), torch.zeros(problem.case.O).double().requires_grad_()
    y = reference.temporal_conv(x, values, problem.pattern, bias, problem.case.stride, problem.case.dilation)
    return torch.autograd.grad(y, (x, values, bias), dy.double().abs() if absolute else dy.double())


def make_dy(case: Case, dtype: torch.dtype, integers: bool = False) -> Tensor:
    random, shape = torch.Generator().manual_seed(3), (case.N, case.O, case.out_frames, case.V)
    if integers:
        return torch.randint(-2, 3, shape, generator=random).to(dtype)
    return torch.randn(shape, generator=random).to(dtype)


def run(problem: Problem, x: Tensor, dy: Tensor, masked: Tensor | None = None, scale: Tensor | None = None) -> list[Tensor]:
    case, p = problem.case, problem.pattern
    common = (p.shape, p.block, case.stride, case.dilation)
    index = (p.row_ptr, p.input, p.tap)
    dx = temporal_conv_dx(dy, problem.values, *index, *common, case.T)
    dw, dbias = temporal_conv_dw(x, dy, problem.values, masked, scale, *index, *common)
    return [dx, dw, dbias]


def check(problem: Problem, dy: Tensor, actual: list[Tensor], arithmetic: str) -> None:
    exact, sizes = gradients(problem, dy), gradients(problem, dy, absolute=True)
    for name, got, want, size in zip(("dx", "dw", "dbias"), actual, exact, sizes, strict=True):
        assert got.shape == want.shape, name
        bound = 8 * 2.0**-24 * size + STORE_EPS[arithmetic] * want.abs() + (2.0**-25 if arithmetic == "float16" else 1e-30)
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"{name}: largest error / bound {(error / bound).nan_to_num(9e9).max():.3g}"


@pytest.mark.parametrize(
    ("case", "arithmetic"),
    [(case, "float32") for case in CASES] + [(case, "float16") for case in CASES if case.name in HALF],
    ids=lambda c: getattr(c, "name", c),
)
def test_matches_autograd_of_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    dy = make_dy(case, DTYPE[arithmetic])
    check(problem, dy, run(problem, problem.x, dy), arithmetic)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [replace(case, N=2, V=7) for case in AWKWARD], ids=lambda c: c.name)
def test_strides_of_x_and_dy_do_not_matter(case: Case, layout: str) -> None:
    problem = make(case, torch.float32)
    dy = make_dy(case, torch.float32)
    if layout == "expanded":
        x, dy = problem.x, dy[:1, :, :1, :1].expand_as(dy)
    else:
        x, dy = zoo(problem.x)[layout], zoo(dy)[layout]
    check(problem, dy, run(problem, x, dy), "float32")


@pytest.mark.parametrize("case", CASES[:3:2], ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case) -> None:
    problem = make(case, torch.float32, integers=True)
    dy = make_dy(case, torch.float32, integers=True)
    for got, want in zip(run(problem, problem.x, dy), gradients(problem, dy), strict=True):
        assert torch.equal(got, want.float())


def test_the_lasso_term_is_added_once_to_masked_blocks() -> None:
    case = replace(CASES[0], N=2)
    problem = make(case, torch.float32, integers=True)
    dy = make_dy(case, torch.float32, integers=True)
    masked = torch.arange(problem.pattern.num_blocks) % 3 == 0
    _, plain, _ = run(problem, problem.x, dy)
    _, with_lasso, _ = run(problem, problem.x, dy, masked, torch.tensor(0.5))
    assert torch.equal(with_lasso, plain + 0.5 * problem.values * masked[:, None, None])


@pytest.mark.parametrize("case", [replace(case, V=7) for case in AWKWARD], ids=lambda c: c.name)
def test_wide_frames(case: Case, frames: str) -> None:
    problem = make(case, torch.float32, integers=True)
    dy = make_dy(case, torch.float32, integers=True)
    for got, want in zip(run(problem, problem.x, dy), gradients(problem, dy), strict=True):
        assert torch.equal(got, want.float())


def test_dx_adds_a_residual_and_passes_a_relu_back() -> None:
    case = replace(CASES[0], N=2)
    problem = make(case, torch.float32, integers=True)
    p, dy = problem.pattern, make_dy(case, torch.float32, integers=True)
    arguments = (dy, problem.values, p.row_ptr, p.input, p.tap, p.shape, p.block, case.stride, case.dilation, case.T)
    plain = temporal_conv_dx(*arguments)
    residual = torch.arange(plain.numel()).remainder(7).view_as(plain).float()
    assert torch.equal(temporal_conv_dx(*arguments, residual=residual, gate=problem.x), (plain + residual) * (problem.x > 0))
