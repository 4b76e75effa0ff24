from __future__ import annotations

import pytest
import torch
from fused_networks import assert_bit_equal_over_calls_threads_and_batches, assert_same, chain, keypoint, mixed_blocks
from fused_networks import network as any_network

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import _native
from sparse_stgcn.sparsity import maskable_convs

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def network(sparsity: float, block: str = "8x1", **kwargs):
    return any_network("dgstgcn", sparsity, block, **kwargs)


def test_dense_logits_equal_the_network():
    assert_same(network(0.0), keypoint(3, 20))


@pytest.mark.filterwarnings("ignore:block .* keeps")
@pytest.mark.parametrize("sparsity", [0.6, 0.95, 0.99])
@pytest.mark.parametrize("block", ["8x1", "4x1", "1x1", "4x4", "16x16", "3x5"])
def test_logits_equal_the_network(sparsity, block):
    assert_same(network(sparsity, block), keypoint(3, 20))


@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_full_width(sparsity):
    assert_same(network(sparsity, base_channels=64), keypoint(1, 37))


@pytest.mark.parametrize("frames", [1, 2, 3, 14, 15, 21, 37, 100])
def test_any_clip_length(frames):
    assert_same(network(0.8), keypoint(2, frames))


@pytest.mark.parametrize(("layout", "joints"), [("coco", 17), ("handmp", 21)])
def test_any_layout(layout, joints):
    assert_same(network(0.8, layout=layout), keypoint(2, 33, joints))


@pytest.mark.parametrize("joints", [3, 15, 16, 20, 40])
def test_any_number_of_joints(joints):
    assert_same(network(0.8, layout=chain(joints)), keypoint(2, 20, joints))


@pytest.mark.parametrize("persons", [1, 2, 5])
def test_any_number_of_persons(persons):
    assert_same(network(0.8), keypoint(2, 20, persons=persons))


@pytest.mark.parametrize("kwargs", [{"joint_mean": False}, {"num_subsets": 3}, {"base_channels": 24, "ratio": 0.25}],
                         ids=["no-joint-mean", "3-subsets", "24-channels"])
def test_other_forms_of_the_network(kwargs):
    for sparsity in (0.0, 0.8):
        assert_same(network(sparsity, **kwargs), keypoint(2, 21))


def test_layers_of_different_blocks_in_one_network():
    assert_same(mixed_blocks(network(0.0)), keypoint(2, 20))


def test_absent_persons_are_computed_once_and_right():
    model, x = network(0.8), keypoint(6, 20)
    x[1, 1] = x[3, 0] = x[4, 1] = x[5] = 0
    assert_same(model, x)


def test_embeddings_far_apart():
    """tanh of large differences takes the path with one exp a pair."""
    model = network(0.8)
    for key, conv in maskable_convs(model).items():
        if key.endswith(("conv1", "conv2")):
            conv.bias.data.normal_(0, 40)
    assert_same(model, keypoint(2, 20))


def test_any_strides_of_the_input():
    model, x = network(0.8), keypoint(2, 20)
    wide = torch.full((2, 2, 40, 27, 4), float("nan"))
    wide[:, :, ::2, 1:-1, :3] = x
    fused = runtime.optimize(model)
    for view in (wide[:, :, ::2, 1:-1, :3], x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)):
        assert torch.equal(fused(view), fused(x))


def test_an_exact_zero_among_the_live_weights_is_a_weight():
    model = network(0.8)
    with torch.no_grad():
        for conv in maskable_convs(model).values():
            conv.values[::3] = 0
    assert_same(model, keypoint(2, 20))


def test_bit_equal_over_calls_threads_and_batches():
    assert_bit_equal_over_calls_threads_and_batches(runtime.optimize(network(0.9)), keypoint(5, 40))


def test_batch_norm_and_dropout_are_those_of_inference():
    model = network(0.8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runtime.optimize(model, keypoint(2, 20))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sparse_stgcn.densify(model).training
