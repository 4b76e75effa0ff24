"""How a program uses the public names, for a type checker: ``mypy --strict tests/typed_use.py``. Nothing runs it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sparse_stgcn
from sparse_stgcn import Archive, BlockPattern, Ensemble, Recognizer, Skeleton


def train_and_save(path: Path) -> int:
    skeleton = Skeleton(name="arm", joints=("chest", "hand"), edges=((1, 0),), root=0)
    model = sparse_stgcn.create_model("stgcn", num_classes=4, layout=skeleton)
    assert_type(model, Recognizer)
    assert_type(sparse_stgcn.sparsify(model, 0.95, block=(8, 1), method="nested", seed=1), nn.Module)
    assert_type(sparse_stgcn.compact(model), nn.Module)
    return sparse_stgcn.save(model, path, dtype="float16", coding="index", label_names=["a", "b"])


def predict(path: Path, keypoint: Tensor) -> nn.Module:
    network: Recognizer = sparse_stgcn.load(path, device="cpu")
    both = Ensemble([network, network])
    assert_type(both.num_classes, int)
    return sparse_stgcn.optimize(both, example=keypoint)


def kernels(x: Tensor) -> Tensor:
    from sparse_stgcn.kernels import temporal_conv

    pattern = BlockPattern.full((8, x.shape[1], 3))
    assert_type(pattern.density, float)
    return temporal_conv(x, torch.zeros(pattern.values_shape), pattern, stride=2)


def data(path: Path) -> tuple[str, ...]:
    archive = Archive.open(path)
    assert_type(archive, Archive)
    return archive.label_names
