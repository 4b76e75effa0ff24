"""again: what ops store of a norm's result is made once more in the backward pass, and changes no number."""
from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from sparse_stgcn import create_model, sparsity
from sparse_stgcn.kernels import _native, again, norm, split, spread_mean
from sparse_stgcn.kernels.again import remember

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def leaves(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, 8, 7, 5), (8,), (8,), (4, 8, 1, 1)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def loss(given: list[Tensor], stored: Callable) -> Tensor:
    x, gamma, beta, weight = given
    y, _, _ = norm(x, gamma, beta, relu=True)
    left, right = split(y, [(0, 3), (3, 8)])
    with stored(y):
        convolved = torch.nn.functional.conv2d(y, weight).sin().sum()
        return convolved + (left.square().sum() + (right * right[:, :1]).cos().sum())


def stored_bytes(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and the bytes of distinct storages that ops outside of ``again`` store."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), sum(kept.values())


def test_gradients_are_the_same_to_the_bit() -> None:
    given = leaves()
    want = torch.autograd.grad(loss(given, lambda y: nullcontext()), given)
    got = torch.autograd.grad(loss(given, again), given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_result_is_not_stored_and_made_once() -> None:
    x, made = torch.randn(4, 6, requires_grad=True), []

    def make() -> Tensor:
        made.append(None)
        return x.detach() * 2

    y = x * 2
    remember(y, make)
    use = lambda y: y[:, :3].square().sum() + y[:, 3:].sin().sum() + (y * y).sum()
    with again(y):
        z = use(y)
    assert not made
    want = torch.autograd.grad(use(x * 2), x)
    got = torch.autograd.grad(z, x, retain_graph=True)
    assert len(made) == 1 and torch.equal(got[0], want[0])
    assert torch.equal(torch.autograd.grad(z, x)[0], want[0]) and len(made) == 2  # a graph that was kept asks again


def test_another_tensor_is_stored_as_ever() -> None:
    x = torch.randn(3, requires_grad=True)
    with again(x):  # nobody said how to make it
        assert torch.equal(torch.autograd.grad(x.square().sum(), x)[0], 2 * x)
    y = x * 1
    remember(y, lambda: x.detach() * 1)
    other = torch.randn(3, requires_grad=True)
    with again(y):
        z = (other * other).sum() + (y * other).sum()
    torch.testing.assert_close(torch.autograd.grad(z, other)[0], 2 * other + x)


def test_without_gradients_nothing_is_remembered() -> None:
    with torch.no_grad():
        x, gamma, beta, _ = leaves()
        y, _, _ = norm(x, gamma, beta, relu=True)
    with again(y):
        z = (y * gamma[:, None, None]).sum()
    torch.testing.assert_close(torch.autograd.grad(z, gamma)[0], y.sum((0, 2, 3)))


@pytest.mark.parametrize("backbone, most", [("dgstgcn", 0.78), ("ctrgcn", 0.93)])
def test_a_network_stores_less_and_learns_the_same(backbone: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """``most``: the share that is stored. Of DG-STGCN's eleven tensors of a block's size three go, of CTR-GCN's nine one.

    Layers behind a norm that are one op with it anyway are taken apart here.
    """
    for place in ("sparse_stgcn.layers", "sparse_stgcn.backbones.multibranch"):
        monkeypatch.setattr(f"{place}.as_maps", lambda *a: None)
    monkeypatch.setattr("sparse_stgcn.backbones.dgstgcn.norm_fuses", lambda *a: False)

    def step() -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model = create_model(backbone, 4, base_channels=24 if backbone == "dgstgcn" else 16)
        sparsity.sparsify(model, 0.5, (4, 1))
        sparsity.compact(model)
        x = torch.randn(2, 2, 16, 25, 3)
        value, stored = stored_bytes(lambda: model.train()(x).square().sum())
        value.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], stored

    got, less = step()
    monkeypatch.setattr(sys.modules["sparse_stgcn.kernels.norm"], "remember", lambda y, make, inputs: None)
    want, all_of_it = step()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert less < most * all_of_it, f"{less / all_of_it:.3f}"


def test_the_coefficients_of_a_mean_do_not_store_what_it_went_through() -> None:
    x = torch.randn(2, 6, 10, 6, requires_grad=True)
    coef = torch.rand(5, requires_grad=True)
    _, stored = stored_bytes(lambda: spread_mean([x[:, :2], x[:, 2:]], coef).sum())
    assert stored == 4 * (2 * 6 * 10 + 5)
