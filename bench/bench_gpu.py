"""The GPU kernels against cuDNN (eager, channels_last) and torch.compile on a real card, forward, dX and dW.

    pytest bench/ --benchmark-only -m gpu

writes results/bench_gpu_<card>.json with the card's name, the measured times and the static model's predictions beside them.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_stgcn.benchmark import gpu_speed
from sparse_stgcn.benchmark.gpu_speed import Measured, Product
from sparse_stgcn.benchmark.networks import Pattern

PATTERNS = [Pattern(level, block) for block in ("8x1", "16x16", "1x1") for level in (0.8, 0.95, 0.99)]


@pytest.fixture(scope="module")
def table() -> Iterator[list[Measured]]:
    rows: list[Measured] = []
    yield rows
    if rows:
        card = re.sub(r"\W+", "_", gpu_speed.card_name("cuda").lower())
        gpu_speed.write(Path(__file__).resolve().parent.parent / "results" / f"bench_gpu_{card}.json", "cuda", rows)


@pytest.mark.gpu
@pytest.mark.parametrize("product", gpu_speed.products(), ids=lambda p: f"{p.op}-{p.direction}-{p.arithmetic}-{p.channels}")
def bench_product(benchmark, table, product: Product):
    """pytest-benchmark's own figure is ours at 0.95 in blocks (8, 1), with the wait for the card."""
    rows = gpu_speed.measure(product, PATTERNS, "cuda")
    table.extend(rows)
    benchmark.extra_info.update(error=max(row.error for row in rows), rows=len(rows), card=gpu_speed.card_name("cuda"))
    import torch

    case = gpu_speed.Case(product, "cuda")
    with gpu_speed.arithmetic_of(product.arithmetic):
        run = case.sparse(gpu_speed.draw(product.shape, Pattern(0.95, "8x1")).to("cuda"))
        benchmark(lambda: (run(), torch.cuda.synchronize()))
