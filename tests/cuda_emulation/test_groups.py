"""Groups of 16 and 32 target channels that gather the union of what lower blocks read, executed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import test_graph_conv as graph
import test_temporal_conv_backward as backward
from fused_conv_cases import DTYPE, Case, check, make

from sparse_stgcn.kernels import cuda


@dataclass(frozen=True)
class Grouped:
    """forward, dx, dw: channels of a group of each product, for (float32, tf32, 16 bits)."""

    name: str
    block: tuple[int, int]
    density: float
    forward: tuple[int, int, int]
    dx: tuple[int, int, int]
    dw: tuple[int, int, int]
    I: int = 64
    O: int = 64
    stride: int = 1

    def rows(self, product: str, arithmetic: str) -> int:
        of = {"forward": self.forward, "input_gradient": self.dx, "weight_gradient": self.dw}[product]
        return of[ARITHMETIC.index(arithmetic)]


GROUPED = [
    Grouped("vectors at 0.5", (8, 1), 0.5, forward=(8, 32, 32), dx=(32, 32, 32), dw=(8, 16, 32)),
    Grouped("vectors at 0.05", (8, 1), 0.05, forward=(8, 8, 16), dx=(8, 32, 32), dw=(8, 8, 8)),
    Grouped("all of them", (8, 1), 1.0, forward=(32, 32, 32), dx=(32, 32, 32), dw=(8, 16, 32)),
    Grouped("single weights", (1, 1), 0.1, forward=(8, 32, 32), dx=(8, 32, 32), dw=(8, 16, 32)),
    # 43 inputs are three groups of 16, or two of 32
    Grouped("ragged", (3, 5), 0.6, forward=(32, 32, 32), dx=(16, 32, 32), dw=(8, 16, 32), I=43, O=50, stride=2),
    Grouped("as few channels as two blocks", (8, 1), 0.5, forward=(8, 16, 16), dx=(8, 8, 8), dw=(8, 16, 16), I=8, O=16),
]
ARITHMETIC = ("float32", "tf32", "bfloat16")


@pytest.fixture(autouse=True)
def _device(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_device", lambda index: emulated.Device(99 << 10, 100 << 10, 4))


def rows_of(
    emulated: ModuleType, op: str, arithmetic: str, product: str, g: Grouped, blocks: int, frames: int, *more: int
) -> int:
    launch = getattr(emulated, op)(
        arithmetic, 2, g.I, frames, 9, g.O, 3, *g.block, blocks, *more, emulated.Device(99 << 10, 100 << 10, 4), product
    )
    assert launch.reason is None
    return launch.tile["rows"]


@pytest.mark.parametrize("order", ["forward", "shuffled"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("grouped", GROUPED, ids=lambda g: g.name)
def test_temporal_conv(
    grouped: Grouped, arithmetic: str, order: str, emulated: ModuleType, thread_order: Callable[[str, int], None]
) -> None:
    case = Case(grouped.name, N=2, I=grouped.I, O=grouped.O, T=5, V=9, K=3, stride=grouped.stride, density=grouped.density,
                block=grouped.block, residual=True, relu=True)  # fmt: skip
    problem, dy = make(case, DTYPE[arithmetic]), backward.make_dy(case, DTYPE[arithmetic])
    for product in ("forward", "input_gradient", "weight_gradient"):
        made = rows_of(emulated, "TemporalConv", arithmetic, product, grouped, problem.pattern.num_blocks, 5, case.stride, 1)
        assert made == grouped.rows(product, arithmetic), product
    thread_order(order, 7)
    try:
        check(problem, problem.run(cuda.temporal_conv, arithmetic), arithmetic)
        backward.check(problem, dy, backward.run(problem, problem.x, dy, arithmetic), arithmetic)
    finally:
        thread_order("forward", 0)


@pytest.mark.parametrize("adjacency", ["shared", "channel"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("grouped", GROUPED, ids=lambda g: g.name)
def test_graph_conv(grouped: Grouped, arithmetic: str, adjacency: str, emulated: ModuleType) -> None:
    case = graph.Case(grouped.name, N=1, I=grouped.I, O=grouped.O, T=3, V=9, density=grouped.density, block=grouped.block,
                      adjacency=adjacency, epilogue=True)  # fmt: skip
    problem = graph.make(case, DTYPE[arithmetic])
    dims = 3 if adjacency == "shared" else 5
    made = rows_of(emulated, "GraphConv", arithmetic, "forward", grouped, problem.pattern.num_blocks, 3, dims)
    assert made == grouped.rows("forward", arithmetic)
    graph.check_forward(problem, problem.forward(arithmetic), arithmetic)
    graph.check_backward(problem, problem.backward(arithmetic), arithmetic)


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_groups_of_st_gcn(emulated: ModuleType, arithmetic: str, product: str) -> None:
    """128 channels at 50 frames: a dense weight takes the highest groups, a group is never lower than its block."""
    device = emulated.Device(227 << 10, 228 << 10, 132)
    most = {"float32": 8, "tf32": 16, "bfloat16": 32}[arithmetic] if product == "weight_gradient" else 32

    def rows(block: tuple[int, int], density: float) -> int:
        blocks = max(1, round(density * 128 * 128 * 9 / (block[0] * block[1])))
        sizes = (128, 128, 50, 25, 128, 9, *block, blocks, 1, 1)
        return emulated.TemporalConv(arithmetic, *sizes, device, product).tile["rows"]

    for block in ((1, 1), (8, 1), (16, 1), (16, 16), (32, 32), (64, 64)):
        side = block[1] if product == "input_gradient" else block[0]
        assert rows(block, 1.0) == max(most, min(side, 32))
        assert all(rows(block, density) >= min(side, 32) for density in (0.01, 0.05, 0.2, 0.4))
    if product != "input_gradient":
        assert rows((8, 1), 0.05) == 8
