from __future__ import annotations

import pytest
import torch
from fused_networks import assert_same, keypoint, mixed_blocks
from fused_networks import network as any_network

from sparse_stgcn.kernels import _native
from sparse_stgcn.runtime.ctr_inputs import InputProducts
from sparse_stgcn.sparsity import maskable_convs

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def network(sparsity: float, block: str = "8x1", **kwargs):
    return any_network("ctrgcn", sparsity, block, **kwargs)


@pytest.mark.parametrize("direct", [True, False], ids=["channels", "inputs"])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize(("layout", "joints", "frames"), [("nturgb+d", 25, 7), ("nturgb+d", 25, 70), ("coco", 17, 40)])
def test_both_ways_to_multiply_out(monkeypatch, direct, sparsity, layout, joints, frames):
    """Products of channels with their graphs, and products of inputs with single maps: every unit one way, then the other."""
    monkeypatch.setattr(InputProducts, "cheaper_than", lambda self, products, values, joints: not direct)
    model = network(sparsity, layout=layout)
    for conv in maskable_convs(model).values():
        torch.nn.init.normal_(conv.bias, 0, 0.1)
    assert_same(model, keypoint(2, frames, joints))


def test_both_ways_with_different_blocks(monkeypatch):
    monkeypatch.setattr(InputProducts, "cheaper_than", lambda self, products, values, joints: True)
    assert_same(mixed_blocks(network(0.0)), keypoint(2, 20))


@pytest.mark.parametrize("persons", [1, 2, 5])
def test_any_number_of_persons(persons):
    assert_same(network(0.8, num_person=persons), keypoint(2, 20, persons=persons))


@pytest.mark.parametrize("sparsity", [0.8, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kwargs", [{"temporal": "mixed"}, {"num_subsets": 5}, {"num_subsets": 9}, {"base_channels": 20}],
                         ids=["mixed", "5-subsets", "9-subsets", "20-channels"])
def test_other_forms_of_the_network(kwargs, sparsity):
    assert_same(network(sparsity, graph="random" if "num_subsets" in kwargs else "spatial", **kwargs), keypoint(2, 21))
