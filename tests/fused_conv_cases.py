"""Cases of the fused temporal_conv that the GPU suites share: cuda_emulation and triton_interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from sparse_stgcn.kernels import BlockPattern, reference

DTYPE = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FACTOR_EPS = {"float32": 0.0, "tf32": 2.0**-10, "bfloat16": 0.0, "float16": 0.0}  # rounding of both factors
# Triton hands float32 to the matrix unit as it is, which reads 10 bits of the mantissa and leaves out the others: each factor
# is off by up to 2^-10, twice as much as after rounding.
TRUNCATED_EPS = FACTOR_EPS | {"tf32": 2.0**-9}
STORE_EPS = {"float32": 2.0**-24, "tf32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ARITHMETIC = list(DTYPE)


@dataclass(frozen=True)
class Case:
    name: str
    N: int = 1
    I: int = 8
    O: int = 16
    T: int = 10
    V: int = 25
    K: int = 9
    stride: int = 1
    dilation: int = 1
    density: float = 0.3
    block: tuple[int, int] = (8, 1)
    bias: bool = True
    scale: bool = False
    residual: bool = False
    relu: bool = False
    shared: int = 227 << 10  # bytes of shared memory that a block may take

    @property
    def out_frames(self) -> int:
        return -(-self.T // self.stride)


CASES = [
    Case("plain 9x1", N=2),
    Case("several tiles", T=23, density=0.2, residual=True, relu=True, shared=48 << 10),
    Case("one vertex", V=1, T=33, residual=True),
    Case("a single value", I=3, O=8, V=1, T=1, density=0.7),
    Case("17 vertices", V=17, T=12, scale=True, relu=True),
    Case("54 vertices", V=54, T=7, residual=True),
    Case("T odd, unaligned", N=2, I=5, O=8, T=7, residual=True),
    Case("T = 1", N=3, I=4, O=8, T=1, bias=False),
    Case("T below the halo", I=4, O=8, T=3, dilation=2, density=0.5),
    Case("stride 2", T=20, stride=2, relu=True),
    Case("stride 2, T odd", N=2, I=6, T=15, stride=2, residual=True, scale=True),
    Case("stride 2, K 1", T=12, K=1, stride=2, density=0.5, bias=False),
    Case("stride 3, dilation 2", I=4, O=8, T=17, K=5, stride=3, dilation=2, density=0.5),
    Case("dilation 3, K 3", O=8, T=12, K=3, dilation=3, density=0.4, residual=True, relu=True),
    Case("1x1", I=16, O=32, K=1),
    Case("chunks of channels", I=24, O=80, T=12, K=3, scale=True, residual=True, relu=True, shared=27 << 10),
    Case("ragged I and O", I=11, O=13, T=9, shared=30 << 10),
    Case("(16, 1)", O=40, block=(16, 1), relu=True),
    Case("(32, 1)", O=40, block=(32, 1), residual=True),
    Case("(16, 16)", I=32, O=32, K=3, block=(16, 16)),
    Case("(16, 16), ragged", I=21, O=37, K=3, block=(16, 16), density=0.5, residual=True),
    Case("(32, 32), stride 2", I=64, O=64, T=6, K=3, stride=2, block=(32, 32), density=0.5),
    Case("dense", I=3, O=8, T=6, density=1.0),
    Case("no block", I=4, T=6, density=0.0, scale=True, residual=True, relu=True),
    Case("one block", I=4, O=24, T=6, density=0.04),
    Case("no sample", N=0),
    Case("ST-GCN, 64 channels", I=64, O=64, T=20, density=0.05, residual=True, relu=True),
    Case("ST-GCN, 64 to 128", I=64, O=128, T=13, stride=2, density=0.05, shared=99 << 10),
]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


BRIEF = [c for c in CASES if c.name in ("several tiles", "stride 2, T odd", "chunks of channels", "(16, 16), ragged")]
AWKWARD = [named("several tiles"), named("stride 2, T odd")]  # with a residual; for the layouts of zoo()


@dataclass
class Problem:
    case: Case
    pattern: BlockPattern
    x: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    residual: torch.Tensor | None

    def run(self, op: Callable[..., torch.Tensor], arithmetic: str, **changes: torch.Tensor) -> torch.Tensor:
        given = {"x": self.x, "values": self.values, "residual": self.residual, **changes}
        return op(
            given["x"], given["values"], self.bias, self.pattern.row_ptr, self.pattern.input, self.pattern.tap,
            self.pattern.shape, self.pattern.block, self.case.stride, self.case.dilation,
            scale=self.scale, residual=given["residual"], relu=self.case.relu, tf32=arithmetic == "tf32",
        )  # fmt: skip

    def to(self, device: str) -> Problem:
        """The same problem on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return Problem(**{name: part.to(device) if hasattr(part, "to") else part for name, part in moved.items()})

    def expected(self, absolute: bool = False) -> torch.Tensor:
        """The result in float64 before the ReLU, or the sum of the sizes of all that was added up."""
        size = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        y = reference.temporal_conv(size(self.x), size(self.values), self.pattern, None, self.case.stride, self.case.dilation)
        if self.scale is not None:
            y = y * size(self.scale)[:, None, None]
        if self.bias is not None:
            y = y + size(self.bias)[:, None, None]
        return y if self.residual is None else y + size(self.residual)


