"""Every product of every kernel, in every tile of the tables, has as many terms as the oldest Triton in use asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fused_conv_cases as temporal
import graph_conv_cases as graph
import pytest
import torch
from fused_conv_cases import DTYPE
from triton.runtime.interpreter import InterpreterBuilder

from sparse_stgcn.kernels.triton import configs
from sparse_stgcn.kernels.triton.graph_conv import graph_conv
from sparse_stgcn.kernels.triton.graph_conv_adjacency import graph_conv_dadjacency
from sparse_stgcn.kernels.triton.graph_conv_backward import graph_conv_dw, graph_conv_dx
from sparse_stgcn.kernels.triton.temporal_conv import temporal_conv
from sparse_stgcn.kernels.triton.temporal_conv_backward import temporal_conv_dw, temporal_conv_dx

ARITHMETIC = ("float32", "tf32", "float16")  # the tables have one column for both kinds of half


@pytest.fixture
def depths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """K of every tl.dot that the interpreter runs."""
    found: list[int] = []
    multiply: Callable[..., Any] = InterpreterBuilder.create_dot

    def noted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        assert a.data.shape[-1] == b.data.shape[-2]
        found.append(a.data.shape[-1])
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", noted)
    return found


def take(depths: list[int], what: str) -> None:
    assert depths, f"{what}: no product"
    assert min(depths) >= configs.DEPTH, f"{what}: a product of {min(depths)} terms"
    depths.clear()


def sizes(block: tuple[int, int]) -> dict[str, Any]:
    """One block, one sample, one frame, one tap or subset: as little as makes a kernel multiply."""
    return {"N": 1, "I": block[1], "O": block[0], "T": 1, "K": 1, "density": 1.0, "block": block}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("rows", configs.ROWS)
def test_temporal_conv(rows: int, arithmetic: str, depths: list[int]) -> None:
    tf32 = arithmetic == "tf32"
    for block in {(rows, 8), (8, rows)}:  # the tile follows the rows of a block, in dx its columns
        problem = temporal.make(temporal.Case("depth", V=2, **sizes(block)), DTYPE[arithmetic])
        p = problem.pattern
        x, values, index = problem.x, problem.values, (p.row_ptr, p.input, p.tap, p.shape, p.block, 1, 1)
        dy = torch.ones(problem.expected().shape, dtype=x.dtype)
        temporal_conv(x, values, None, *index, tf32=tf32)
        take(depths, "forward")
        temporal_conv_dx(dy, values, *index, 1, tf32=tf32)
        take(depths, "dx")
        temporal_conv_dw(x, dy, values, None, None, *index, tf32=tf32)
        take(depths, "dw")


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("joints", "adjacency", "rows"), [
    *[(joints, "shared", rows) for joints in (2, 33) for rows in configs.ROWS],
    *[(2, "channel", rows) for rows in (8, 16)],  # one tile for all
])  # fmt: skip
def test_graph_conv(joints: int, adjacency: str, rows: int, arithmetic: str, depths: list[int]) -> None:
    tf32 = arithmetic == "tf32"
    for block in {(rows, 8), (8, rows)}:
        problem = graph.make(graph.Case("depth", V=joints, adjacency=adjacency, **sizes(block)), DTYPE[arithmetic])
        x, dy, values, a, index = problem.x, problem.dy, problem.values, problem.adjacency, problem.index
        graph_conv(x, values, a, None, *index, tf32=tf32)
        take(depths, "forward")
        graph_conv_dx(dy, values, a, *index, tf32=tf32)
        take(depths, "dx")
        graph_conv_dw(x, dy, values, a, None, None, *index, tf32=tf32)
        take(depths, "dw")
        graph_conv_dadjacency(x, dy, values, a, None, *index, tf32=tf32)
        take(depths, "dadjacency")
