"""Which GPU kernel runs where both Triton and CUDA can: plain data, decided by the static model's predicted times.

A prediction, not a measurement: benchmark/gpu_model.py counts what each kernel moves and issues, results/gpu_model_*.json holds
the outcome at the shapes of ST-GCN, and tests/test_gpu_model.py checks that this table is what they say (the smaller geometric
mean over the shapes, and over the sparsities of a level). SPARSE_STGCN_BACKEND overrides it.
"""
from __future__ import annotations

import torch

ARITHMETIC = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half"}

LEVELS = {"sparsest": 0.03, "sparse": 0.1, "dense": 1.0}
"""The largest density of each level: launches and traffic weigh more in the first ones, products in the last."""

TRITON = frozenset({
    ("ampere", "graph_conv", "dX", "tf32", "square", "dense"),
    ("ampere", "graph_conv", "dX", "tf32", "square", "sparse"),
    ("ampere", "graph_conv", "dX", "tf32", "square", "sparsest"),
    ("ampere", "graph_conv", "dX", "tf32", "vector", "sparsest"),
    ("ampere", "graph_conv", "forward", "tf32", "square", "sparse"),
    ("ampere", "temporal_conv", "dW", "float32", "square", "sparsest"),
    ("ampere", "temporal_conv", "dW", "tf32", "vector", "sparsest"),
    ("ampere", "temporal_conv", "dX", "half", "square", "sparsest"),
    ("ampere", "temporal_conv", "dX", "tf32", "square", "sparse"),
    ("ampere", "temporal_conv", "dX", "tf32", "square", "sparsest"),
    ("ampere", "temporal_conv", "forward", "float32", "vector", "sparsest"),
    ("ampere", "temporal_conv", "forward", "half", "square", "sparse"),
    ("ampere", "temporal_conv", "forward", "half", "square", "sparsest"),
    ("ampere", "temporal_conv", "forward", "half", "vector", "sparsest"),
    ("ampere", "temporal_conv", "forward", "tf32", "square", "sparse"),
    ("ampere", "temporal_conv", "forward", "tf32", "square", "sparsest"),
    ("ampere", "temporal_conv", "forward", "tf32", "vector", "sparsest"),
    ("hopper", "graph_conv", "dX", "tf32", "square", "sparse"),
    ("hopper", "graph_conv", "dX", "tf32", "square", "sparsest"),
    ("hopper", "graph_conv", "dX", "tf32", "vector", "sparsest"),
    ("hopper", "temporal_conv", "dW", "float32", "square", "sparsest"),
    ("hopper", "temporal_conv", "dW", "tf32", "square", "sparsest"),
    ("hopper", "temporal_conv", "dW", "tf32", "vector", "sparsest"),
    ("hopper", "temporal_conv", "dX", "half", "square", "sparse"),
    ("hopper", "temporal_conv", "dX", "half", "square", "sparsest"),
    ("hopper", "temporal_conv", "dX", "tf32", "square", "sparse"),
    ("hopper", "temporal_conv", "dX", "tf32", "square", "sparsest"),
    ("hopper", "temporal_conv", "forward", "float32", "vector", "sparsest"),
    ("hopper", "temporal_conv", "forward", "half", "square", "sparse"),
    ("hopper", "temporal_conv", "forward", "half", "square", "sparsest"),
    ("hopper", "temporal_conv", "forward", "half", "vector", "sparsest"),
    ("hopper", "temporal_conv", "forward", "tf32", "square", "sparse"),
    ("hopper", "temporal_conv", "forward", "tf32", "square", "sparsest"),
    ("hopper", "temporal_conv", "forward", "tf32", "vector", "sparsest"),
})
"""(family, op, direction, arithmetic, kind of block, level of density) for which Triton's kernel is predicted faster; CUDA's is
for all others. Cards later than Hopper have no prediction and use Hopper's."""


def kind_of(block: tuple[int, int]) -> str:
    """"cover" for blocks with fewer outputs than the matrix unit's 8, "vector" for one input, else "square"."""
    return "cover" if block[0] < 8 else "vector" if block[1] == 1 else "square"


def level_of(density: float) -> str:
    """The name of the level in LEVELS."""
    return next((level for level, most in LEVELS.items() if density <= most), "dense")


def faster(capability: int, op: str, direction: str, arithmetic: str, block: tuple[int, int], density: float = 1.0) -> str:
    """"triton" or "cuda", for a compute capability such as 80 or 90. density: share of the weights that is live."""
    family = "ampere" if capability < 90 else "hopper"
    return "triton" if (family, op, direction, arithmetic, kind_of(block), level_of(density)) in TRITON else "cuda"
