"""What holds for the fused programs of both backbones with branched temporal units; their own tests have files of their own."""
from __future__ import annotations

import pytest
import torch
from fused_networks import assert_bit_equal_over_calls_threads_and_batches, assert_same, chain, keypoint, mixed_blocks, network

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import _native
from sparse_stgcn.sparsity import maskable_convs

pytestmark = [pytest.mark.skipif(_native.module is None, reason="the native module is not built"),
              pytest.mark.parametrize("name", ["ctrgcn", "dgstgcn"])]


def test_dense_logits_equal_the_network(name):
    assert_same(network(name, 0.0), keypoint(3, 20))


@pytest.mark.filterwarnings("ignore:block .* keeps")
@pytest.mark.parametrize("sparsity", [0.6, 0.95, 0.99])
@pytest.mark.parametrize("block", ["8x1", "4x1", "1x1", "4x4", "16x16", "3x5"])
def test_logits_equal_the_network(name, sparsity, block):
    assert_same(network(name, sparsity, block), keypoint(3, 20))


@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_full_width(name, sparsity):
    assert_same(network(name, sparsity, base_channels=64), keypoint(1, 37))


@pytest.mark.parametrize("frames", [1, 2, 3, 14, 15, 21, 37, 100])
def test_any_clip_length(name, frames):
    assert_same(network(name, 0.8), keypoint(2, frames))


@pytest.mark.parametrize(("layout", "joints"), [("coco", 17), ("handmp", 21)])
def test_any_layout(name, layout, joints):
    assert_same(network(name, 0.8, layout=layout), keypoint(2, 33, joints))


@pytest.mark.parametrize("joints", [3, 15, 16, 20, 40])
def test_any_number_of_joints(name, joints):
    assert_same(network(name, 0.8, layout=chain(joints)), keypoint(2, 20, joints))


def test_layers_of_different_blocks_in_one_network(name):
    assert_same(mixed_blocks(network(name, 0.0)), keypoint(2, 20))


def test_absent_persons_are_computed_once_and_right(name):
    model, x = network(name, 0.8), keypoint(6, 20)
    x[1, 1] = x[3, 0] = x[4, 1] = x[5] = 0
    assert_same(model, x)


def test_embeddings_far_apart(name):
    """tanh of large differences takes the path with one exp a pair."""
    model = network(name, 0.8)
    for key, conv in maskable_convs(model).items():
        if key.endswith(("conv1", "conv2")):
            conv.bias.data.normal_(0, 40)
    assert_same(model, keypoint(2, 20))


def test_any_strides_of_the_input(name):
    model, x = network(name, 0.8), keypoint(2, 20)
    wide = torch.full((2, 2, 40, 27, 4), float("nan"))
    wide[:, :, ::2, 1:-1, :3] = x
    fused = runtime.optimize(model)
    for view in (wide[:, :, ::2, 1:-1, :3], x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)):
        assert torch.equal(fused(view), fused(x))


def test_an_exact_zero_among_the_live_weights_is_a_weight(name):
    model = network(name, 0.8)
    with torch.no_grad():
        for conv in maskable_convs(model).values():
            conv.values[::3] = 0
    assert_same(model, keypoint(2, 20))


def test_bit_equal_over_calls_threads_and_batches(name):
    assert_bit_equal_over_calls_threads_and_batches(runtime.optimize(network(name, 0.9)), keypoint(5, 40))


def test_batch_norm_and_dropout_are_those_of_inference(name):
    model = network(name, 0.8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runtime.optimize(model, keypoint(2, 20))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sparse_stgcn.densify(model).training
