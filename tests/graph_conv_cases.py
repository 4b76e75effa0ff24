"""Cases of graph_conv with every kind of adjacency and a fused epilogue, and what is right about each, for the GPU suites."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from fused_conv_cases import STORE_EPS
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern, reference


@dataclass(frozen=True)
class Case:
    name: str
    N: int = 2
    I: int = 8
    O: int = 16
    T: int = 3
    V: int = 25
    K: int = 3
    density: float = 0.3
    block: tuple[int, int] = (8, 1)
    adjacency: str = "shared"  # or "sample" or "channel"
    bias: bool = True
    epilogue: bool = False


CASES = [
    Case("plain"),
    Case("adjacency per sample", adjacency="sample", epilogue=True),
    Case("adjacency per channel", adjacency="channel", epilogue=True),
    Case("per channel, several frames, ragged", N=1, I=11, O=13, T=17, V=9, K=2, adjacency="channel"),
    Case("one vertex, one frame", V=1, T=1),
    Case("17 vertices", V=17, T=5, epilogue=True),
    Case("54 vertices", N=1, V=54),
    Case("32 vertices, per channel", N=1, I=4, O=8, V=32, K=1, adjacency="channel"),
    Case("one subset", K=1, bias=False),
    Case("three input channels", I=3, T=5, density=0.5),
    Case("ragged I and O", I=11, O=13, T=5, epilogue=True),
    Case("(16, 1)", O=40, block=(16, 1)),
    Case("(32, 1)", O=40, block=(32, 1), adjacency="sample"),
    Case("(16, 16), ragged", I=21, O=37, block=(16, 16), density=0.5),
    Case("(32, 32)", I=40, O=40, T=2, block=(32, 32), density=0.7, adjacency="sample"),
    Case("(64, 64), ragged", N=1, I=70, O=66, T=2, K=1, block=(64, 64), density=0.9),
    Case("(64, 64), per channel", N=1, I=8, O=64, T=2, V=9, K=1, block=(64, 64), density=1.0, adjacency="channel"),
    Case("(1, 1)", O=13, block=(1, 1), density=0.05),
    Case("(1, 1), per channel", N=1, O=13, block=(1, 1), density=0.1, adjacency="channel"),
    Case("(4, 1)", O=12, block=(4, 1), adjacency="sample", epilogue=True),
    Case("(4, 4), ragged", I=11, O=14, block=(4, 4)),
    Case("(3, 5)", I=11, O=14, block=(3, 5)),
    Case("no block", density=0.0, epilogue=True),
    Case("no block, no bias", density=0.0, bias=False, adjacency="sample"),
    Case("no sample", N=0),
    Case("ST-GCN, 64 channels", N=1, I=64, O=64, T=5, density=0.05),
]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


GRADIENTS = ("dx", "dw", "dadjacency", "dbias")


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
    dy: Tensor

    @property
    def index(self) -> tuple:
        p = self.pattern
        return p.row_ptr, p.input, p.tap, p.shape, p.block

    def to(self, device: str) -> Problem:
        """The same problem on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return Problem(**{name: part.to(device) if hasattr(part, "to") else part for name, part in moved.items()})

    def expected(self, absolute: bool = False) -> Tensor:
        """The result in float64 before the ReLU, or the sum of the sizes of all that was added up."""
        size = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        bias = None if self.bias is None else size(self.bias)
        y = reference.graph_conv(size(self.x), size(self.values), self.pattern, size(self.adjacency), bias)
        if self.scale is None or self.shift is None or self.residual is None:
            return y
        return y * size(self.scale)[:, None, None] + size(self.shift)[:, None, None] + size(self.residual)

    def gradients(self, absolute: bool = False) -> dict[str, Tensor]:
        """dx, dw, dadjacency and dbias in float64, without the epilogue; or the sums of the sizes of all they add up."""

        def leaf(tensor: Tensor) -> Tensor:
            tensor = tensor.double()
            return (tensor.abs() if absolute else tensor).detach().requires_grad_()

        bias = torch.zeros(self.case.K, self.case.O) if self.bias is None else self.bias
        leaves = [leaf(tensor) for tensor in (self.x, self.values, self.adjacency, bias)]
        y = reference.graph_conv(*leaves[:2], self.pattern, *leaves[2:])
        dy = self.dy.double()
        return dict(zip(GRADIENTS, torch.autograd.grad(y, leaves, dy.abs() if absolute else dy), strict=True))


def make(case: Case, dtype: torch.dtype, integers: bool = False) -> Problem:
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=random).to(dtype)
        return torch.randn(shape, generator=random).to(dtype)

    (bo, bi), shape = case.block, (case.O, case.I, case.K)
    grid = (-(-case.O // bo), -(-case.I // bi), case.K)
    pattern = BlockPattern.from_blocks(torch.rand(grid, generator=random) < case.density, shape, case.block)
    assert (pattern.num_blocks > 0) == (case.density > 0), f"{case.name}: draw another pattern"
    outer = {"shared": (), "sample": (case.N, case.K), "channel": (case.N, case.K, case.O)}[case.adjacency] or (case.K,)
    return Problem(
        case,
        pattern,
        x=draw(case.N, case.I, case.T, case.V),
        values=pattern.gather(draw(*shape)),
        adjacency=draw(*outer, case.V, case.V).transpose(-1, -2),
        bias=draw(case.K, case.O) if case.bias else None,
        scale=draw(case.O) if case.epilogue else None,
        shift=draw(case.O) if case.epilogue else None,
        residual=draw(case.N, case.O, case.T, case.V) if case.epilogue else None,
        dy=draw(case.N, case.O, case.T, case.V),
    )


def within(got: Tensor, want: Tensor, size: Tensor, arithmetic: str, what: str, factor: float = 0.0) -> None:
    """Float32 sums, rounded once; `factor`: how far rounding all factors moves a product (tf32)."""
    assert got.shape == want.shape, what
    bound = (factor + 8 * 2.0**-24) * size + STORE_EPS[arithmetic] * want.abs()
    bound = bound + (2.0**-25 if arithmetic == "float16" else 1e-30)
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{what}: largest error / bound {(error / bound).nan_to_num(9e9).max():.3g}"


def check(problem: Problem, y: Tensor, arithmetic: str) -> None:
    """y of the forward pass with the case's epilogue; problem and y on the CPU."""
    want, size = problem.expected(), problem.expected(absolute=True)
    bound_of = want.clamp(min=0) if problem.case.epilogue else want
    within(y, bound_of, size, arithmetic, "y", 2.0**-9 if arithmetic == "tf32" else 0.0)


def check_gradients(problem: Problem, got: dict[str, Tensor], arithmetic: str) -> None:
    want, size = problem.gradients(), problem.gradients(absolute=True)
    for name, tensor in got.items():
        within(tensor, want[name], size[name], arithmetic, name, 2.0**-9 if arithmetic == "tf32" else 0.0)
