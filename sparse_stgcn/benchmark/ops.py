"""Single ops: temporal_conv (forward, dX, dW) and graph_conv forward, against every dense engine that can run them."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import masks, sparsity
from ..kernels import BlockPattern, graph_conv, reference, temporal_conv
from ..kernels.dispatch import forced_backend
from ..skeleton import Skeleton
from .networks import Pattern
from .peers import candidate, dense_engines
from .suite import Entrant, compare
from .table import Row

TOLERANCE = 1e-5
STAGES = ((64, 1), (128, 2), (256, 4))  # channels, and by what the frames are divided


def draw(shape: tuple[int, int, int], pattern: Pattern) -> BlockPattern:
    """A balanced pattern of one weight; full at level 0."""
    block = sparsity.parse_block(pattern.block)
    if pattern.sparsity == 0:
        return BlockPattern.full(shape, block)
    return masks.draw([masks.Layer("conv", shape, block)], pattern.sparsity)["conv"]


def temporal_convolutions(samples: int, frames: int, threads: int, patterns: list[Pattern], rounds: int,
                          directions: tuple[str, ...] = ("forward", "dX", "dW")) -> list[Row]:
    """The 9 x 1 convolution of each stage on ``samples`` persons. dX and dW are timed alone; dense engines other than torch
    only have the forward pass."""
    rows = []
    for channels, part in STAGES:
        shape, length = (channels, channels, 9), frames // part
        x, dy = torch.randn(2, samples, channels, length, 25).unbind()
        weight = torch.randn(shape) / (9 * channels) ** 0.5
        traffic, work = 8 * x.numel(), x.numel() * channels * 9
        drawn = [(p, draw(shape, p)) for p in dict.fromkeys(patterns)]
        for direction in directions:
            run = _TEMPORAL[direction]
            with torch.inference_mode(direction == "forward"):
                dense = [(e, work) for e in _dense(direction, x, dy, weight, threads)]
                want = run(x.double(), dy.double(), weight.double())
                entrants = [Entrant(engine, lambda want=want: want, macs, traffic) for engine, macs in dense]
                for p, pattern in drawn:
                    entrants.append(Entrant(
                        candidate(p.label, partial(_SPARSE[direction], x, dy, pattern.gather(weight), pattern)),
                        partial(_reference, direction, x, dy, weight, pattern), int(work * pattern.density), traffic,
                        p.sparsity, p.block, p.density))
                rows += compare(f"temporal_conv {direction}", f"C={channels} T={length}", samples, threads, entrants, rounds,
                                TOLERANCE)
    return rows


def graph_convolutions(samples: int, frames: int, threads: int, patterns: list[Pattern], rounds: int) -> list[Row]:
    """ST-GCN's graph convolution, forward, against a dense 1 x 1 convolution followed by the product with A."""
    rows = []
    adjacency = Skeleton.load("nturgb+d").adjacency("stgcn_spatial")
    for channels, part in STAGES:
        length, subsets = frames // part, adjacency.shape[0]
        x = torch.randn(samples, channels, length, 25)
        shape = (channels, channels, subsets)
        weight = torch.randn(shape) / channels**0.5
        live = int((adjacency != 0).sum())
        work = x.numel() * channels * subsets
        graph_work = samples * channels * length
        with torch.inference_mode():
            dense = _DenseGraph(weight, adjacency)
            want = _graph_reference(x, weight, BlockPattern.full(shape, (1, 1)), adjacency)
            entrants = [Entrant(engine, lambda want=want: want, work + graph_work * adjacency.numel(), 8 * x.numel())
                        for engine in dense_engines(dense, x, threads, compile=False)]
            for p in dict.fromkeys(patterns):
                pattern = draw(shape, p)
                entrants.append(Entrant(
                    candidate(p.label, partial(graph_conv, x, pattern.gather(weight), pattern, adjacency)),
                    partial(_graph_reference, x, weight, pattern, adjacency),
                    int(work * pattern.density) + graph_work * live, 8 * x.numel(), p.sparsity, p.block, p.density))
            rows += compare("graph_conv forward", f"C={channels} T={length}", samples, threads, entrants, rounds, TOLERANCE)
    return rows


class _DenseGraph(nn.Module):
    def __init__(self, weight: Tensor, adjacency: Tensor) -> None:
        super().__init__()
        _, inputs, self.subsets = weight.shape
        self.weight = nn.Parameter(weight.permute(2, 0, 1).reshape(-1, inputs, 1, 1), requires_grad=False)
        self.register_buffer("A", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        n, _, t, v = x.shape
        return torch.einsum("nkctv,kvw->nctw", F.conv2d(x, self.weight).view(n, self.subsets, -1, t, v), self.A)


def _forward(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight.unsqueeze(-1), padding=(4, 0))


def _gradient(mask: tuple[bool, bool], x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    gradients = torch.ops.aten.convolution_backward(dy, x, weight.unsqueeze(-1), None, (1, 1), (4, 0), (1, 1), False, (0, 0), 1,
                                                    (*mask, False))
    return gradients[0] if mask[0] else gradients[1].squeeze(-1)


_TEMPORAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward": _forward, "dX": partial(_gradient, (True, False)), "dW": partial(_gradient, (False, True))}


def _dense(direction: str, x: Tensor, dy: Tensor, weight: Tensor, threads: int) -> list:
    if direction == "forward":
        conv = nn.Conv2d(x.shape[1], x.shape[1], (9, 1), padding=(4, 0), bias=False).requires_grad_(False)
        conv.weight = nn.Parameter(weight.unsqueeze(-1), requires_grad=False)
        last = x.contiguous(memory_format=torch.channels_last)
        engines = list(dense_engines(conv, x, threads, compile=False))
        return [e for e in engines if e.name != "torch channels_last"] + [
            candidate("torch channels_last", lambda: _forward(last, dy, weight))]
    run, last = _TEMPORAL[direction], torch.channels_last
    lx, ldy = x.contiguous(memory_format=last), dy.contiguous(memory_format=last)
    return [candidate("torch", lambda: run(x, dy, weight)), candidate("torch channels_last", lambda: run(lx, ldy, weight))]


def _sparse_gradient(of: str, x: Tensor, dy: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
    """The op of the backward pass itself, as autograd calls it."""
    index = (pattern.row_ptr, pattern.input, pattern.tap, list(pattern.shape), list(pattern.block))
    if of == "dX":
        return torch.ops.sparse_stgcn.temporal_conv_dx(dy, values, *index, 1, 1, x.shape[2])
    return torch.ops.sparse_stgcn.temporal_conv_dw(x, dy, values, None, None, *index, 1, 1)[0]


_SPARSE: dict[str, Callable[[Tensor, Tensor, Tensor, BlockPattern], Tensor]] = {
    "forward": lambda x, dy, values, pattern: temporal_conv(x, values, pattern),
    "dX": partial(_sparse_gradient, "dX"), "dW": partial(_sparse_gradient, "dW")}


def _reference(direction: str, x: Tensor, dy: Tensor, weight: Tensor, pattern: BlockPattern) -> Tensor:
    weight = weight.double() * pattern.mask()
    made = _TEMPORAL[direction](x.double(), dy.double(), weight)
    return pattern.gather(made) if direction == "dW" else made


def _graph_reference(x: Tensor, weight: Tensor, pattern: BlockPattern, adjacency: Tensor) -> Tensor:
    with forced_backend("reference"):
        return reference.graph_conv(x.double(), pattern.gather(weight.double()), pattern, adjacency.double(), None)
