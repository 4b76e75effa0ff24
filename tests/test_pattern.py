from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern, pattern
from tests.kernel_cases import BLOCKS, random_pattern


def test_docstring_example():
    result = doctest.testmod(pattern)
    assert result.attempted >= 4 and result.failed == 0


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(16, 12, 3), (17, 7, 1), (3, 2, 9)], ids=str)
def test_gather_and_scatter_are_inverse(shape, block):
    p = random_pattern(shape, block, 0.4)
    dense = torch.randn(shape)
    values = p.gather(dense)
    assert values.shape == (p.num_blocks, block[1], block[0])
    torch.testing.assert_close(p.scatter(values), dense * p.mask(), rtol=0, atol=0)
    assert p.num_live == int(p.mask().sum())
    assert p.density == pytest.approx(p.num_live / dense.numel())


def test_value_layout_is_input_major():
    p = BlockPattern.full((4, 4, 1), (2, 2))
    dense = torch.arange(16.0).view(4, 4, 1)
    assert p.gather(dense)[1].tolist() == [[2.0, 6.0], [3.0, 7.0]]  # inputs 2, 3; outputs 0, 1


def test_blocks_are_sorted_by_row_tap_column():
    p = random_pattern((32, 24, 5), (8, 2), 0.5)
    keys = list(zip(p.rows.tolist(), p.tap.tolist(), p.input.tolist(), strict=True))
    assert keys == sorted(keys)


def test_transposed_index_is_a_stable_permutation():
    p = random_pattern((32, 24, 5), (8, 2), 0.5)
    for column in range(p.t_ptr.numel() - 1):
        blocks = p.t_perm[p.t_ptr[column]:p.t_ptr[column + 1]].tolist()
        assert blocks == sorted(blocks)
        assert all(int(p.input[b]) == column for b in blocks)
        assert p.t_row[p.t_ptr[column]:p.t_ptr[column + 1]].tolist() == p.rows[blocks].tolist()


def test_gather_and_scatter_are_differentiable():
    p = random_pattern((7, 5, 3), (3, 2), 0.6)
    dense = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(p.values_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(p.gather, dense)
    assert torch.autograd.gradcheck(p.scatter, values)


def test_digest_tells_patterns_apart():
    a, b = random_pattern((16, 16, 3), (4, 1), 0.3, seed=1), random_pattern((16, 16, 3), (4, 1), 0.3, seed=2)
    again = random_pattern((16, 16, 3), (4, 1), 0.3, seed=1)
    assert a.digest() == again.digest() != b.digest()


@pytest.mark.parametrize(("live", "message"), [
    (torch.ones(2, 2, 1), "bool tensor"),
    (torch.ones(3, 2, 1, dtype=torch.bool), r"live of shape \(2, 2, 1\)"),
], ids=["dtype", "shape"])
def test_bad_blocks_are_refused(live, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BlockPattern.from_blocks(live, (4, 4, 1), (2, 2))


def test_copies_of_a_network_share_its_patterns():
    model = torch.nn.Module()
    model.pattern = random_pattern((16, 8, 3), (8, 1), 0.5)
    assert copy.deepcopy(model).pattern is model.pattern
    assert pickle.loads(pickle.dumps(model.pattern)).digest() == model.pattern.digest()


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="positive"):
        BlockPattern.full((4, 0, 1), (2, 2))
    with pytest.raises(ValueError, match="values of shape"):
        BlockPattern.full((4, 4, 1), (2, 2)).scatter(torch.zeros(1, 2, 2))
