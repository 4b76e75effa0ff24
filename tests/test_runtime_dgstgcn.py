from __future__ import annotations

import pytest
from fused_networks import assert_same, keypoint
from fused_networks import network as any_network

from sparse_stgcn.kernels import _native

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def network(sparsity: float, block: str = "8x1", **kwargs):
    return any_network("dgstgcn", sparsity, block, **kwargs)


@pytest.mark.parametrize("persons", [1, 2, 5])
def test_any_number_of_persons(persons):
    assert_same(network(0.8), keypoint(2, 20, persons=persons))


@pytest.mark.parametrize("kwargs", [{"joint_mean": False}, {"num_subsets": 3}, {"base_channels": 24, "ratio": 0.25}],
                         ids=["no-joint-mean", "3-subsets", "24-channels"])
def test_other_forms_of_the_network(kwargs):
    for sparsity in (0.0, 0.8):
        assert_same(network(sparsity, **kwargs), keypoint(2, 21))


@pytest.mark.parametrize("sparsity", [0.95, 0.99])
def test_products_that_nothing_reads_are_not_made(sparsity):
    model = network(sparsity)
    read = [block.gcn.post.pattern.inputs_read() for block in model.backbone.blocks]
    assert sum(r is not None for r in read) == len(read)
    assert_same(model, keypoint(2, 21))
