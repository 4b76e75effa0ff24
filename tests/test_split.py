from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels import _native, max_pool, norm, spans, split, spread_mean
from sparse_stgcn.kernels.split import memory, place_of
from tests.kernel_cases import normal

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

WIDTHS = (4, 3, 5)


def whole() -> torch.Tensor:
    return normal(2, sum(WIDTHS), 6, 5, seed=1, dtype=torch.float64).requires_grad_()


def gradients(op, splitter):
    """Of a leaf whose split slices go through ``op``; through an op first, so that the whole gradient is no leaf's."""
    y = whole()
    op(splitter(2 * y)).backward()
    return y.grad


def plain(y, where=None):
    return tuple(y[:, begin:end] for begin, end in where or spans(WIDTHS))


def ours(y, where=None):
    return split(y, where or spans(WIDTHS))


weight = normal(12, seed=2, dtype=torch.float64)
several = {
    "norm": lambda parts: norm(parts, weight, 2 * weight, relu=True)[0].square().sum(),
    "two_norms": lambda parts: (norm(parts[:2], weight[:7], weight[:7])[0].square() * normal(
        2, 7, 6, 5, seed=3, dtype=torch.float64)).sum() + norm(parts[2], weight[:5], weight[:5], relu=True)[0].square().sum(),
    "pool_and_others": lambda parts: max_pool(parts[0]).square().sum() + parts[1].square().sum() + max_pool(parts[2], 2).sum(),
    "spread": lambda parts: spread_mean(parts, weight[:4]).square().sum(),
    "one_without_gradient": lambda parts: max_pool(parts[1]).square().sum(),
    "a_slice_twice": lambda parts: max_pool(parts[0]).square().sum() + 3 * max_pool(parts[0], 2).sum() + parts[2].sum(),
    "a_slice_three_times": lambda parts: sum(max_pool(parts[0], s).square().sum() for s in (1, 2, 3)) + 2 * parts[0].sum(),
}


@pytest.mark.parametrize("name", several)
def test_gradients_are_those_of_slices(name):
    torch.testing.assert_close(gradients(several[name], ours), gradients(several[name], plain), rtol=1e-13, atol=1e-13)


def test_channels_in_no_slice_have_no_gradient():
    where = [(1, 4), (6, 11)]
    op = lambda parts: max_pool(parts[0]).square().sum() + max_pool(parts[1], 2).square().sum()
    got = gradients(op, lambda y: ours(y, where))
    assert torch.equal(got, gradients(op, lambda y: plain(y, where)))
    assert got[:, 1:4].any() and not got[:, 0].any() and not got[:, 4:6].any() and not got[:, 11].any()


def test_what_is_in_its_place_is_not_copied(monkeypatch):
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copies.append(self.shape) or self.set_(other))
    gradients(lambda parts: norm(parts, weight, weight)[0].square().sum(), ours)
    assert not copies


def test_a_second_backward_pass_starts_anew():
    y = whole()
    loss = several["two_norms"](ours(2 * y))
    first, = torch.autograd.grad(loss, y, retain_graph=True)
    kept = first.clone()
    second, = torch.autograd.grad(loss, y)
    assert torch.equal(first, kept) and torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_a_pass_that_never_reaches_the_whole_leaves_nothing_wrong():
    y, scale = whole(), weight[:4].clone().requires_grad_()
    parts = ours(2 * y)
    loss = norm(parts[0], scale, scale)[0].square().sum() + max_pool(parts[1]).square().sum()
    torch.autograd.grad(loss, parts[0], retain_graph=True)
    got, = torch.autograd.grad(loss, y)
    parts = plain(2 * y)
    expected, = torch.autograd.grad(norm(parts[0], scale, scale)[0].square().sum() + max_pool(parts[1]).square().sum(), y)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_gradients_changed_by_a_hook():
    def op(parts):
        parts[0].register_hook(lambda g: 5 * g)
        return max_pool(parts[0]).square().sum() + max_pool(parts[1]).sum()

    assert torch.equal(gradients(op, ours), gradients(op, plain))


def test_places_exist_only_where_a_gradient_will():
    assert all(place_of(part) for part in ours(whole() * 2))
    assert not any(place_of(part) for part in ours(whole().detach()))
    with torch.no_grad():
        assert not any(place_of(part) for part in ours(whole() * 2))
    assert not any(place_of(part) for part in ours((whole() * 2).bfloat16()))
    x = whole()
    part = ours(2 * x)[1]
    first, second = memory(part, place_of(part)), memory(part, place_of(part))
    assert first.stride(0) == x.stride(0) and second.is_contiguous() and second.shape == part.shape


def test_fullgraph():
    loss = lambda y: several["norm"](ours(2 * y))
    y = whole()
    expected, = torch.autograd.grad(loss(y), y)
    got, = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(y), y)
    assert torch.equal(got, expected)
