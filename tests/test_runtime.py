from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fused_networks import assert_bit_equal_over_calls_threads_and_batches

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import BlockPattern, _native
from sparse_stgcn.runtime.columns import strips_of
from sparse_stgcn.runtime.program import Entries
from sparse_stgcn.sparsity import maskable_convs

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def network(sparsity: float, block: str = "8x1", layout: str = "nturgb+d", **kwargs):
    """A small ST-GCN with batch norms that do something."""
    torch.manual_seed(0)
    model = sparse_stgcn.create_model("stgcn", num_classes=7, layout=layout, base_channels=16, **kwargs)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3), module.bias.data.normal_(0, 0.1)
    return sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, block)) if sparsity else model


def keypoint(batch: int, frames: int, joints: int = 25, persons: int = 2):
    return torch.randn(batch, persons, frames, joints, 3, generator=torch.Generator().manual_seed(1))


def assert_same(model, x, tolerance=2e-6):
    with torch.inference_mode():
        want = sparse_stgcn.densify(copy.deepcopy(model)).double().eval()(x.double())
    got = runtime.optimize(model, engine="fused")(x)
    assert isinstance(runtime.optimize(model), runtime.FusedRecognizer)
    assert ((got - want).abs().max() / want.abs().max()).item() <= tolerance
    return got


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("block", ["8x1", "4x1", "1x1", "4x4", "16x16", "3x5"])
def test_logits_equal_the_network(sparsity, block):
    assert_same(network(sparsity, block), keypoint(3, 20))


@pytest.mark.parametrize("block", ["8x1", "1x1", "2x1"])
@pytest.mark.parametrize("frames", [1, 2, 3, 16, 17, 37, 100, 150])
def test_any_clip_length(frames, block):
    assert_same(network(0.8, block), keypoint(2, frames))


@pytest.mark.parametrize("block", ["8x1", "1x1"])
@pytest.mark.parametrize(("layout", "joints"), [("coco", 17), ("openpose", 18), ("handmp", 21)])
def test_any_layout(layout, joints, block):
    assert_same(network(0.8, block, layout=layout), keypoint(2, 20, joints))


@pytest.mark.parametrize("persons", [1, 2, 5])
def test_any_number_of_persons(persons):
    assert_same(network(0.8), keypoint(2, 20, persons=persons))


@pytest.mark.parametrize("block", ["8x1", "1x1"])
def test_other_graphs(block):
    assert_same(network(0.8, block, graph="random", adaptive="init"), keypoint(2, 20))  # a dense adjacency
    assert_same(network(0.8, block, graph="random", adaptive="offset", num_subsets=5), keypoint(2, 20))


@pytest.mark.parametrize("block", ["8x1", "1x1"])
def test_absent_persons_are_computed_once_and_right(block):
    model, x = network(0.8, block), keypoint(6, 20)
    x[1, 1] = x[3, 0] = x[4, 1] = x[5] = 0
    assert_same(model, x)


@pytest.mark.parametrize("block", ["8x1", "1x1"])
def test_any_strides_of_the_input(block):
    model, x = network(0.8, block), keypoint(2, 20)
    wide = torch.full((2, 2, 40, 27, 4), float("nan"))
    wide[:, :, ::2, 1:-1, :3] = x
    fused = runtime.optimize(model, engine="fused")
    for view in (wide[:, :, ::2, 1:-1, :3], x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)):
        assert torch.equal(fused(view), fused(x))


def test_layers_of_different_blocks_in_one_network():
    """A strided block sums its temporal convolution and its residual: their blocks may differ."""
    model = sparse_stgcn.densify(network(0.0))
    for index, conv in enumerate(maskable_convs(model).values()):
        block = [(8, 1), (4, 1), (1, 1), (2, 3)][index % 4]
        rows, cols = -(-conv.shape_oik[0] // block[0]), -(-conv.shape_oik[1] // block[1])
        live = torch.rand(rows, cols, conv.shape_oik[2], generator=torch.Generator().manual_seed(index)) < 0.5
        conv.attach(BlockPattern.from_blocks(live, conv.shape_oik, block))
    assert_same(sparse_stgcn.compact(model), keypoint(2, 20))


def test_an_exact_zero_among_the_live_weights_is_a_weight():
    model = network(0.8)
    with torch.no_grad():
        for conv in maskable_convs(model).values():
            conv.values[::3] = 0
    assert_same(model, keypoint(2, 20))


def test_bit_equal_over_calls_threads_and_batches():
    assert_bit_equal_over_calls_threads_and_batches(runtime.optimize(network(0.9)), keypoint(5, 40))


def test_the_model_itself_is_left_alone():
    model = network(0.8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runtime.optimize(model, keypoint(2, 20))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_dtypes_run_as_they_are():
    model = sparse_stgcn.create_model("ctrgcn", num_classes=7, base_channels=16).double()
    x = keypoint(2, 16).double()
    with torch.inference_mode():
        torch.testing.assert_close(runtime.optimize(model)(x), model.eval()(x))


def test_bad_arguments_are_refused():
    fused = runtime.optimize(network(0.8))
    with pytest.raises(ValueError, match="keypoint with 25 joints"):
        fused(torch.zeros(1, 2, 10, 17, 3))
    with pytest.raises(TypeError, match="float32"):
        fused(keypoint(1, 10).double())
    with pytest.raises(TypeError, match="Recognizer"):
        runtime.optimize(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("frames", "joints", "multiple"), [(1, 25, 4), (20, 25, 4), (100, 25, 4), (37, 17, 1), (150, 40, 4)])
def test_strips_hold_the_clip_in_the_fewest_vectors(frames, joints, multiple):
    strips, length = strips_of(frames, joints, multiple)
    assert strips * length >= frames and length % multiple == 0
    assert -(-strips * joints // 16) * (length + 1) <= -(-joints // 16) * (-(-frames // multiple) * multiple + 1)


def test_a_clip_of_100_frames_of_25_joints_wastes_three_lanes_of_128():
    assert strips_of(100, 25, 4) == (5, 20)


def test_outputs_in_pairs_are_the_same_sums():
    pattern = BlockPattern.from_blocks(torch.rand(5, 7, 3) < 0.5, (5, 7, 3), (1, 1))
    row, column = pattern.rows.numpy(), (pattern.input.long() * 3 + pattern.tap).numpy()
    weight = torch.randn(pattern.num_blocks, 1).numpy()
    pairs = Entries(5, 1, [row], [], [], [weight], [column]).paired()
    dense, paired = np.zeros((6, 21)), np.zeros((6, 21))
    dense[row, column] = weight[:, 0]
    for o in range(2):
        paired[pairs.row[0] * 2 + o, pairs.offset[0]] = pairs.weight[0][:, o]
    assert np.array_equal(dense, paired) and pairs.bo == 2
