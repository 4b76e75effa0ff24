"""Arguments of the dynamic aggregations, their formulas in plain torch, and the sizes by which errors are measured."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_stgcn import BlockPattern
from sparse_stgcn.kernels import graph_product
from sparse_stgcn.kernels.ctr import ctr_aggregate
from sparse_stgcn.kernels.dynamic import aa_graph, dg_aggregate
from tests.kernel_cases import assert_within, normal

N, C, R, T, K = 2, 4, 3, 6, 2
OPS = ["aa", "ctr", "dg"]


def aa(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    similar = torch.einsum("nrtv,nrtw->nvw", a, b) / (a.shape[1] * a.shape[2])
    return torch.einsum("nctv,nvw->nctw", x, A + alpha * torch.tanh(similar))


def ctr(x1: Tensor, x2: Tensor, x3: Tensor, w4: Tensor, b4: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    maps = torch.tanh(x1[..., :, None] - x2[..., None, :])
    refined = torch.einsum("cr,nrvw->ncvw", w4, maps) + b4[:, None, None]
    return torch.einsum("nctv,ncvw->nctw", x3, alpha * refined + A)


def dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    attention = torch.einsum("nkcv,nkcw->nkvw", x1, x2).softmax(-2)[:, :, None]
    graph = A[:, None] + alpha * torch.tanh(x1[..., :, None] - x2[..., None, :]) + beta * attention
    return torch.einsum("nkctv,nkcvw->nkctw", x, graph)


def aa_aggregate(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    """One subset of AA-GCN: its graph, and the product with it."""
    return graph_product(x, aa_graph(torch.stack([a, b], 1)[:, :, None], alpha, A[None]))


OURS: dict[str, Callable] = {"aa": aa_aggregate, "ctr": ctr_aggregate, "dg": dg_aggregate}
FORMULA: dict[str, Callable] = {"aa": aa, "ctr": ctr, "dg": dg}

# The size of a result, by which an error is measured: the same op on absolute values, and of tanh and the softmax what their
# errors are measured by. Their values and slopes go into the sizes of results and of gradients alike.


def size_of(x: Tensor) -> Tensor:
    """|x|, of slope 1 at 0 too."""
    return torch.where(x < 0, -x, x)


def tanh_size(z: Tensor, size: Tensor | float = 0.0) -> Tensor:
    """Of tanh(z) where z has an error of ``size``: the error of tanh itself is 3 eps absolute, its slope at most 1; that of
    1 - tanh^2 is at most twice its error plus 0.8 times that of z."""
    return 1 + size + (2 + size) * (z - z.detach())


def softmax_size(attention: Tensor, score: Tensor) -> Tensor:
    """Of a softmax over -2 with sums of absolute values ``score`` behind it: exp turns their error into a relative one."""
    weight = (attention * (2 + 2 * score.amax(-2, keepdim=True))).detach()
    move = score - score.detach()
    return weight + weight * (move + (attention * move).sum(-2, keepdim=True))


def aa_size(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    similar = torch.einsum("nrtv,nrtw->nvw", size_of(a), size_of(b)) / (a.shape[1] * a.shape[2])
    return torch.einsum("nctv,nvw->nctw", size_of(x), size_of(A) + size_of(alpha) * tanh_size(similar, similar.detach()))


def ctr_size(x1: Tensor, x2: Tensor, x3: Tensor, w4: Tensor, b4: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    maps = tanh_size(size_of(x1)[..., :, None] + size_of(x2)[..., None, :])
    refined = torch.einsum("cr,nrvw->ncvw", size_of(w4), maps) + size_of(b4)[:, None, None]
    return torch.einsum("nctv,ncvw->nctw", size_of(x3), size_of(alpha) * refined + size_of(A))


def dg_size(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    attention = torch.einsum("nkcv,nkcw->nkvw", x1, x2).softmax(-2).detach()
    attention = softmax_size(attention, torch.einsum("nkcv,nkcw->nkvw", size_of(x1), size_of(x2)))[:, :, None]
    maps = tanh_size(size_of(x1)[..., :, None] + size_of(x2)[..., None, :])
    graph = size_of(A)[:, None] + size_of(alpha) * maps + size_of(beta) * attention
    return torch.einsum("nkctv,nkcvw->nkctw", size_of(x), graph)


SIZE: dict[str, Callable] = {"aa": aa_size, "ctr": ctr_size, "dg": dg_size}


def sizes(op: str, joints: int, batch: int = N, channels: int = C, rank: int = R, frames: int = T, groups: int = K
          ) -> list[tuple[int, ...]]:
    V = joints
    return {
        "aa": [(batch, channels, frames, V), (batch, rank, frames, V), (batch, rank, frames, V), (1,), (V, V)],
        "ctr": [(batch, rank, V), (batch, rank, V), (batch, channels, frames, V), (channels, rank), (channels,), (1,), (V, V)],
        "dg": [(batch, groups, channels, frames, V), (batch, groups, channels, V), (batch, groups, channels, V), (1,), (1,),
               (groups, V, V)],
    }[op]


NAMES = {"aa": ["x", "a", "b", "alpha", "A"], "ctr": ["x1", "x2", "x3", "w4", "b4", "alpha", "A"],
         "dg": ["x", "x1", "x2", "alpha", "beta", "A"]}
X = {"aa": 0, "ctr": 2, "dg": 0}  # the argument that has the shape of the result


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def restride(x: Tensor, kind: str) -> Tensor:
    """The numbers of x in other strides."""
    last = x.dim() - 1
    if x.dim() == 1:
        return x
    if kind == "channels_last":
        return x.movedim(1, last).contiguous().movedim(last, 1)
    if kind == "slice":  # of a wider tensor, with an offset into its storage
        wide = torch.full([size + 3 for size in x.shape], float("nan"), dtype=x.dtype)
        return wide[tuple(slice(1, -2) for _ in x.shape)].copy_(x)
    if kind == "transposed":
        return x.permute(*range(last, -1, -1)).contiguous().permute(*range(last, -1, -1))
    if kind == "every_second":
        wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), float("nan"), dtype=x.dtype)
        return wide[..., ::2, :].copy_(x)
    return x.contiguous()


def run(op: Callable, arguments: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(op: str, shapes: list[tuple[int, ...]], kind: str = "contiguous", dy_kind: str = "contiguous",
          pattern: BlockPattern | None = None, spread: float = 1.0) -> None:
    """float32 against the formula in float64: |error| <= 8 eps times the size."""
    arguments = [argument.detach() for argument in draw(shapes, torch.float32)]
    embedded = [i for i, name in enumerate(NAMES[op]) if name in ("a", "b", "x1", "x2")]
    arguments = [argument * spread if i in embedded else argument for i, argument in enumerate(arguments)]
    dy = normal(*shapes[X[op]], seed=20)
    double = [argument.double() for argument in arguments]
    ours = OURS[op]
    if pattern is not None:
        double[3] *= pattern.mask()[..., 0]
        arguments[3] = pattern.gather(arguments[3][..., None])
        ours = lambda *leaves: ctr_aggregate(*leaves, pattern)
    got = run(ours, [restride(argument, kind) for argument in arguments], restride(dy, dy_kind))
    exact = run(FORMULA[op], double, dy.double())
    size = run(SIZE[op], double, dy.double().abs())
    for name, actual, want, scale in zip(["y", *(f"d{name}" for name in NAMES[op])], got, exact, size, strict=True):
        if pattern is not None and name == "dw4":
            actual = pattern.scatter(actual)[..., 0]
            want, scale = (t * pattern.mask()[..., 0] for t in (want, scale))
        assert_within(actual, want, scale.abs(), f"{op} {name}")


CASES = {
    "ntu": {"joints": 25, "frames": 20, "channels": 24, "rank": 16},
    "coco": {"joints": 17, "frames": 13, "channels": 9, "rank": 5},
    "one_joint": {"joints": 1, "frames": 30, "channels": 5, "rank": 3},
    "sixteen_joints": {"joints": 16, "frames": 14, "channels": 8, "rank": 4},
    "40_joints": {"joints": 40, "frames": 9, "channels": 6, "rank": 4},
    "70_joints": {"joints": 70, "frames": 4, "channels": 3, "rank": 2},
    "one_frame": {"joints": 25, "frames": 1, "channels": 17, "rank": 8},
    "one_channel": {"joints": 25, "frames": 27, "channels": 1, "rank": 1},
    "many_samples": {"joints": 5, "frames": 3, "channels": 3, "rank": 2, "batch": 37, "groups": 3},
}
