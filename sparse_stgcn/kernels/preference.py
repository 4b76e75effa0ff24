"""Which GPU kernel runs where both Triton and CUDA can: plain data, decided by the static model's predicted times.

A prediction, not a measurement: benchmark/gpu_model.py counts what each kernel moves and issues, results/gpu_model_*.json holds
the outcome at the shapes of ST-GCN, and tests/test_gpu_model.py checks that this table is what they say (the smaller geometric
mean over shapes and sparsities). SPARSE_STGCN_BACKEND overrides it.
"""
from __future__ import annotations

import torch

ARITHMETIC = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half"}

TRITON = frozenset({
    ("ampere", "graph_conv", "dW", "float32", "cover"),
    ("ampere", "graph_conv", "dW", "float32", "square"),
    ("ampere", "graph_conv", "dW", "float32", "vector"),
    ("ampere", "graph_conv", "dW", "tf32", "square"),
    ("ampere", "graph_conv", "dX", "tf32", "square"),
    ("ampere", "temporal_conv", "dW", "float32", "cover"),
    ("ampere", "temporal_conv", "dW", "float32", "square"),
    ("ampere", "temporal_conv", "dW", "float32", "vector"),
    ("hopper", "graph_conv", "dW", "tf32", "square"),
    ("hopper", "graph_conv", "dX", "tf32", "square"),
    ("hopper", "temporal_conv", "dW", "float32", "cover"),
    ("hopper", "temporal_conv", "dW", "float32", "square"),
})
"""(family, op, direction, arithmetic, kind of block) for which Triton's kernel is predicted faster; CUDA's is for all others.
Cards later than Hopper have no prediction and use Hopper's."""


def kind_of(block: tuple[int, int]) -> str:
    """"cover" for blocks with fewer outputs than the matrix unit's 8, "vector" for one input, else "square"."""
    return "cover" if block[0] < 8 else "vector" if block[1] == 1 else "square"


def faster(capability: int, op: str, direction: str, arithmetic: str, block: tuple[int, int]) -> str:
    """"triton" or "cuda", for a compute capability such as 80 or 90."""
    family = "ampere" if capability < 90 else "hopper"
    return "triton" if (family, op, direction, arithmetic, kind_of(block)) in TRITON else "cuda"
