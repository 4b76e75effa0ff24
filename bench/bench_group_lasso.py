"""The group lasso over all maskable weights of ST-GCN, value and gradient: native against autograd of the formula."""
from __future__ import annotations

import pytest
import torch

import sparse_stgcn
from sparse_stgcn.kernels import group_lasso, reference
from sparse_stgcn.sparsity import block_of, maskable_convs


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = sparse_stgcn.sparsify(sparse_stgcn.create_model("stgcn", num_classes=60), 0.95)
    convs = maskable_convs(model)
    weights = [conv.weight for conv in convs.values()]
    return convs, weights, [conv.pattern for conv in convs.values()], [block_of(name) for name in convs]


def gradient(op, network):
    convs, weights, patterns, groups = network
    value = op([conv.weight_oik() for conv in convs.values()], patterns, groups)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])


@pytest.mark.parametrize("op", [group_lasso, reference.group_lasso], ids=["native", "torch"])
def bench_value_and_gradient(checked, network, op):
    checked(lambda: gradient(op, network), lambda: gradient(reference.group_lasso, network), tolerance=1e-5)
