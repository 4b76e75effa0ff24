"""Loads the CUDA module that g++ built against emulate.h, and puts it in the place of the real one.

tests/test_cuda_emulation.py builds it and starts this suite in a process of its own, under AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from sparse_stgcn.kernels import cuda


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    path = os.environ["SPARSE_STGCN_EMULATED"]
    # pybind11 keeps modules by their full name: each file has a name of its own
    spec = importlib.util.spec_from_file_location(f"emulated_{abs(hash(path))}._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_place(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated module, on buffers that start as NaN: what is not written, or read too early, shows."""
    torch.use_deterministic_algorithms(True)  # torch fills new tensors with NaN, or the largest integer
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(cuda, "module", emulated)
    cuda._launch.cache_clear()
    cuda._device.cache_clear()


@pytest.fixture
def thread_order(emulated: ModuleType) -> Callable[[str, int], None]:
    """Chooses the order in which the threads of the next launches run."""
    library = ctypes.CDLL(os.environ["SPARSE_STGCN_EMULATED"])

    def choose(order: str, seed: int = 0) -> None:
        library.emulate_order(["forward", "reversed", "shuffled"].index(order), seed)

    return choose
