"""The public temporal_conv and graph_conv, forward and every gradient, against the reference in float64.

The same bodies run on a real GPU (test_gpu.py), on CPU tensors through Triton's interpreter (triton_interpreter/) and through
the emulated CUDA module (cuda_emulation/). There `as_on_a_gpu` makes the dispatch treat CPU tensors as a GPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fused_conv_cases
import graph_conv_cases
import pytest
import torch
from fused_conv_cases import DTYPE, STORE_EPS
from torch import Tensor

from sparse_stgcn.kernels import Lasso, dispatch, gpu, graph_conv, reference, temporal_conv

OPS = ("temporal_conv", "temporal_conv_dx", "temporal_conv_dw", "pointwise_conv_backward", "adjacency_conv",
       "adjacency_conv_dx", "adjacency_conv_dw")  # fmt: skip
SCALE = 0.25  # of the group lasso
# How far rounding the factors of the products moves a term. The CUDA graph_conv also rounds what lies between its products.
FACTOR_EPS = {
    "triton": {"float32": 0.0, "tf32": 2.0**-9, "bfloat16": 0.0, "float16": 0.0},
    "cuda": {"float32": 0.0, "tf32": 2.0**-9, "bfloat16": 2.0**-8, "float16": 2.0**-11},
}


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, found: dispatch.Gpu) -> Iterator[None]:
    """The ops with GPU kernels see CPU tensors as tensors on a GPU on which `found` can run."""
    choose = dispatch.choose

    def on_gpu(op: str, device: str, dtype: torch.dtype, **more: object) -> dispatch.Choice:
        return choose(op, "cuda" if op in dispatch.GPU_OPS else device, dtype, **more)

    monkeypatch.setattr(dispatch, "choose", on_gpu)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: found)
    library = torch.library.Library("sparse_stgcn", "IMPL")
    for name in OPS:
        library.impl(name, getattr(gpu, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def within(got: Tensor, want: Tensor, size: Tensor, arithmetic: str, backend: str, what: str) -> None:
    got = got.cpu()
    assert got.shape == want.shape, what
    bound = (FACTOR_EPS[backend][arithmetic] + 8 * 2.0**-24) * size + STORE_EPS[arithmetic] * want.abs()
    if backend == "cuda" and what in ("dadjacency", "dbias"):  # stored once before the part of the biases is put in
        bound = bound + STORE_EPS[arithmetic] * size
    bound = bound + (2.0**-20 if arithmetic == "float16" else 1e-30)
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{what}: largest error / bound {(error / bound).nan_to_num(9e9).max():.3g}"


def gradients(op, leaves: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    given = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = op(*given)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in given if leaf is not None], dy)]


def sizes(leaves: list[Tensor | None]) -> list[Tensor | None]:
    return [None if leaf is None else leaf.double().abs() for leaf in leaves]


def exact(leaves: list[Tensor | None]) -> list[Tensor | None]:
    return [None if leaf is None else leaf.double() for leaf in leaves]


def half_masked(blocks: int) -> Tensor:
    return torch.arange(blocks) % 2 == 0


def check_temporal_conv(case: fused_conv_cases.Case, arithmetic: str, device: str, backend: str, lasso: bool = False) -> None:
    problem = fused_conv_cases.make(case, DTYPE[arithmetic])
    pattern, leaves = problem.pattern, [problem.x, problem.values, problem.bias]
    dy = torch.randn(problem.expected().shape, generator=torch.Generator().manual_seed(1)).to(DTYPE[arithmetic])
    masked = half_masked(pattern.num_blocks)
    there, term = pattern.to(device), Lasso(masked.to(device), torch.tensor(SCALE, device=device)) if lasso else None
    got = gradients(lambda x, w, b: temporal_conv(x, w, there, b, case.stride, case.dilation, lasso=term),
                    [None if leaf is None else leaf.to(device) for leaf in leaves], dy.to(device))  # fmt: skip
    dense = lambda x, w, b: reference.temporal_conv(x, w, pattern, b, case.stride, case.dilation)
    want, size = gradients(dense, exact(leaves), dy.double()), gradients(dense, sizes(leaves), dy.double().abs())
    if lasso:
        want[2] += SCALE * problem.values.double() * masked[:, None, None]
        size[2] += SCALE * problem.values.double().abs() * masked[:, None, None]
    for parts in zip(got, want, size, ("y", "dx", "dw", "dbias"), strict=False):
        within(*parts[:3], arithmetic, backend, parts[3])


def check_graph_conv(case: graph_conv_cases.Case, arithmetic: str, device: str, backend: str, lasso: bool = False) -> None:
    problem = graph_conv_cases.make(case, DTYPE[arithmetic])
    pattern, offset = problem.pattern, problem.shift
    leaves = [problem.x, problem.values, problem.adjacency, problem.bias, offset]
    masked = half_masked(pattern.num_blocks)
    there, term = pattern.to(device), Lasso(masked.to(device), torch.tensor(SCALE, device=device)) if lasso else None
    got = gradients(lambda x, w, a, b, c: graph_conv(x, w, there, a, b, lasso=term, offset=c),
                    [None if leaf is None else leaf.to(device) for leaf in leaves], problem.dy.to(device))  # fmt: skip

    def dense(x: Tensor, w: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
        y = reference.graph_conv(x, w, pattern, a, b)
        return y if c is None else y + c[:, None, None]

    dy = problem.dy.double()
    want, size = gradients(dense, exact(leaves), dy), gradients(dense, sizes(leaves), dy.abs())
    if lasso:
        want[2] += SCALE * problem.values.double() * masked[:, None, None]
        size[2] += SCALE * problem.values.double().abs() * masked[:, None, None]
    named = zip(("dx", "dw", "dadjacency", "dbias", "doffset"), leaves, strict=True)
    names = [name for name, leaf in named if leaf is not None]
    for made, right, summed, name in zip(got, want, size, ("y", *names), strict=True):
        within(made, right, summed, arithmetic, backend, name)
