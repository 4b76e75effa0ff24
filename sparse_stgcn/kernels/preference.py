"""Which GPU kernel runs where both Triton and CUDA can: plain data, decided by the static model's predicted times.

A prediction, not a measurement: benchmark/gpu_model.py counts what each kernel moves and computes, and tests/test_gpu_model.py
checks that this table is what it says for the shapes of ST-GCN. SPARSE_STGCN_BACKEND overrides it.
"""
from __future__ import annotations

import torch

ARITHMETIC = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half"}

DEFAULT = {
    ("temporal_conv", "forward"): "cuda",
    ("temporal_conv", "dX"): "cuda",
    ("temporal_conv", "dW"): "cuda",
    ("graph_conv", "forward"): "cuda",
    ("graph_conv", "dX"): "triton",
    ("graph_conv", "dW"): "triton",
}
"""(op, direction) -> kernel."""

EXCEPTIONS: dict[tuple[str, str, str, str], str] = {}
"""(op, direction, arithmetic, kind of block) -> kernel, where it is not the default."""


def kind_of(block: tuple[int, int]) -> str:
    """"cover" for blocks with fewer outputs than the matrix unit's 8, "vector" for one input, else "square"."""
    return "cover" if block[0] < 8 else "vector" if block[1] == 1 else "square"


def faster(capability: int, op: str, direction: str, arithmetic: str, block: tuple[int, int]) -> str:
    """"triton" or "cuda", for a compute capability such as 80 or 90; cards later than 9.0 have Triton's own instructions."""
    return EXCEPTIONS.get((op, direction, arithmetic, kind_of(block)), DEFAULT[op, direction])
