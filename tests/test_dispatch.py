"""The choice of a backend is a pure function, so the whole table is tested without any device."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparse_stgcn.kernels import backends, dispatch
from sparse_stgcn.kernels.dispatch import choose

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(("arguments", "backend", "fallback"), [
    ({"device": "cpu", "dtype": F32}, "native", False),
    ({"device": "cpu", "dtype": F64}, "native", False),
    ({"device": "cpu", "dtype": BF16}, "native", False),
    ({"device": "cpu", "dtype": torch.float16}, "reference", True),
    ({"device": "cpu", "dtype": F32, "native_available": False}, "reference", True),
    ({"device": "cpu", "dtype": F32, "adjacency_dims": 4}, "native", False),
    ({"device": "cpu", "dtype": F32, "adjacency_dims": 5}, "reference", True),
    ({"device": "cpu", "dtype": F32, "forced": "reference"}, "reference", False),
    ({"device": "cpu", "dtype": F32, "forced": "native"}, "native", False),
    ({"device": "cuda", "dtype": F32}, "reference", True),
    ({"device": "meta", "dtype": F32}, "reference", False),
], ids=lambda v: "-".join(str(x) for x in v.values()) if isinstance(v, dict) else "")
def test_table(arguments, backend, fallback):
    choice = choose("graph_conv", **arguments)
    assert (choice.backend, choice.fallback) == (backend, fallback)
    assert choice.reason


@pytest.mark.parametrize(("arguments", "message"), [
    ({"device": "cpu", "dtype": F32, "forced": "fast"}, "one of reference, native, triton, cuda"),
    ({"device": "cpu", "dtype": F32, "forced": "triton"}, "triton does not run on a CPU"),
    ({"device": "cpu", "dtype": torch.float16, "forced": "native"}, "not float16"),
    ({"device": "cpu", "dtype": F32, "forced": "native", "native_available": False}, "Got"),
], ids=["unknown", "triton", "dtype", "not built"])
def test_a_forced_backend_that_cannot_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose("temporal_conv", **arguments)


def test_every_backend_is_reported_with_a_reason():
    report = backends()
    assert set(report) == set(dispatch.BACKENDS)
    assert all(report.values())


@pytest.mark.parametrize("env", [{"SPARSE_STGCN_BACKEND": "reference"}, {"SPARSE_STGCN_ISA": "none-such"}], ids=str)
def test_the_package_works_on_the_reference_path(env):
    """Forced, or because the native module cannot be used: a network still trains."""
    code = ("import torch, sparse_stgcn; m = sparse_stgcn.create_model('stgcn', 3, base_channels=8); "
            "sparse_stgcn.compact(sparse_stgcn.sparsify(m, 0.5)); m(torch.randn(1, 1, 8, 25, 3)).sum().backward(); "
            "print(all(p.grad is not None for p in m.parameters()))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr
