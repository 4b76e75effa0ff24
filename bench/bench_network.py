"""Inference through ``optimize`` of every backbone, sparse against dense. 2 samples x 2 persons, T = 64, V = 25, 60 classes.

`python -m sparse_stgcn.bench --backbones NAME` measures larger batches, paired, against the other dense engines too.
"""
from __future__ import annotations

import copy

import pytest
import torch

import sparse_stgcn
from sparse_stgcn.backbones import BACKBONES


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("backbone", list(BACKBONES))
def bench_optimized(checked, backbone, sparsity):
    torch.manual_seed(0)
    model = sparse_stgcn.create_model(backbone, num_classes=60)
    if sparsity:
        model = sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity))
    x = torch.randn(2, 2, 64, 25, 3, generator=torch.Generator().manual_seed(1))
    double = sparse_stgcn.densify(copy.deepcopy(model)).double().eval()
    fused = sparse_stgcn.optimize(model, x, engine="fused")

    def reference():
        with torch.inference_mode():
            return double(x.double())

    checked(lambda: fused(x), reference)
