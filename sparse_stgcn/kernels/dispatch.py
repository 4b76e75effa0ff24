"""Which backend runs an op: a pure function of device, dtype and pattern, in one table."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import _native

BACKENDS = ("reference", "native", "triton", "cuda")
BFLOAT16_OPS = ("temporal_conv", "graph_conv")  # on the CPU: stored in bfloat16, summed in float32


@dataclass(frozen=True)
class Choice:
    """A backend's name and why it was chosen. ``fallback`` marks a choice that a user did not expect."""

    backend: str
    reason: str
    fallback: bool = False


def choose(op: str, device: str, dtype: torch.dtype, *, adjacency_dims: int = 3, forced: str | None = None,
           native_available: bool = True) -> Choice:
    """The backend for ``op``: "temporal_conv", "graph_conv", "group_lasso", or an aggregation of dynamic.py or ctr.py.

    Raises:
        ValueError: ``forced`` (SPARSE_STGCN_BACKEND) is no backend, or cannot run the op on this device and dtype.
    """
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"Expected SPARSE_STGCN_BACKEND to be one of {', '.join(BACKENDS)}. Got {forced!r}.")
    if forced == "reference":
        return Choice("reference", "forced by SPARSE_STGCN_BACKEND")
    if device == "meta":
        return Choice("reference", "only shapes are computed")
    if device == "cpu":
        why_not = None
        if not native_available:
            why_not = _native.reason
        elif dtype not in (taken := (torch.float32, torch.float64) + ((torch.bfloat16,) if op in BFLOAT16_OPS else ())):
            names = [str(d).removeprefix("torch.") for d in (*taken, dtype)]
            why_not = f"the native {op} takes {', '.join(names[:-2])} and {names[-2]}, not {names[-1]}"
        elif adjacency_dims not in (3, 4):
            why_not = "the native graph_conv takes an adjacency (K, V, V) or (N, K, V, V)"
        if why_not is None and forced in (None, "native"):
            return Choice("native", f"CPU kernel ({_native.isa})")
        if why_not is None:
            why_not = f"{forced} does not run on a CPU"
    else:
        why_not = f"no {op} kernel for device {device} is enabled"
    if forced is not None:
        raise ValueError(f"Expected SPARSE_STGCN_BACKEND={forced} to be able to run {op}. Got: {why_not}; unset it.")
    return Choice("reference", why_not, fallback=True)


_warned: set[str] = set()


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Run the ops of this process on one backend, as SPARSE_STGCN_BACKEND does: ``reference`` is torch alone."""
    before = os.environ.get("SPARSE_STGCN_BACKEND")
    os.environ["SPARSE_STGCN_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("SPARSE_STGCN_BACKEND")
        if before is not None:
            os.environ["SPARSE_STGCN_BACKEND"] = before


def backend_for(op: str, device: torch.device, dtype: torch.dtype, adjacency_dims: int = 3) -> str:
    """choose() for this process; a fallback to the dense reference warns once per reason."""
    choice = choose(op, device.type, dtype, adjacency_dims=adjacency_dims,
                    forced=os.environ.get("SPARSE_STGCN_BACKEND") or None, native_available=_native.module is not None)
    if choice.fallback and choice.reason not in _warned:
        _warned.add(choice.reason)
        warnings.warn(f"sparse_stgcn.{op} runs on the dense PyTorch reference: {choice.reason}.", stacklevel=3)
    return choice.backend


def runs_natively(op: str, x: torch.Tensor) -> bool:
    """Whether the CPU kernel of ``op`` runs on x in this process: asked where torch's own layers are as good a fallback."""
    forced = os.environ.get("SPARSE_STGCN_BACKEND") or None
    return x.device.type == "cpu" and choose(
        op, "cpu", x.dtype, forced=forced, native_available=_native.module is not None).backend == "native"


def backends() -> dict[str, str]:
    """Each backend's name with "available ..." or the reason why it is not."""
    report = {"reference": "available (dense PyTorch, any device and dtype)", "native": _native.reason}
    idle = "the public ops do not use it in this version"
    try:
        import triton

        no_gpu = "no GPU is visible to torch"
        report["triton"] = f"triton {triton.__version__} is installed; {idle if torch.cuda.is_available() else no_gpu}"
    except ImportError as error:
        report["triton"] = f"triton is not installed ({error}); pip install triton"
    from . import cuda

    report["cuda"] = cuda.missing() or f"built; {idle}"
    return report
