from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern, group_lasso, lasso_terms, reference
from tests.kernel_cases import normal, random_pattern


def layers(dtype=torch.float64):
    """Two layers, the second one in a convolution's own layout: a permuted view."""
    patterns = [random_pattern((16, 12, 9), (8, 1), 0.2, seed=1), random_pattern((8, 6, 3), (4, 2), 0.3, seed=2)]
    first = normal(16, 12, 9, seed=3, dtype=dtype).requires_grad_()
    second = normal(24, 6, seed=4, dtype=dtype).requires_grad_()
    return [first, second], [first, second.view(3, 8, 6).permute(1, 2, 0)], patterns


@pytest.mark.parametrize("groups", [None, [0, 0], [1, 0]], ids=str)
def test_value_and_gradient_equal_autograd_of_the_formula(groups):
    leaves, views, patterns = layers()
    got, want = group_lasso(views, patterns, groups), reference.group_lasso(views, patterns, groups)
    assert got.item() == pytest.approx(want.item(), rel=1e-14)
    gradients = torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, leaves)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
        assert a.abs().sum() > 0


def test_gradient_is_exactly_zero_on_kept_entries_and_never_on_masked_ones():
    leaves, views, patterns = layers(torch.float32)
    gradient, = torch.autograd.grad(group_lasso(views, patterns), leaves[:1])
    kept = patterns[0].mask()
    assert (gradient[kept] == 0).all() and (gradient[~kept] != 0).all()
    norm = (leaves[0] * ~kept).norm()
    torch.testing.assert_close(gradient, (leaves[0] * ~kept / norm).detach())


def test_norm_is_unsquared():
    p = BlockPattern.from_blocks(torch.tensor([[[False], [True]]]), (1, 2, 1), (1, 1))
    assert group_lasso([torch.tensor([[[3.0], [100.0]]])], [p]).item() == 3.0
    weights = [torch.tensor([[[3.0], [1.0]]]), torch.tensor([[[4.0], [1.0]]])]
    assert group_lasso(weights, [p, p]).item() == 7.0
    assert group_lasso(weights, [p, p], [0, 0]).item() == 5.0


def test_zero_norm_has_gradient_zero():
    p = random_pattern((8, 6, 3), (4, 1), 0.5)
    weight = p.mask().float().requires_grad_()  # masked entries are 0
    value = group_lasso([weight], [p])
    gradient, = torch.autograd.grad(value, weight)
    assert value.item() == 0 and not gradient.any()
    full = BlockPattern.full((8, 6, 3), (4, 1))
    gradient, = torch.autograd.grad(group_lasso([weight], [full]), weight)
    assert not gradient.any()


def test_gradcheck():
    _, _, patterns = layers()
    weight = normal(8, 6, 3, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: group_lasso([w], patterns[1:]), weight)


def test_lasso_terms_give_the_same_gradient():
    """What the fused dW adds is what autograd of the penalty adds."""
    _, views, patterns = layers()
    leaves = [v.detach().clone().requires_grad_() for v in views]
    want = torch.autograd.grad(0.3 * group_lasso(leaves, patterns, [0, 0]), leaves)
    for leaf, pattern, term, gradient in zip(leaves, patterns, lasso_terms(leaves, patterns, 0.3), want, strict=True):
        full = BlockPattern.full(pattern.shape, pattern.block)
        values = full.gather(leaf.detach())
        added = full.scatter(term.scale * values * term.masked[:, None, None])
        torch.testing.assert_close(added, gradient, rtol=1e-13, atol=1e-16)


def test_opcheck():
    _, views, patterns = layers(torch.float32)
    weight, kept, scale = views[1].detach(), patterns[1].mask(), torch.tensor(0.5, dtype=torch.float64)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sparse_stgcn.lasso_square, (weight, kept), test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.lasso_gradient, (weight, kept, scale), test_utils=tests)


def test_bad_arguments_are_refused():
    p = BlockPattern.full((8, 6, 3))
    with pytest.raises(ValueError, match="one length"):
        group_lasso([torch.zeros(8, 6, 3)], [p, p])
    with pytest.raises(ValueError, match=r"weights\[0\]"):
        group_lasso([torch.zeros(8, 6, 1)], [p])
