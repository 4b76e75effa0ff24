"""What the tests of all ops share: patterns, awkward strides, and error bounds that come from theory."""
from __future__ import annotations

import torch
from torch import Tensor

from sparse_stgcn.kernels import BlockPattern

BLOCKS = [(1, 1), (4, 1), (8, 1), (16, 1), (4, 4), (16, 16), (3, 5)]


def random_pattern(shape: tuple[int, int, int], block: tuple[int, int], density: float, seed: int = 0) -> BlockPattern:
    """Unbalanced on purpose: empty rows, empty columns and full rows occur."""
    rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(rows, cols, shape[2], generator=generator) < density
    if rows > 1:
        live[0] = False
    if cols > 2:
        live[:, 1] = False
    live[-1, -1] = True
    return BlockPattern.from_blocks(live, shape, block)


def strided(x: Tensor, kind: str) -> Tensor:
    """The numbers of x (N, C, T, V) in other strides."""
    if kind == "contiguous":
        return x.contiguous()
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "slice":  # of a wider tensor, with an offset into its storage
        wide = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3, x.shape[3] + 4), float("nan"), dtype=x.dtype)
        part = wide[1:, 1:-1, 2:-1, 3:-1]
        return part.copy_(x)
    if kind == "transposed":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if kind == "every_second":
        wide = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), float("nan"), dtype=x.dtype)
        return wide[:, :, ::2].copy_(x)
    raise ValueError(kind)


STRIDES = ["contiguous", "channels_last", "slice", "transposed", "every_second"]


def assert_within(actual: Tensor, exact: Tensor, magnitude: Tensor, what: str, c: float = 8.0) -> None:
    """|actual - exact| <= c * eps * magnitude, where magnitude is the same op on absolute values, in float64."""
    assert actual.shape == exact.shape, f"{what}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    if not actual.numel():
        return
    bound = c * torch.finfo(actual.dtype).eps * magnitude.double() + torch.finfo(actual.dtype).tiny
    error = (actual.double() - exact.double()).abs()
    bad = ~(error <= bound)
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(f"{what}: {int(bad.sum())} of {bad.numel()} entries beyond the bound; first at {where}: "
                             f"got {actual[where].item()}, expected {exact[where].item()}, bound {bound[where].item():.3g}")


def assert_rounded_once(actual: Tensor, exact: Tensor, magnitude: Tensor, what: str) -> None:
    """A bfloat16 result of sums in float32: within their bound of the exact one, plus one rounding to 8 bits."""
    assert actual.dtype == torch.bfloat16 and actual.shape == exact.shape, what
    sums = 8 * torch.finfo(torch.float32).eps * magnitude
    bad = ~((actual.double() - exact).abs() <= sums + 2.0**-8 * (exact.abs() + sums))
    assert not bad.any(), f"{what}: {int(bad.sum())} of {bad.numel()} entries beyond the bound"


def integers(*shape: int, seed: int, low: int = -3, high: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: every sum of products is exact, so every path must be bit-equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
