from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

import sparse_stgcn
from sparse_stgcn.benchmark import memory
from sparse_stgcn.benchmark.memory import StepMemory, peak_memory
from sparse_stgcn.training import auto_batch

SMALL = {"batch": 2, "persons": 1, "threads": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
def test_a_sparse_step_needs_less_memory_than_a_dense_one():
    dense, sparse = (peak_memory(StepMemory(sparsity=s, plain=not s, frames=64, **SMALL)) for s in (0, 0.95))
    assert 0 < sparse < dense


def test_memory_grows_with_the_batch():
    small, large = (peak_memory(StepMemory(frames=64, **{**SMALL, "batch": batch})) for batch in (2, 8))
    assert large > 2 * small


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux reports it")
@pytest.mark.parametrize("backbone, sparsity", [("stgcn", 0.95), pytest.param("dgstgcn", 0.0, marks=pytest.mark.slow)])
def test_a_batch_that_is_said_to_fit_does(backbone, sparsity):
    """--auto-batch counts tensors; what the step really needs is at most that, and not less than half."""
    model = sparse_stgcn.create_model(backbone, num_classes=60)
    if sparsity:
        model = sparse_stgcn.compact(sparse_stgcn.sparsify(model, sparsity, (8, 1)))
    counted = auto_batch.step_memory(model, (2, 64, 25, 3))
    needed = peak_memory(StepMemory(backbone, sparsity, frames=64, batch=4, threads=1))
    assert needed <= 1.05 * (counted.fixed + 4 * counted.each) and needed >= 0.5 * (counted.fixed + 4 * counted.each)


def test_plain_is_torch_alone_however_it_is_asked_for(monkeypatch):
    """The command, too: it once ran the native layers, which need half as much, and called that torch's."""
    said, real, name = [], sparse_stgcn.create_model, "SPARSE_STGCN_BACKEND"
    monkeypatch.setattr(sparse_stgcn, "create_model", lambda *a: said.append(os.environ.get(name)) or real(*a))
    monkeypatch.delenv(name, raising=False)
    for plain in (True, False):
        memory._measure(StepMemory(sparsity=0, plain=plain, frames=4, classes=5, steps=1, **SMALL))
    assert said == ["reference", None] and name not in os.environ


def test_errors():
    with pytest.raises(RuntimeError, match="Expected name to be one of"):
        peak_memory(StepMemory(backbone="none-such"))
    with pytest.raises(ValueError, match="plain only"):
        peak_memory(StepMemory(plain=True))


FAULTS = """
import resource, torch
from sparse_stgcn.training.memory import keep_freed_memory
if {keep}: assert keep_freed_memory()
for turn in range(32):
    if turn == 12: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 * 2**20 // 4).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_fetched_again():
    """Twenty tensors of 40 MB one after the other: 10,240 pages each, fetched anew, or the same ones every time.

    What is larger than 32 MB glibc returns whatever was freed before (DEFAULT_MMAP_THRESHOLD_MAX). The tensors before
    them touch the heap that was reserved, of which each lies a little further on, for the first time.
    """
    returned, kept = (int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True,
                                         check=True).stdout) for keep in (False, True))
    assert kept < 200 and returned >= 20 * 10_240
