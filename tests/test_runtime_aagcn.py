"""The fused AA-GCN against the network itself in float64."""
from __future__ import annotations

import copy

import pytest
import torch
from fused_networks import assert_bit_equal_over_calls_threads_and_batches

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import BlockPattern, _native
from sparse_stgcn.sparsity import maskable_convs

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def network(sparsity: float, block: str = "8x1", layout: object = "nturgb+d", base: int = 16, **kwargs):
    """A small AA-GCN whose graphs depend on the sample and whose gates are open to different degrees."""
    torch.manual_seed(0)
    model = sparse_stgcn.create_model("aagcn", num_classes=7, layout=layout, base_channels=base, **kwargs)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.normal_(0, 0.2)
        elif any(f".{layer}." in name for layer in ("conv_ta", "conv_sa", "fc1c", "fc2c")):
            parameter.data.normal_(0, 0.5 / parameter[0].numel() ** 0.5)
        elif "bn.weight" in name:
            parameter.data.uniform_(0.7, 1.3)
    if sparsity:
        model = sparse_stgcn.densify(sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, block)))
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.momentum = None  # statistics are the mean over the batches
            module.bias.data.normal_(0, 0.1)
    with torch.no_grad():
        model.train()(keypoint(4, 12, len(model.backbone.skeleton), model.backbone.num_person))
    return sparse_stgcn.compact(model) if sparsity else model


def keypoint(batch: int, frames: int, joints: int = 25, persons: int = 2):
    return torch.randn(batch, persons, frames, joints, 3, generator=torch.Generator().manual_seed(1))


def assert_same(model, x):
    """Within 2e-6 of the network in float64, or 4 times what the same network loses in torch's float32."""
    dense = sparse_stgcn.densify(copy.deepcopy(model)).eval()
    with torch.inference_mode():
        rounded, want = dense(x), dense.double()(x.double())
    fused = runtime.optimize(model, engine="fused")
    assert isinstance(fused, runtime.FusedRecognizer)
    got, lost = (((y - want).abs().max() / want.abs().max()).item() for y in (fused(x), rounded))
    assert got <= max(2e-6, 4 * lost)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.95, 0.99])
@pytest.mark.parametrize("block", ["8x1", "4x1", "1x1", "4x4", "16x16"])
def test_logits_equal_the_network(sparsity, block, attention):
    assert_same(network(sparsity, block, attention=attention), keypoint(3, 20))


def test_full_width():
    assert_same(network(0.95, base=64), keypoint(1, 100))


@pytest.mark.parametrize("frames", [1, 2, 3, 16, 17, 37, 100])
def test_any_clip_length(frames):
    assert_same(network(0.8), keypoint(2, frames))


def chain(joints: int) -> sparse_stgcn.Skeleton:
    return sparse_stgcn.Skeleton(name="chain", joints=tuple(f"joint{v}" for v in range(joints)),
                                 edges=tuple((v + 1, v) for v in range(joints - 1)), root=0)


@pytest.mark.parametrize("joints", [2, 15, 16, 17, 20, 33, 50])
def test_any_number_of_joints(joints):
    assert_same(network(0.8, layout=chain(joints)), keypoint(2, 21, joints))


@pytest.mark.parametrize("persons", [1, 2, 3])
def test_every_person_has_its_input_norm(persons):
    assert_same(network(0.8, num_person=persons), keypoint(2, 20, persons=persons))


def test_absent_persons_are_computed_once_a_place_and_right():
    model, x = network(0.8), keypoint(6, 20)
    x[1, 1] = x[3, 0] = x[4, 1] = x[5] = 0
    assert_same(model, x)


def test_other_graphs():
    assert_same(network(0.8, graph="random", num_subsets=5), keypoint(2, 20))


def test_embeddings_of_different_blocks():
    model = sparse_stgcn.densify(network(0.0))
    for index, conv in enumerate(maskable_convs(model).values()):
        block = [(8, 1), (4, 1), (1, 1), (2, 3)][index % 4]
        rows, cols = -(-conv.shape_oik[0] // block[0]), -(-conv.shape_oik[1] // block[1])
        live = torch.rand(rows, cols, conv.shape_oik[2], generator=torch.Generator().manual_seed(index)) < 0.5
        conv.attach(BlockPattern.from_blocks(live, conv.shape_oik, block))
    assert_same(sparse_stgcn.compact(model), keypoint(2, 20))


def test_bit_equal_over_calls_threads_and_batches():
    assert_bit_equal_over_calls_threads_and_batches(runtime.optimize(network(0.9)), keypoint(5, 40))
