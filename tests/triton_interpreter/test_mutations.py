"""Kernels broken on purpose: every one of them must fail the comparison that its line names.

A mutant is one line of a kernel's file with one thing wrong. Small problems suffice; the unbroken kernels pass the same
comparisons first, so that a mutant fails for its own fault. No mutant stores out of bounds.

One for each comparison runs by default; SPARSE_STGCN_MUTANTS=all runs the whole list.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fused_conv_cases as temporal
import graph_conv_cases as graph
import pytest
import torch
from fused_conv_cases import padded_with_nan

from sparse_stgcn.kernels.triton import (
    graph_conv,
    graph_conv_adjacency,
    graph_conv_backward,
    launch,
    plan,
    temporal_conv,
    temporal_conv_backward,
)

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (graph_conv, graph_conv_adjacency, graph_conv_backward, launch, plan, temporal_conv, temporal_conv_backward)
}
Check = Callable[[dict[str, ModuleType]], None]


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    line: str
    broken: str
    caught_by: str
    says: str  # what the failed comparison names


def _equal(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.double(), want.double()), f"{name}: differs"


@cache
def _temporal(**changes) -> tuple[temporal.Problem, torch.Tensor, list[torch.Tensor]]:
    """A problem of small integers, its dy, and the exact dx and dw."""
    case = replace(temporal.Case("mutants", N=2, I=9, O=13, T=7, V=5, K=3, residual=True, relu=True), **changes)
    problem = temporal.make(case, torch.float32, integers=True)
    dy = torch.randint(-2, 3, (case.N, case.O, case.out_frames, case.V), generator=torch.Generator().manual_seed(1)).float()
    x, values = (t.double().requires_grad_() for t in (problem.x, problem.values))
    y = temporal.reference.temporal_conv(x, values, problem.pattern, None, case.stride, case.dilation)
    return problem, dy, list(torch.autograd.grad(y, (x, values), dy.double()))


def _index(problem: temporal.Problem) -> tuple:
    p = problem.pattern
    return p.row_ptr, p.input, p.tap, p.shape, p.block, problem.case.stride, problem.case.dilation


def check_temporal_forward(modules: dict[str, ModuleType], **changes) -> None:
    problem, _, _ = _temporal(**changes)
    _equal("y", problem.run(modules["temporal_conv"].temporal_conv, "float32"), problem.expected().clamp(min=0))


def check_temporal_forward_strided(modules: dict[str, ModuleType]) -> None:
    check_temporal_forward(modules, stride=2)


def check_temporal_forward_wide(modules: dict[str, ModuleType]) -> None:
    problem, _, _ = _temporal()
    y = problem.run(modules["temporal_conv"].temporal_conv, "float32", x=padded_with_nan(problem.x))
    _equal("y", y, problem.expected().clamp(min=0))


def check_temporal_gradients(modules: dict[str, ModuleType], **changes) -> None:
    problem, dy, (dx, dw) = _temporal(stride=2, **changes)
    module = modules["temporal_conv_backward"]
    _equal("dx", module.temporal_conv_dx(dy, problem.values, *_index(problem), problem.case.T), dx)
    masked = torch.arange(problem.pattern.num_blocks) % 2 == 0
    got, dbias = module.temporal_conv_dw(problem.x, dy, problem.values, masked, torch.tensor(2.0), *_index(problem))
    _equal("dw", got, dw + 2.0 * problem.values * masked[:, None, None])
    _equal("dbias", dbias, dy.sum((0, 2, 3)))


def check_temporal_gradients_of_a_cover(modules: dict[str, ModuleType]) -> None:
    check_temporal_gradients(modules, block=(1, 1), density=0.1)


def check_temporal_gradients_of_packed_frames(modules: dict[str, ModuleType]) -> None:
    problem, dy, (_, dw) = _temporal(stride=1)
    modules = SimpleNamespace(**modules)
    x, dy = modules.launch.pad_frames(problem.x), modules.launch.pad_frames(dy)
    _equal("packed x", x, problem.x)
    beyond = torch.as_strided(x, (*x.shape[:3], 8), x.stride())[..., x.shape[3] :]
    assert not beyond.any(), "packed x: not zero behind a frame"
    _equal("dw", modules.temporal_conv_backward.temporal_conv_dw(x, dy, problem.values, None, None, *_index(problem))[0], dw)


@cache
def _graph(**changes) -> tuple[graph.Problem, dict[str, torch.Tensor]]:
    case = replace(graph.Case("mutants", I=9, O=13, V=5, T=7, K=2), **changes)
    problem = graph.make(case, torch.float32, integers=True)
    return problem, problem.gradients()


def check_graph_forward(modules: dict[str, ModuleType], wide: bool = False, **changes) -> None:
    problem, _ = _graph(**changes)
    x = padded_with_nan(problem.x) if wide else problem.x
    y = modules["graph_conv"].graph_conv(x, problem.values, problem.adjacency, problem.bias, *problem.index)
    _equal("y", y, problem.expected())


def check_graph_forward_wide(modules: dict[str, ModuleType]) -> None:
    check_graph_forward(modules, wide=True)


def check_graph_forward_per_sample(modules: dict[str, ModuleType]) -> None:
    check_graph_forward(modules, adjacency="sample")


def check_graph_forward_per_channel(modules: dict[str, ModuleType]) -> None:
    check_graph_forward(modules, adjacency="channel")


def check_graph_gradients(modules: dict[str, ModuleType], **changes) -> None:
    problem, want = _graph(**changes)
    backward, values, adjacency = modules["graph_conv_backward"], problem.values, problem.adjacency
    _equal("dx", backward.graph_conv_dx(problem.dy, values, adjacency, *problem.index), want["dx"])
    dw, dbias = backward.graph_conv_dw(problem.x, problem.dy, values, adjacency, None, None, *problem.index)
    _equal("dw", dw, want["dw"])
    _equal("dbias", dbias, want["dbias"])
    da = modules["graph_conv_adjacency"].graph_conv_dadjacency
    _equal("dA", da(problem.x, problem.dy, values, adjacency, problem.bias, *problem.index), want["dadjacency"])


def check_graph_gradients_per_channel(modules: dict[str, ModuleType]) -> None:
    check_graph_gradients(modules, adjacency="channel")


def check_graph_gradients_of_wide_blocks(modules: dict[str, ModuleType]) -> None:
    check_graph_gradients(modules, N=1, I=70, T=1, block=(64, 64), K=1, density=1.0)


def check_graph_gradients_in_strips(modules: dict[str, ModuleType]) -> None:
    check_graph_gradients(modules, N=1, I=3, O=8, V=40, T=2, K=1, density=1.0)


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}

T, TB, G, GB, GA, L, P = (
    "temporal_conv", "temporal_conv_backward", "graph_conv", "graph_conv_backward", "graph_conv_adjacency", "launch", "plan",
)  # fmt: skip
MUTANTS = [
    Mutant("halo off by one", T, "- halo) * dilation", "- halo + 1) * dilation", "temporal_forward", "y"),
    Mutant("frames before the first", T, "((from_frame >= 0) & (from_frame < T))", "(from_frame < T)[:, :]", "temporal_forward",
           "y"),
    Mutant("frames after the last", T, "(from_frame < T))", "(from_frame <= T))", "temporal_forward", "y"),
    Mutant("tail of the slots", T, "live = slot < end", "live = slot < end + 1", "temporal_forward", "y"),
    Mutant("last slots left out", T, "live = slot < end", "live = slot < end - 1", "temporal_forward", "y"),
    Mutant("input channels of the wrong slot", T, "channels + slot, mask", "channels + slot // 2 * 2, mask", "temporal_forward",
           "y"),
    Mutant("stride forgotten", T, "frame = s * stride", "frame = s", "temporal_forward_strided", "y"),
    Mutant("narrow frames taken for wide", T, "s, v = p // (units * ALIGN)", "s, v = p // V", "temporal_forward_wide", "y"),
    Mutant("residual left out", L, "if residual is not None:", "if False:", "temporal_forward", "y"),
    Mutant("ReLU left out", L, "if RELU:", "if False:", "temporal_forward", "y"),
    Mutant("shift of the wrong channel", L, "shift + channel, mask", "shift + channel * 0, mask", "temporal_forward", "y"),
    Mutant("taps not mirrored", TB, "(halo - tl.load(entry_tap + q // BO, mask=live, other=0))",
           "(tl.load(entry_tap + q // BO, mask=live, other=0) - halo)", "temporal_gradients", "dx"),
    Mutant("wrong transposed index", TB, "slot.to(tl.int64) * BO + (q % BO)[:, None]",
           "slot.to(tl.int64) * BO + (BO - 1 - q % BO)[:, None]", "temporal_gradients", "dx"),
    Mutant("transposed entries mixed up", TB, "tl.load(entry_row + q // BO", "tl.load(entry_row + q // BO // 2 * 2",
           "temporal_gradients", "dx"),
    Mutant("frames between the strides", TB, "(s * stride == ahead)", "(s * stride <= ahead)", "temporal_gradients", "dx"),
    Mutant("tail of dx's slots", TB, "inside_dy = live & (o < O)", "inside_dy = live & (o < O - 1)", "temporal_gradients",
           "dx"),
    Mutant("columns without a slot", TB, "mask=slot >= 0, other=0.0)", "mask=slot >= -1, other=0.0)", "temporal_gradients",
           "dx"),
    Mutant("last tile of a share", TB, "tl.minimum(first_tile + share, samples * tiles)",
           "tl.minimum(first_tile + share, samples * tiles) - 1", "temporal_gradients", "dw"),
    Mutant("frames of dw not masked", TB, "((frame >= 0) & (frame < T))", "(frame < T)[:, :]", "temporal_gradients", "dw"),
    Mutant("second pass misses a split", L, "(part < parts)[:, None]", "(part < parts - 1)[:, None]",
           "temporal_gradients", "dw"),
    Mutant("second pass starts over", L, "part.to(tl.int64)[:, None] * total",
           "part.to(tl.int64)[:, None] * 0", "temporal_gradients", "dw"),
    Mutant("lasso omitted", L, "if masked is not None:", "if False:", "temporal_gradients", "dw"),
    Mutant("lasso on the kept blocks", L, "other=0) != 0", "other=0) == 0", "temporal_gradients", "dw"),
    Mutant("cover's rows mixed up", P, "(out % rows).expand", "((out + 1) % rows).expand", "temporal_gradients_of_a_cover",
           "dx"),
    Mutant("foreign elements behind a frame", L, "(at < total) & (v < V)", "(at < total) & (v < V + 1)",
           "temporal_gradients_of_packed_frames", "packed x"),
    Mutant("frames packed in a wrong order", L, "frame % T * x_t", "(T - 1 - frame % T) * x_t",
           "temporal_gradients_of_packed_frames", "packed x"),
    Mutant("adjacency transposed", G, "k * a_k), a_v, a_w", "k * a_k), a_w, a_v", "graph_forward", "y"),
    Mutant("first subset's adjacency for all", G, "adjacency + (n * a_n + k * a_k)", "adjacency + n * a_n", "graph_forward",
           "y"),
    Mutant("first sample's adjacency for all", G, "adjacency + (n * a_n + k * a_k)", "adjacency + k * a_k",
           "graph_forward_per_sample", "y"),
    Mutant("first channel's adjacency for all", G, "(o.to(tl.int64) * a_o)", "(o.to(tl.int64) * 0)",
           "graph_forward_per_channel", "y"),
    Mutant("bias of the first subset", G, "bias + k * O, o, O, I, BO, FRAMES", "bias, o, O, I, BO, FRAMES", "graph_forward",
           "y"),
    Mutant("hidden not cleared beyond V", G, "hidden = tl.where(live_pixel[:, None], hidden, 0.0)", "hidden = hidden * 1.0",
           "graph_forward_wide", "y"),
    Mutant("slots of the next subset", G, "begin, end = tl.load(row_ptr + g * K + k), tl.load(row_ptr + g * K + k + 1)",
           "begin, end = tl.load(row_ptr + g * K + k), tl.load(row_ptr + g * K + K)", "graph_forward", "y"),
    Mutant("adjacency of dx not transposed", GB, "adjacency + at_a, a_w, a_v, a_o, column, I, V",
           "adjacency + at_a, a_v, a_w, a_o, column, I, V", "graph_gradients", "dx"),
    Mutant("per channel, adjacency of dx not transposed", GB, "adjacency + at_a, a_w, a_v, a_o, first",
           "adjacency + at_a, a_v, a_w, a_o, first", "graph_gradients_per_channel", "dx"),
    Mutant("last entries of dx", GB, "range(begin * BO, end * BO, SLOTS)", "range(begin * BO, end * BO - BO, SLOTS)",
           "graph_gradients", "dx"),
    Mutant("second part of wide columns", GB, "column = inner + tl.arange(0, PART)", "column = tl.arange(0, PART)",
           "graph_gradients_of_wide_blocks", "dx"),
    Mutant("adjacency of dw not transposed", GB, "first_v * a_v), a_w, a_v, a_o", "first_v * a_v), a_v, a_w, a_o",
           "graph_gradients", "dw"),
    Mutant("adjacency of another strip", GB, "first_w * a_w + first_v * a_v", "first_w * a_v + first_v * a_w",
           "graph_gradients_in_strips", "dw"),
    Mutant("dy of the first strip only", GB, "for first_w in range(0, JOINTS, STRIP)", "for first_w in range(0, STRIP, STRIP)",
           "graph_gradients_in_strips", "dw"),
    Mutant("dw reads a frame too few", GB, "((t < T) & (v < units * ALIGN))[None, :]",
           "((t < T - 1) & (v < units * ALIGN))[None, :]", "graph_gradients", "dw"),
    Mutant("first tile of dA", GA, "range(first_tile, last_tile)", "range(first_tile + 1, last_tile)", "graph_gradients", "dA"),
    Mutant("dA transposed", GA, "at = (joint.to(tl.int64) * V)[:, None] + joint.to(tl.int64)[None, :]",
           "at = (joint.to(tl.int64) * V)[None, :] + joint.to(tl.int64)[:, None]", "graph_gradients", "dA"),
    Mutant("channels of dA mixed up", GA, "tl.arange(0, FRAMES * ROWS) % ROWS", "tl.arange(0, FRAMES * ROWS) // FRAMES",
           "graph_gradients", "dA"),
]  # fmt: skip


def broken(mutant: Mutant, folder: Path) -> dict[str, ModuleType]:
    """The package's modules with the mutant's file replaced, and everything that imports from it."""
    result = dict(MODULES)
    source = {name: Path(str(module.__file__)).read_text() for name, module in MODULES.items()}
    assert source[mutant.file].count(mutant.line) >= 1, "the line is no longer there"
    source[mutant.file] = source[mutant.file].replace(mutant.line, mutant.broken)
    for name in (P, L, T, TB, G, GB, GA):  # in the order of their imports
        file = folder / f"{name}.py"
        text = source[name]
        for other in MODULES:
            text = text.replace(f"from .{other} import", f"from mutants.{other} import")
        text = text.replace("from . import", "from sparse_stgcn.kernels.triton import")
        file.write_text(text.replace("from ..", "from sparse_stgcn.kernels."))
        spec = importlib.util.spec_from_file_location(f"mutants.{name}", file)
        assert spec is not None
        assert spec.loader is not None
        result[name] = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            for known, module in result.items():
                patch.setitem(sys.modules, f"mutants.{known}", module)
            spec.loader.exec_module(result[name])
    return result


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_as_they_are_pass(name: str) -> None:
    CHECKS[name](MODULES)


def chosen() -> list[Mutant]:
    if os.environ.get("SPARSE_STGCN_MUTANTS") == "all":
        return MUTANTS
    return list({mutant.caught_by: mutant for mutant in MUTANTS}.values())


@pytest.mark.parametrize("mutant", chosen(), ids=lambda m: m.name)
def test_a_broken_kernel_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"^{mutant.says}: "):
        CHECKS[mutant.caught_by](broken(mutant, tmp_path))


def test_every_check_catches_something() -> None:
    assert {mutant.caught_by for mutant in MUTANTS} == set(CHECKS)
