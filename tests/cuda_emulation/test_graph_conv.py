"""graph_conv of csrc/cuda and its gradients, executed on the CPU, against the reference and its autograd in float64."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from fused_conv_cases import ARITHMETIC, DTYPE, LAYOUTS, STORE_EPS, zoo
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, cuda, reference

# Two products, one after the other: both factors of both are rounded in TF32; in 16 bits what lies between them is.
FACTOR_EPS = {"float32": 0.0, "tf32": 2 * 2.0**-10, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Case:
    name: str
    N: int = 2
    I: int = 8
    O: int = 16
    T: int = 6
    V: int = 25
    K: int = 3
    density: float = 0.3
    block: tuple[int, int] = (8, 1)
    adjacency: str = "shared"
    bias: bool = True
    epilogue: bool = False
    shared: int = 227 << 10  # bytes of shared memory that a block may take


CASES = [
    Case("plain"),
    Case("per sample", adjacency="sample", epilogue=True),
    Case("per channel", adjacency="channel", epilogue=True),
    Case("a share of several samples", N=5, I=4, O=8, T=2, V=9, K=2, density=0.7, adjacency="sample"),
    Case("few of many rows", N=1, O=40, T=5, density=0.08),
    Case("per channel, ragged", I=5, O=11, T=5, V=17, adjacency="channel", block=(4, 4), density=0.5),
    Case("one vertex, one frame", V=1, T=1),
    Case("17 vertices", V=17, T=9, epilogue=True),
    Case("54 vertices", N=1, V=54, T=3),
    Case("one subset", K=1, bias=False),
    Case("chunks of channels", N=1, I=24, O=80, T=7, epilogue=True, shared=40 << 10),
    Case("ragged I and O", I=11, O=13, T=5, epilogue=True),
    Case("(16, 1)", N=1, O=40, block=(16, 1)),
    Case("(1, 1)", N=1, I=6, O=9, T=5, block=(1, 1)),
    Case("(16, 16), ragged", N=1, I=21, O=37, T=4, block=(16, 16), density=0.5),
    Case("(64, 64), per sample", N=1, I=70, O=66, T=2, block=(64, 64), density=0.7, adjacency="sample"),
    Case("no block", density=0.0, epilogue=True),
    Case("no block, no bias", density=0.0, bias=False),
    Case("no sample", N=0),
    Case("ST-GCN, 64 channels", N=1, I=64, O=64, T=5, density=0.05, shared=99 << 10),
]
WITH_BIAS = ("plain", "a share of several samples", "54 vertices", "chunks of channels", "(64, 64), per sample", "no block")
BRIEF = [case for case in CASES if case.name in ("per sample", "per channel, ragged", "chunks of channels")]


@dataclass
class Problem:
    case: Case
    pattern: BlockPattern
    x: Tensor
    values: Tensor
    adjacency: Tensor
    dy: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None

    def forward(self, arithmetic: str, **changes: Tensor) -> Tensor:
        p, given = self.pattern, {"x": self.x, "residual": self.residual, "adjacency": self.adjacency, **changes}
        return cuda.graph_conv(
            given["x"], self.values, given["adjacency"], self.bias, p.row_ptr, p.input, p.tap, p.shape, p.block,
            scale=self.scale, shift=self.shift, residual=given["residual"], relu=self.case.epilogue, tf32=arithmetic == "tf32",
        )  # fmt: skip

    def backward(
        self, arithmetic: str, masked: Tensor | None = None, scale: Tensor | None = None, **changes: Tensor
    ) -> list[Tensor]:
        p, given = self.pattern, {"x": self.x, "dy": self.dy, "adjacency": self.adjacency, **changes}
        dx, da = cuda.graph_conv_input_gradient(
            given["x"], given["dy"], self.values, given["adjacency"], p.row_ptr, p.input, p.tap, p.t_ptr, p.t_perm, p.t_row,
            p.shape, p.block, tf32=arithmetic == "tf32",
        )  # fmt: skip
        dw, _ = cuda.graph_conv_weight_gradient(
            given["x"], given["dy"], self.values, given["adjacency"], masked, scale, p.row_ptr, p.input, p.tap,
            p.shape, p.block, tf32=arithmetic == "tf32",
        )  # fmt: skip
        assert dx is not None
        assert da is not None
        return [dx, da, dw]

    def expected(self, absolute: bool = False) -> Tensor:
        """The result in float64 before the ReLU, or the sum of the sizes of all that was added up."""
        size = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        bias = None if self.bias is None else size(self.bias)
        y = reference.graph_conv(size(self.x), size(self.values), self.pattern, size(self.adjacency), bias)
        if self.scale is None or self.shift is None or self.residual is None:
            return y
        return y * size(self.scale)[:, None, None] + size(self.shift)[:, None, None] + size(self.residual)

    def gradients(self, absolute: bool = False) -> list[Tensor]:
        size = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        leaves = [size(t).detach().requires_grad_() for t in (self.x, self.adjacency, self.values)]
        y = reference.graph_conv(leaves[0], leaves[2], self.pattern, leaves[1])
        return list(torch.autograd.grad(y, leaves, size(self.dy)))


def make(case: Case, dtype: torch.dtype, integers: bool = False) -> Problem:
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-1, 2, shape, generator=random).to(dtype)
        return torch.randn(shape, generator=random).to(dtype)

    (bo, bi), shape = case.block, (case.O, case.I, case.K)
    grid = (-(-case.O // bo), -(-case.I // bi), case.K)
    pattern = BlockPattern.from_blocks(torch.rand(grid, generator=random) < case.density, shape, case.block)
    assert (pattern.num_blocks > 0) == (case.density > 0), f"{case.name}: draw another pattern"
    outer = {"shared": (case.K,), "sample": (case.N, case.K), "channel": (case.N, case.K, case.O)}[case.adjacency]
    return Problem(
        case,
        pattern,
        x=draw(case.N, case.I, case.T, case.V),
        values=pattern.gather(draw(*shape)),
        adjacency=draw(*outer, case.V, case.V).transpose(-1, -2),
        dy=draw(case.N, case.O, case.T, case.V),
        bias=draw(case.K, case.O) if case.bias else None,
        scale=draw(case.O) if case.epilogue else None,
        shift=draw(case.O) if case.epilogue else None,
        residual=draw(case.N, case.O, case.T, case.V) if case.epilogue else None,
    )


def compare(name: str, got: Tensor, want: Tensor, size: Tensor, arithmetic: str, relu: bool = False) -> None:
    bound = (FACTOR_EPS[arithmetic] + 8 * 2.0**-24) * size + STORE_EPS[arithmetic] * want.abs()
    # in float16 what lies between may be below its normal numbers
    bound = bound + (2.0**-20 if arithmetic == "float16" else 1e-30)
    want = want.clamp(min=0) if relu else want
    error = (got.double() - want).abs()
    assert got.shape == want.shape, name
    assert (error <= bound).all(), f"{name}: largest error / bound {(error / bound).nan_to_num(9e9).max():.3g}"


def check_forward(problem: Problem, y: Tensor, arithmetic: str) -> None:
    compare("y", y, problem.expected(), problem.expected(absolute=True), arithmetic, problem.case.epilogue)


def check_backward(problem: Problem, actual: list[Tensor], arithmetic: str) -> None:
    exact, sizes = problem.gradients(), problem.gradients(absolute=True)
    for name, got, want, size in zip(("dx", "dadjacency", "dw"), actual, exact, sizes, strict=True):
        compare(name, got, want, size, arithmetic)


@pytest.fixture(autouse=True)
def _shared_memory(request: pytest.FixtureRequest, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = request.getfixturevalue("case") if "case" in request.fixturenames else CASES[0]
    monkeypatch.setattr(cuda, "_device", lambda index: emulated.Device(case.shared, max(case.shared, 100 << 10), 1))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check_forward(problem, problem.forward(arithmetic), arithmetic)


@pytest.mark.parametrize(
    ("case", "arithmetic"),
    # float16 is bfloat16's source with another conversion: every third case
    [(case, a) for i, case in enumerate(CASES) for a in ARITHMETIC if a != "float16" or i % 3 == 0],
    ids=lambda c: getattr(c, "name", c),
)
def test_gradients_match_autograd_of_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check_backward(problem, problem.backward(arithmetic), arithmetic)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC[:3])
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_the_order_of_threads_does_not_matter(
    case: Case, arithmetic: str, order: str, thread_order: Callable[[str, int], None]
) -> None:
    problem = make(case, DTYPE[arithmetic])
    plain = [problem.forward(arithmetic), *problem.backward(arithmetic)]
    thread_order(order, 5)
    try:
        assert all(map(torch.equal, [problem.forward(arithmetic), *problem.backward(arithmetic)], plain))
    finally:
        thread_order("forward", 0)


@pytest.mark.parametrize("arithmetic", ARITHMETIC[:3])
@pytest.mark.parametrize("case", BRIEF, ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case, arithmetic: str) -> None:
    problem = make(replace(case, density=0.1), DTYPE[arithmetic], integers=True)
    want = problem.expected()
    want = want.clamp(min=0) if case.epilogue else want
    assert torch.equal(problem.forward(arithmetic), want.to(DTYPE[arithmetic]))
    for got, exact in zip(problem.backward(arithmetic), problem.gradients(), strict=True):
        assert torch.equal(got, exact.to(DTYPE[arithmetic]))


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BRIEF[:2], ids=lambda c: c.name)
def test_strides_do_not_matter(case: Case, layout: str, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    x, dy, adjacency = zoo(problem.x)[layout], zoo(problem.dy)[layout], problem.adjacency.contiguous()
    residual = {} if problem.residual is None else {"residual": zoo(problem.residual)[layout]}
    check_forward(problem, problem.forward(arithmetic, x=x, adjacency=adjacency, **residual), arithmetic)
    check_backward(problem, problem.backward(arithmetic, x=x, dy=dy, adjacency=adjacency), arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_nan_in_a_channel_that_no_block_reads(arithmetic: str) -> None:
    problem = make(CASES[0], DTYPE[arithmetic])
    live = problem.pattern.blocks()
    live[:, 1] = False
    problem.pattern = BlockPattern.from_blocks(live, problem.pattern.shape, problem.pattern.block)
    problem.values = problem.values[: problem.pattern.num_blocks]
    x = problem.x.clone()
    x[:, 1] = float("nan")
    check_forward(problem, problem.forward(arithmetic, x=x), arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_nan_in_a_frame_stays_there(arithmetic: str) -> None:
    problem = make(Case("a NaN", bias=False), DTYPE[arithmetic])
    x = problem.x.clone()
    x[:, :, 3] = float("nan")
    y = problem.forward(arithmetic, x=x)
    sound = [0, 1, 2, 4, 5]
    assert torch.equal(y[:, :, sound], problem.forward(arithmetic)[:, :, sound])


@pytest.mark.parametrize("adjacency", ["shared", "channel"])
def test_the_lasso_term_is_added_once_to_masked_blocks(adjacency: str) -> None:
    problem = make(Case("lasso", density=0.1, adjacency=adjacency), torch.float32, integers=True)
    masked = torch.arange(problem.pattern.num_blocks) % 3 == 0
    plain, with_lasso = problem.backward("float32")[2], problem.backward("float32", masked, torch.tensor(0.5))[2]
    assert torch.equal(with_lasso, plain + 0.5 * problem.values * masked[:, None, None])


@pytest.mark.parametrize("case", [c for c in CASES if c.name in WITH_BIAS], ids=lambda c: c.name)
def test_the_bias_is_a_map_whose_gradient_is_given(case: Case) -> None:
    problem = make(case, torch.float32)
    bias, adjacency = problem.bias.requires_grad_(), problem.adjacency
    y = reference.graph_conv(problem.x, problem.values, problem.pattern, adjacency, bias)
    (want,) = torch.autograd.grad(y, bias, problem.dy)
    p = problem.pattern
    _, dmap = cuda.graph_conv_weight_gradient(
        problem.x, problem.dy, problem.values, adjacency, None, None, p.row_ptr, p.input, p.tap, p.shape, p.block, tf32=False
    )
    (got,) = torch.autograd.grad(cuda.bias_map(adjacency, bias), bias, dmap)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("adjacency", ["shared", "channel"])
def test_every_launch_is_on_the_stream_that_is_given(adjacency: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strays = ctypes.CDLL(os.environ["SPARSE_STGCN_EMULATED"]).emulate_strays
    problem = make(Case("on a stream", N=1, O=8, T=2, V=5, adjacency=adjacency), torch.float32)
    problem.forward("float32")
    strays(ctypes.c_void_p(0))
    monkeypatch.setattr(cuda, "_stream", lambda x: 0x5EED)
    problem.forward("float32")
    problem.backward("float32")
    assert strays(ctypes.c_void_p(0x5EED)) == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    problem = make(Case("too wide", N=1, I=3, V=65, T=1), torch.float32)
    problem.forward("float32")
    with pytest.raises(ValueError, match="up to 64 vertices"):
        problem.backward("float32")
