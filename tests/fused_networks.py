"""Networks for the tests of the fused programs: batch norms, graph scales and coefficients that do something.

Errors are compared with 2e-6, so the networks have to be ones that float32 can compute to 1e-6. CTR-GCN gets the statistics of
a batch into its batch norms: without, its activations grow from block to block, and so do the differences that go into tanh.
With them, the temporal unit of DG-STGCN would divide by small deviations; where that is used, they are random.
"""
from __future__ import annotations

import copy

import torch

import sparse_stgcn
from sparse_stgcn import runtime
from sparse_stgcn.kernels import BlockPattern
from sparse_stgcn.sparsity import maskable_convs


def network(name: str, sparsity: float, block: str = "8x1", layout: str = "nturgb+d", **kwargs):
    """A small network without a parameter at a value that would hide a mistake; compact if ``sparsity`` is not 0."""
    torch.manual_seed(0)
    model = sparse_stgcn.create_model(name, num_classes=7, layout=layout, **{"base_channels": 16, **kwargs})
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3), module.bias.data.normal_(0, 0.1)
    for key, parameter in model.named_parameters():
        if key.rsplit(".", 1)[-1] in ("alpha", "beta", "add_coeff"):
            parameter.data.uniform_(0.2, 0.5)
    if sparsity:
        model = sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, block))
    return settled(model)


def settled(model):
    """The model; a CTR-GCN with the statistics of a batch in its batch norms."""
    if model.config["name"] != "ctrgcn" or model.config["kwargs"].get("temporal") == "mixed":
        return model
    norms = [module for module in model.modules() if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(keypoint(4, 24, len(model.backbone.skeleton), model.backbone.num_person, seed=2))
    return model


def mixed_blocks(model):
    """Every convolution of a dense model in a block shape of its own, half of the blocks live."""
    for index, conv in enumerate(maskable_convs(model).values()):
        block = [(8, 1), (4, 1), (1, 1), (2, 3), (16, 16)][index % 5]
        rows, cols = -(-conv.shape_oik[0] // block[0]), -(-conv.shape_oik[1] // block[1])
        live = torch.rand(rows, cols, conv.shape_oik[2], generator=torch.Generator().manual_seed(index)) < 0.5
        conv.attach(BlockPattern.from_blocks(live, conv.shape_oik, block))
    return settled(sparse_stgcn.compact(model))


def chain(joints: int):
    """A skeleton of joints in a row."""
    return {"name": "chain", "joints": [f"joint {v}" for v in range(joints)], "edges": [[v, v - 1] for v in range(1, joints)],
            "root": 0}


def keypoint(batch: int, frames: int, joints: int = 25, persons: int = 2, seed: int = 1):
    return torch.randn(batch, persons, frames, joints, 3, generator=torch.Generator().manual_seed(seed))


def assert_same(model, x, tolerance=2e-6):
    """optimize(model) compiles it, and its logits are those of the densified model in float64."""
    with torch.inference_mode():
        want = sparse_stgcn.densify(copy.deepcopy(model)).double().eval()(x.double())
    fused = runtime.optimize(model, engine="fused")
    assert isinstance(fused, runtime.FusedRecognizer)
    got = fused(x)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= tolerance, error
    return got


def assert_bit_equal_over_calls_threads_and_batches(fused, x):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(fused(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    fused(torch.full_like(x, 1e30))  # stale values of another clip must not be seen
    hurt = x.clone()
    hurt[1, 0, 2, 1, 1] = float("nan")  # one lost joint that nobody filled: no answer for its sample, the others as they were
    answer = fused(hurt)
    assert answer[1].isnan().all() and torch.equal(answer[2:], results[0][2:]) and torch.equal(answer[0], results[0][0])
    fused(x[:1, :, :13])
    again = fused(x)
    assert torch.equal(again, results[0])
    assert torch.equal(fused(x[:1]), again[:1])