def make(case: Case, dtype: torch.dtype, integers: bool = False) -> Problem:
    random = torch.Generator().manual_seed(sum(map(ord, case.name)))

    def draw(*shape: int) -> torch.Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=random).to(dtype)
        return torch.randn(shape, generator=random).to(dtype)

    (bo, bi), shape = case.block, (case.O, case.I, case.K)
    grid = (-(-case.O // bo), -(-case.I // bi), case.K)
    pattern = BlockPattern.from_blocks(torch.rand(grid, generator=random) < case.density, shape, case.block)
    assert (pattern.num_blocks > 0) == (case.density > 0), f"{case.name}: draw another pattern"
    return Problem(
        case,
        pattern,
        x=draw(case.N, case.I, case.T, case.V),
        values=pattern.gather(draw(*shape)),
        bias=draw(case.O) if case.bias else None,
        scale=draw(case.O) if case.scale else None,
        residual=draw(case.N, case.O, case.out_frames, case.V) if case.residual else None,
    )


def check(problem: Problem, y: torch.Tensor, arithmetic: str, backend: str = "cuda") -> None:
    want, size = problem.expected(), problem.expected(absolute=True)
    factor = (TRUNCATED_EPS if backend == "triton" else FACTOR_EPS)[arithmetic]
    bound = (factor + 8 * 2.0**-24) * size + STORE_EPS[arithmetic] * want.abs() + 1e-30
    if arithmetic == "float16":
        bound = bound + 2.0**-25  # half of its smallest number
    want = want.clamp(min=0) if problem.case.relu else want
    error = (y.double() - want).abs()
    assert y.shape == want.shape
    assert (error <= bound).all(), f"largest error / bound: {(error / bound).nan_to_num(float('inf')).max():.3g}"


LAYOUTS = ["slice of a wider tensor", "offset storage", "channels last", "samples second"]


def zoo(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in tensors of other strides and offsets; what surrounds them is NaN."""
    n, c, t, v = x.shape
    wide = x.new_full((n, c + 3, t + 2, v), float("nan"))
    wide[:, 2 : 2 + c, 1 : 1 + t] = x
    offset = x.new_full((x.numel() + 3,), float("nan"))
    offset[3:] = x.reshape(-1)
    return {
        "slice of a wider tensor": wide[:, 2 : 2 + c, 1 : 1 + t],
        "offset storage": offset[3:].view_as(x),
        "channels last": x.to(memory_format=torch.channels_last),
        "samples second": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


def padded_with_nan(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in frames that start at multiples of 16 bytes, with NaN behind each."""
    width = 16 // x.element_size()
    wide = x.new_full((*x.shape[:3], x.shape[3] + -x.shape[3] % width), float("nan"))
    return wide[..., : x.shape[3]].copy_(x)
