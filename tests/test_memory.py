from __future__ import annotations

import sys

import pytest

from sparse_stgcn.benchmark.memory import StepMemory, peak_memory
from sparse_stgcn.training.memory import keep_freed_memory

SMALL = {"batch": 2, "persons": 1, "threads": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
def test_a_sparse_step_needs_less_memory_than_a_dense_one():
    dense, sparse = (peak_memory(StepMemory(sparsity=s, plain=not s, frames=64, **SMALL)) for s in (0, 0.95))
    assert 0 < sparse < dense


def test_memory_grows_with_the_batch():
    small, large = (peak_memory(StepMemory(frames=64, **{**SMALL, "batch": batch})) for batch in (2, 8))
    assert large > 2 * small


def test_errors():
    with pytest.raises(RuntimeError, match="Expected name to be one of"):
        peak_memory(StepMemory(backbone="none-such"))
    with pytest.raises(ValueError, match="plain only"):
        peak_memory(StepMemory(plain=True))


def test_keep_freed_memory_says_whether_it_can():
    assert keep_freed_memory() in (True, False)
