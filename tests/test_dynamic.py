"""kernels.dynamic: the aggregations against their formulas, and what they keep for the backward pass."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_stgcn import BlockPattern
from sparse_stgcn.kernels.dynamic import aa_aggregate, ctr_aggregate, dg_aggregate

N, C, R, T, K = 2, 4, 3, 6, 2


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


def shapes(joints: int) -> dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]]:
    V = joints
    return {
        "aa": (aa_aggregate, aa, [(N, C, T, V), (N, R, T, V), (N, R, T, V), (1,), (V, V)]),
        "ctr": (ctr_aggregate, ctr, [(N, R, V), (N, R, V), (N, C, T, V), (C, R), (C,), (1,), (V, V)]),
        "dg": (dg_aggregate, dg, [(N, K, C, T, V), (N, K, C, V), (N, K, C, V), (1,), (1,), (K, V, V)]),
    }


def draw(sizes: list[tuple[int, ...]]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("joints", [1, 5, 17])
@pytest.mark.parametrize("op", ["aa", "ctr", "dg"])
def test_forward_and_backward_follow_the_formula(op: str, joints: int) -> None:
    ours, formula, sizes = shapes(joints)[op]
    arguments = draw(sizes)
    got, want = ours(*arguments), formula(*arguments)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    probe = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, arguments, probe), torch.autograd.grad(want, arguments, probe), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("op", ["aa", "ctr", "dg"])
def test_gradcheck(op: str) -> None:
    ours, _, sizes = shapes(4)[op]
    assert torch.autograd.gradcheck(ours, draw(sizes))


@pytest.mark.parametrize("op", ["aa", "ctr", "dg"])
def test_strided_arguments(op: str) -> None:
    ours, formula, sizes = shapes(5)[op]
    arguments = [
        torch.randn(size[::-1], dtype=torch.float64).permute(*range(len(size) - 1, -1, -1)).requires_grad_()
        for size in sizes
    ]
    got = ours(*arguments)
    torch.testing.assert_close(got, formula(*arguments), atol=1e-12, rtol=1e-12)
    got.transpose(-1, -2).square().sum().backward()
    assert all(argument.grad is not None for argument in arguments)


@pytest.mark.parametrize("op", ["ctr", "dg"])
def test_parameters_follow_the_activations_under_autocast(op: str) -> None:
    """Activations in bfloat16, parameters in float32: the result is that of bfloat16, gradients are float32."""
    ours, formula, sizes = shapes(5)[op]
    arguments = [argument.detach().float() for argument in draw(sizes)]
    activations = {"ctr": (0, 1, 2), "dg": (0, 1, 2)}[op]
    mixed = [(a.bfloat16() if i in activations else a).requires_grad_() for i, a in enumerate(arguments)]
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(*mixed)
    got.sum().backward()
    torch.testing.assert_close(got.float(), formula(*arguments), atol=0.3, rtol=0.05)
    assert all(argument.grad.dtype == argument.dtype for argument in mixed)


def test_ctr_takes_live_blocks() -> None:
    x1, x2, x3, w4, b4, alpha, A = draw(shapes(5)["ctr"][2])
    live = torch.tensor([[[True], [False], [True]], [[False], [True], [False]]])
    pattern = BlockPattern.from_blocks(live, (C, R, 1), (2, 1))
    values = pattern.gather(w4.detach()[..., None]).requires_grad_()
    got = ctr_aggregate(x1, x2, x3, values, b4, alpha, A, pattern)
    want = ctr(x1, x2, x3, w4 * pattern.mask()[..., 0], b4, alpha, A)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got.sum().backward()
    gradient = torch.autograd.grad(want.sum(), w4)[0]
    torch.testing.assert_close(pattern.scatter(values.grad)[..., 0], gradient, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("op", "allowed"), [
    ("aa", "x, a, b and two maps (N, V, V)"), ("ctr", "the arguments"), ("dg", "the arguments")])
def test_what_is_stored_for_the_backward_pass(op: str, allowed: str) -> None:
    ours, _, sizes = shapes(17)[op]
    arguments, stored = draw(sizes), {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(*arguments)
    own = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    extra = sum(size for pointer, size in stored.items() if pointer not in own)
    maps = 2 * N * 17 * 17 * 8
    assert extra <= (maps if op == "aa" else 0), allowed
