"""graph_conv in Triton, run by its interpreter, against the reference in float64 with a bound from theory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fused_conv_cases import LAYOUTS, STORE_EPS, zoo
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, reference
from sparse_stgcn.kernels.triton.graph_conv import graph_conv

DTYPE = {"float32": torch.float32, "float16": torch.float16}


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
    per_sample: bool = False
    bias: bool = True
    epilogue: bool = False


CASES = [
    Case("plain"),
    Case("adjacency per sample", per_sample=True, epilogue=True),
    Case("one vertex, one frame", V=1, T=1),
    Case("17 vertices", V=17, T=9, epilogue=True),
    Case("54 vertices", N=1, V=54, T=3),
    Case("one subset", K=1, bias=False),
    Case("three input channels", I=3, T=5, density=0.5),
    Case("ragged I and O", I=11, O=13, T=5, epilogue=True),
    Case("(16, 1)", O=40, block=(16, 1)),
    Case("(16, 16), ragged", I=21, O=37, T=4, block=(16, 16), density=0.5),
    Case("(32, 32)", I=40, O=40, T=2, block=(32, 32), density=0.7, per_sample=True),
    Case("no block", density=0.0, epilogue=True),
    Case("no block, no bias", density=0.0, bias=False),
    Case("no sample", N=0),
    Case("ST-GCN, 64 channels", N=1, I=64, O=64, T=5, density=0.05),
]


@dataclass
class Problem:
    case: Case
    pattern: BlockPattern
    x: Tensor
    values: Tensor
    adjacency: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        p = self.pattern
        return graph_conv(
            x, self.values, self.adjacency, self.bias, p.row_ptr, p.input, p.tap, p.shape, p.block,
            scale=self.scale, shift=self.shift, residual=residual, relu=self.case.epilogue, tf32=False,
        )  # fmt: skip

    def expected(self, absolute: bool = False) -> Tensor:
        """The result in float64 before the ReLU, or the sum of the sizes of all that was added up."""
        size = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        bias = None if self.bias is None else size(self.bias)
        y = reference.graph_conv(size(self.x), size(self.values), self.pattern, size(self.adjacency), bias)
        if self.scale is None or self.shift is None or self.residual is None:
            return y
        return y * size(self.scale)[:, None, None] + size(self.shift)[:, None, None] + size(self.residual)


def make(case: Case, dtype: torch.dtype, integers: bool = False) -> Problem:
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=random).to(dtype)
        return torch.randn(shape, generator=random).to(dtype)

    (bo, bi), shape = case.block, (case.O, case.I, case.K)
    grid = (-(-case.O // bo), -(-case.I // bi), case.K)
    pattern = BlockPattern.from_blocks(torch.rand(grid, generator=random) < case.density, shape, case.block)
    graph = (case.N, case.K, case.V, case.V) if case.per_sample else (case.K, case.V, case.V)
    return Problem(
        case,
        pattern,
        x=draw(case.N, case.I, case.T, case.V),
        values=pattern.gather(draw(*shape)),
        adjacency=draw(*graph).transpose(-1, -2),
        bias=draw(case.K, case.O) if case.bias else None,
        scale=draw(case.O) if case.epilogue else None,
        shift=draw(case.O) if case.epilogue else None,
        residual=draw(case.N, case.O, case.T, case.V) if case.epilogue else None,
    )


def check(problem: Problem, y: Tensor, arithmetic: str) -> None:
    want, size = problem.expected(), problem.expected(absolute=True)
    bound = 8 * 2.0**-24 * size + STORE_EPS[arithmetic] * want.abs() + (2.0**-25 if arithmetic == "float16" else 1e-30)
    want = want.clamp(min=0) if problem.case.epilogue else want
    error = (y.double() - want).abs()
    assert y.shape == want.shape
    assert (error <= bound).all(), f"largest error / bound: {(error / bound).nan_to_num(9e9).max():.3g}"


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.mark.parametrize("arithmetic", list(DTYPE))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_reference(case: Case, arithmetic: str) -> None:
    problem = make(case, DTYPE[arithmetic])
    check(problem, problem.run(problem.x, problem.residual), arithmetic)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda c: c.name)
def test_small_integers_are_exact(case: Case) -> None:
    problem = make(case, torch.float32, integers=True)
    want = problem.expected()
    want = want.clamp(min=0) if case.epilogue else want
    assert torch.equal(problem.run(problem.x, problem.residual), want.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    problem = make(CASES[1], torch.float32)
    assert problem.residual is not None
    check(problem, problem.run(zoo(problem.x)[layout], zoo(problem.residual)[layout]), "float32")


def test_sizes_without_a_kernel_are_refused() -> None:
    problem = make(Case("too wide", N=1, V=65), torch.float32)
    with pytest.raises(ValueError, match="up to 64 vertices, not 65"):
        problem.run(problem.x, None)
    problem = make(Case("too many rows", N=1, block=(64, 64)), torch.float32)
    with pytest.raises(ValueError, match="up to 32 output channels, not 64x64"):
        problem.run(problem.x, None)
    problem = make(Case("per channel"), torch.float32)
    problem.adjacency = problem.adjacency[None, :, None].expand(2, 3, 16, 25, 25)
    with pytest.raises(ValueError, match="not one per channel"):
        problem.run(problem.x, None)
