"""The gradients of temporal_conv of csrc/cuda, executed on the CPU, against autograd of the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from fused_conv_cases import ARITHMETIC, AWKWARD, CASES, DTYPE, FACTOR_EPS, LAYOUTS, STORE_EPS, Case, Problem, make, named, zoo
from test_temporal_conv import COVERED
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, cuda, reference

SHARES = Case("shares of several tiles", N=2, T=22, shared=20 << 10)
BRIEF = [SHARES] + [named(name) for name in ("stride 2, T odd", "(16, 16), ragged")]


@pytest.fixture(autouse=True)
def _shared_memory(request: pytest.FixtureRequest, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with as much shared memory as the case says, so few multiprocessors that a share has several tiles."""
    case = request.getfixturevalue("case") if "case" in request.fixturenames else CASES[0]
    monkeypatch.setattr(cuda, "_device", lambda index: emulated.Device(case.shared, max(case.shared, 100 << 10), 1))


def make_dy(case: Case, dtype: torch.dtype, integers: bool = False) -> Tensor:
    random, shape = torch.Generator().manual_seed(3), (case.N, case.O, case.out_frames, case.V)
    if integers:
        return torch.randint(-2, 3, shape, generator=random).to(dtype)
    return torch.randn(shape, generator=random).to(dtype)


def gradients(problem: Problem, dy: Tensor, absolute: bool = False) -> list[Tensor]:
    """dx, dw and dbias in float64; or the sums of the sizes of all that they add up."""

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.double()
        return (tensor.abs() if absolute else tensor).detach().requires_grad_()

    x, values, bias = leaf(problem.x), leaf(problem.values), torch.zeros(problem.case.O).double().requires_grad_()
    y = reference.temporal_conv(x, values, problem.pattern, bias, problem.case.stride, problem.case.dilation)
    return list(torch.autograd.grad(y, (x, values, bias), dy.double().abs() if absolute else dy.double()))


def run(
    problem: Problem, x: Tensor, dy: Tensor, arithmetic: str, masked: Tensor | None = None, scale: Tensor | None = None
) -> list[Tensor]:
    case, p, tf32 = problem.case, problem.pattern, arithmetic == "tf32"
    common = (p.shape, p.block, case.stride, case.dilation)
    dx = cuda.temporal_conv_input_gradient(dy, problem.values, p.t_ptr, p.t_perm, p.t_row, p.tap, *common, case.T, tf32=tf32)
    dw, dbias = cuda.temporal_conv_weight_gradient(
        x, dy, problem.values, masked, scale, p.row_ptr, p.input, p.tap, *common, tf32=tf32
    )
    return [dx, dw, dbias]


def check(problem: Problem, dy: Tensor, actual: list[Tensor], arithmetic: str) -> None:
    exact, sizes = gradients(problem, dy), gradients(problem, dy, absolute=True)
    for name, got, want, size in zip(("dx", "dw", "dbias"), actual, exact, sizes, strict=True):
        assert got.shape == want.shape, name
        bound = (FACTOR_EPS[arithmetic] + 8 * 2.0**-24) * size + STORE_EPS[arithmetic] * want.abs()
        bound = bound + (2.0**-25 if arithmetic == "float16" else 1e-30)
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"{name}: largest error / bound {(error / bound).nan_to_num(9e9).max():.3g}"


@pytest.mark.parametrize(
    ("case", "arithmetic"),
    # float16 is bfloat16's source with another conversion: every third case
    [(case, a) for i, case in enumerate([*CASES, *COVERED, SHARES]) for a in ARITHMETIC if a != "float16" or i % 3 == 0],
    ids=lambda c: getattr(c, "name", c),
)
def test_matches_autograd_of_the_reference(case: Case, arithmetic: str) -> None:
    problem, dy = make(case, DTYPE[arithmetic]), make_dy(case, DTYPE[arithmetic])
    check(problem, dy, run(problem, problem.x, dy, arithmetic), arithmetic)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC[:3])
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_the_order_of_threads_does_not_matter(
    case: Case, arithmetic: str, order: str, thread_order: Callable[[str, int], None]
) -> None:
    problem, dy = make(case, DTYPE[arithmetic]), make_dy(case, DTYPE[arithmetic])
    plain = run(problem, problem.x, dy, arithmetic)
    thread_order(order, 5)
    try:
        assert all(map(torch.equal, run(problem, problem.x, dy, arithmetic), plain))
    finally:
        thread_order("forward", 0)


@pytest.mark.parametrize("arithmetic", ARITHMETIC[:3])
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case, arithmetic: str) -> None:
    case = replace(case, density=0.1)
    problem, dy = make(case, DTYPE[arithmetic], integers=True), make_dy(case, DTYPE[arithmetic], integers=True)
    for got, want in zip(run(problem, problem.x, dy, arithmetic), gradients(problem, dy), strict=True):
        assert torch.equal(got, want.to(DTYPE[arithmetic]))


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", [replace(case, N=2) for case in AWKWARD], ids=lambda c: c.name)
def test_strides_of_x_and_dy_do_not_matter(case: Case, layout: str, arithmetic: str) -> None:
    problem, dy = make(case, DTYPE[arithmetic]), make_dy(case, DTYPE[arithmetic])
    if layout == "expanded":
        x, dy = problem.x, dy[:1, :, :1, :1].expand_as(dy)
    else:
        x, dy = zoo(problem.x)[layout], zoo(dy)[layout]
    check(problem, dy, run(problem, x, dy, arithmetic), arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_nan_stays_where_it_is(arithmetic: str) -> None:
    """A NaN in a channel of x reaches weights that read it; one in dy the groups of up to 32 inputs that its weights reach."""
    problem = make(replace(named("several tiles"), I=64, shared=227 << 10), DTYPE[arithmetic])
    live = problem.pattern.blocks()
    live[1, :32] = False
    problem.pattern = BlockPattern.from_blocks(live, problem.pattern.shape, problem.pattern.block)
    problem.values = problem.values[: problem.pattern.num_blocks]
    x, dy = problem.x.clone(), make_dy(problem.case, DTYPE[arithmetic])
    x[:, 3], dy[:, 8:] = float("nan"), float("nan")
    dx, dw, _ = run(problem, x, dy, arithmetic)
    touched = (problem.pattern.input == 3) | (problem.pattern.rows == 1)
    assert torch.equal(dw.isnan(), touched[:, None, None].expand_as(dw))
    assert not dx[:, :32].isnan().any()
    assert dx[:, 32:].isnan().any()


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_the_lasso_term_is_added_once_to_masked_blocks(arithmetic: str) -> None:
    case = replace(CASES[0], density=0.1)
    problem, dy = make(case, DTYPE[arithmetic], integers=True), make_dy(case, DTYPE[arithmetic], integers=True)
    masked = torch.arange(problem.pattern.num_blocks) % 3 == 0
    _, plain, _ = run(problem, problem.x, dy, arithmetic)
    _, with_lasso, _ = run(problem, problem.x, dy, arithmetic, masked, torch.tensor(0.5))
    want = plain.double() + 0.5 * problem.values.double() * masked[:, None, None]
    assert torch.equal(with_lasso, want.to(DTYPE[arithmetic]))
    empty = make(replace(case, name="no sample", N=0), DTYPE[arithmetic])
    masked = torch.ones(empty.pattern.num_blocks, dtype=torch.bool)
    _, alone, _ = run(empty, empty.x, make_dy(empty.case, DTYPE[arithmetic]), arithmetic, masked, torch.tensor(0.5))
    assert torch.equal(alone, 0.5 * empty.values)
