"""A norm whose result goes on as a part of a larger tensor stores that part in place of its result."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from sparse_stgcn.kernels import _native, append_mean
from sparse_stgcn.kernels.norm import norm

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

SHAPE = (2, 6, 9, 25)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [t.requires_grad_() for t in (torch.randn(SHAPE), torch.rand(6) + 0.5, torch.randn(6), torch.randn(SHAPE))]


def unit(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, elsewhere: bool) -> Tensor:
    return norm(x, weight, bias, residual=residual, relu=True, elsewhere=elsewhere)[0]


def gradients(elsewhere: bool, with_mean: bool = True, again: bool = False) -> list[Tensor]:
    leaves = inputs()
    y = unit(*leaves, elsewhere=elsewhere)
    total = sum(((part * part).sum() for part in append_mean(y, 2)), torch.zeros(())) if with_mean else (y * y).sum()
    del y
    if again:
        total.backward(retain_graph=True)
        for leaf in leaves:
            leaf.grad = None
    total.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_do_not_depend_on_it(with_mean: bool, again: bool) -> None:
    found, expected = gradients(True, with_mean, again), gradients(False, with_mean)
    assert len(found) == 4 and all(map(torch.equal, found, expected))


def test_the_larger_tensor_is_what_is_stored() -> None:
    y = unit(*inputs(), elsewhere=True)
    node, memory = y.grad_fn, y.untyped_storage().data_ptr()
    stored = lambda: node.saved_tensors[4]  # type: ignore[union-attr]
    assert stored().untyped_storage().data_ptr() == memory
    values = y.detach().clone()
    (larger,) = append_mean(y)
    assert stored().untyped_storage().data_ptr() != memory and torch.equal(stored(), values)
    larger.data[..., 3] = 7  # unseen by the check for changes: it is the larger tensor that is read
    assert torch.equal(stored()[..., 3], torch.full_like(values[..., 3], 7))


def test_without_a_gradient_nothing_is_kept() -> None:
    with torch.no_grad():
        y = unit(*inputs(), elsewhere=True)
        (larger,) = append_mean(y)
    assert torch.equal(larger[..., :-1], y) and not larger.requires_grad


@pytest.mark.parametrize("with_mean", [True, False])
def test_a_result_and_its_graph_die_with_the_last_reference(with_mean: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        leaves = inputs()
        y = unit(*leaves, elsewhere=True)
        nodes = [weakref.ref(y), weakref.ref(y.grad_fn)]
        total = append_mean(y)[0].sum() if with_mean else y.sum()
        del y
        total.backward()
        del total
        assert not any(node() for node in nodes)
    finally:
        gc.enable()
