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
from fused_conv_cases import DTYPE, STORE_EPS, TRUNCATED_EPS
from kernel_cases import normal, random_pattern, strided
from torch import Tensor

import sparse_stgcn
from sparse_stgcn.kernels import BlockPattern, Lasso, dispatch, gpu, graph_conv, group_lasso, reference, temporal_conv

OPS = ("temporal_conv", "temporal_conv_dx", "temporal_conv_dw", "pointwise_conv_backward", "adjacency_conv",
       "adjacency_conv_dx", "adjacency_conv_dw")  # fmt: skip
SCALE = 0.25  # of the group lasso
# How far rounding the factors of the products moves a term. The CUDA graph_conv also rounds what lies between its products.
FACTOR_EPS = {
    "triton": TRUNCATED_EPS,
    "cuda": {"float32": 0.0, "tf32": 2.0**-9, "bfloat16": 2.0**-8, "float16": 2.0**-11},
}
# A graph_conv is two products one after the other: four factors, which CUDA rounds (2^-9 above) and Triton truncates.
GRAPH_EPS = FACTOR_EPS | {"triton": FACTOR_EPS["triton"] | {"tf32": 2.0**-8}}


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, found: dispatch.Gpu) -> Iterator[None]:
    """The ops with GPU kernels see CPU tensors as tensors on a GPU on which `found` can run."""
    choose = dispatch.choose

    def on_gpu(op: str, device: str, dtype: torch.dtype, **more: object) -> dispatch.Choice:
        return choose(op, "cuda" if op in dispatch.GPU_OPS else device, dtype, **more)

    monkeypatch.setattr(dispatch, "choose", on_gpu)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: found)
    monkeypatch.setattr(dispatch, "_chosen", {})  # what is chosen here is for here
    library = torch.library.Library("sparse_stgcn", "IMPL")
    for name in OPS:
        library.impl(name, getattr(gpu, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def within(got: Tensor, want: Tensor, size: Tensor, arithmetic: str, backend: str, what: str,
           factor_eps: dict[str, dict[str, float]] = FACTOR_EPS) -> None:  # fmt: skip
    got = got.cpu()
    assert got.shape == want.shape, what
    bound = (factor_eps[backend][arithmetic] + 8 * 2.0**-24) * size + STORE_EPS[arithmetic] * want.abs()
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
        within(made, right, summed, arithmetic, backend, name, GRAPH_EPS)


def check_strides(kind: str, device: str) -> None:
    """x and dy in awkward strides, on whatever backend the device has."""
    shape, stride = (16, 12, 9), 2
    pattern = random_pattern(shape, (8, 1), 0.3)
    x, dy = normal(2, 12, 21, 25, seed=1), normal(2, 16, 11, 25, seed=4)
    leaves: list[Tensor | None] = [pattern.gather(normal(*shape, seed=3)), normal(16, seed=2)]
    there, x_there = pattern.to(device), strided(x.to(device), kind).requires_grad_()
    given = [leaf.to(device).requires_grad_() for leaf in leaves if leaf is not None]
    y = temporal_conv(x_there, given[0], there, given[1], stride)
    got = [y.detach(), *torch.autograd.grad(y, (x_there, *given), strided(dy.to(device), kind))]
    dense = lambda x, w, b: reference.temporal_conv(x, w, pattern, b, stride)
    want, size = gradients(dense, exact([x, *leaves]), dy.double()), gradients(dense, sizes([x, *leaves]), dy.double().abs())
    for parts in zip(got, want, size, ("y", "dx", "dw", "dbias"), strict=True):
        within(*parts[:3], "float32", "triton", parts[3])


def check_group_lasso(device: str) -> None:
    """The penalty and its gradient, against float64 on the CPU."""
    patterns = [random_pattern((16, 12, 9), (8, 1), 0.3), random_pattern((24, 16, 1), (8, 1), 0.5)]
    weights = [normal(*p.shape, seed=i) for i, p in enumerate(patterns)]
    there = [w.to(device).requires_grad_() for w in weights]
    here = [w.double().requires_grad_() for w in weights]
    got, want = group_lasso(there, [p.to(device) for p in patterns], [0, 0]), group_lasso(here, patterns, [0, 0])
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(got, there), torch.autograd.grad(want, here), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-8)


def check_training_step(name: str, block: tuple[int, int], device: str, dtype: torch.dtype) -> None:
    """Loss and gradient of one step of a small backbone on live blocks, against float64 on a CPU.

    In norm over all parameters, because a ReLU or a maximum whose inputs are within rounding of each other may switch, which
    moves single entries by their pixel's share: of half a million inputs about one does so in float32, and torch's own step is
    off by up to a hundredth in single parameters of DG-STGCN. That every product is right is shown entry by entry elsewhere.
    """
    torch.manual_seed(0)
    model = sparse_stgcn.create_model(name, 5, base_channels=16).train()
    sparse_stgcn.compact(sparse_stgcn.sparsify(model, 0.6, block=block))
    x, label = torch.randn(2, 2, 16, 25, 3), torch.tensor([1, 3])
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def step(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model.load_state_dict(state)
        there = model.to(device, dtype)
        there.zero_grad()
        loss = torch.nn.functional.cross_entropy(there(x.to(device, dtype)), label.to(device))
        loss.backward()
        return {"loss": loss.detach().cpu(), **{k: p.grad.cpu() for k, p in there.named_parameters() if p.grad is not None}}

    want, got = step("cpu", torch.float64), step(device, dtype)
    assert got.keys() == want.keys()
    assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=100 * torch.finfo(dtype).eps)
    error = torch.cat([(got[key].double() - want[key]).flatten() for key in want]).norm()
    share = error / torch.cat([g.flatten() for g in want.values()]).norm()
    assert share <= (2e-2 if dtype == torch.float32 else 1e-9), f"the gradient is off by {share:.3g} of its norm"


def check_compiled(device: str, backend: str) -> None:
    """Both ops and their gradients under torch.compile(fullgraph=True) give what they give in eager mode."""
    flat = BlockPattern.full((16, 8, 9))
    temporal, spatial = flat.to(device), BlockPattern.full((8, 16, 3)).to(device)

    def both(x: Tensor, w: Tensor, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return graph_conv(temporal_conv(x, w, temporal, stride=2), u, spatial, a, b).relu()

    shapes = ((2, 8, 10, 25), flat.values_shape, spatial.values_shape, (3, 25, 25), (3, 8))
    leaves = [normal(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes)]
    torch._dynamo.reset()
    want, got = both(*leaves), torch.compile(both, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(got, want)
    dy = torch.ones_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
