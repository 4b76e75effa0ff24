"""ST-GCN, inference and a training step, sparse against dense. 2 samples x 2 persons, T = 64, V = 25, 60 classes.

`python -m sparse_stgcn.bench` measures larger batches, paired, against the other dense engines too.
"""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import sparse_stgcn
from sparse_stgcn.benchmark.measure import check

LEVELS = [0.0, 0.8, 0.95, 0.99]


def network(sparsity: float):
    torch.manual_seed(0)
    model = sparse_stgcn.create_model("stgcn", num_classes=60)
    return sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity)) if sparsity else model


def keypoint():
    return torch.randn(2, 2, 64, 25, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sparsity", LEVELS)
def bench_inference(checked, sparsity):
    model, x = network(sparsity).eval(), keypoint()
    dense = sparse_stgcn.densify(copy.deepcopy(model)).double() if sparsity else copy.deepcopy(model).double()

    def run(model=model, x=x):
        with torch.inference_mode():
            return model(x)

    checked(run, lambda: run(dense, x.double()))


def step(model, x, optimizer, parameter):
    """Forward, backward and SGD; returns the gradient of a parameter."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.tensor([3, 7])).backward()
    optimizer.step()
    return dict(model.named_parameters())[parameter].grad.clone()


@pytest.mark.parametrize("sparsity", LEVELS)
def bench_training_step(checked, sparsity):
    """Checked twice. In float64 the first layer's gradient, through the whole network; in float32, where a ReLU near 0
    may fall on its other side and change early gradients by 1e-3 in any implementation, the classifier's."""
    model, x, first, last = network(sparsity).train(), keypoint(), "backbone.data_bn.weight", "cls_head.fc_cls.weight"
    double = copy.deepcopy(model).double()
    dense = sparse_stgcn.densify(copy.deepcopy(double)) if sparsity else copy.deepcopy(double)
    frozen = {m: torch.optim.SGD(m.parameters(), lr=0.0) for m in (double, dense)}
    check("float64 step", step(double, x.double(), frozen[double], first), step(dense, x.double(), frozen[dense], first), 1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    checked(lambda: step(model, x, optimizer, last), lambda: step(dense, x.double(), frozen[dense], last), tolerance=1e-5)
