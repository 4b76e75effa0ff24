"""Which backend runs an op: a pure function of device, dtype, pattern, shape and what is installed, in one table."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import _native, preference

BACKENDS = ("reference", "native", "triton", "cuda")
BFLOAT16_OPS = ("temporal_conv", "graph_conv")  # on the CPU: stored in bfloat16, summed in float32
GPU_OPS = ("temporal_conv", "graph_conv")
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """A backend's name and why it was chosen. ``fallback`` marks a choice that a user did not expect."""

    backend: str
    reason: str
    fallback: bool = False


@dataclass(frozen=True)
class Gpu:
    """What can run on a GPU. capability: 90 for 9.0; triton, cuda: None, or why these kernels cannot run there."""

    capability: int
    triton: str | None = None
    cuda: str | None = None


@dataclass(frozen=True)
class Product:
    """One product of an op, as far as the choice of a kernel depends on it.

    direction: "forward", "dX" (for graph_conv with the gradient of the adjacency) or "dW".
    adjacency_dims: 3 shared, 4 per sample, 5 per channel. cuda: why the CUDA kernels refuse its size, or None.
    """

    op: str
    direction: str = "forward"
    block: tuple[int, int] = (8, 1)
    adjacency_dims: int = 3
    vertices: int = 25
    arithmetic: str | None = None  # "float32", "tf32" or "half"; None: that of the dtype, in IEEE float32
    cuda: str | None = None
    density: float = 1.0  # share of the weights that is live


def choose(op: str, device: str, dtype: torch.dtype, *, adjacency_dims: int = 3, forced: str | None = None,
           native_available: bool = True, gpu: Gpu | None = None, product: Product | None = None) -> Choice:
    """The backend for ``op``: "temporal_conv", "graph_conv", "group_lasso", or an aggregation of dynamic.py or ctr.py.

    On a GPU, ``gpu`` says what can run there, and ``product`` which product of which shape it is to be.

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
            why_not = f"the native {op} takes {_names(taken)}, not {_name(dtype)}"
        elif adjacency_dims not in (3, 4):
            why_not = "the native graph_conv takes an adjacency (K, V, V) or (N, K, V, V)"
        if why_not is None and forced in (None, "native"):
            return Choice("native", f"CPU kernel ({_native.isa})")
        if why_not is None:
            why_not = f"{forced} does not run on a CPU"
    elif device == "cuda" and op in GPU_OPS and forced != "native":
        product = product or Product(op, adjacency_dims=adjacency_dims)
        refusals = gpu_refusals(dtype, gpu, product)
        names = [name for name in ("triton", "cuda") if refusals[name] is None and forced in (None, name)]
        if len(names) == 1:
            other = "cuda" if names[0] == "triton" else "triton"
            return Choice(names[0], "forced by SPARSE_STGCN_BACKEND" if forced else f"not {other}: {refusals[other]}")
        if names:
            arithmetic = product.arithmetic or preference.ARITHMETIC[dtype]
            asked = (op, product.direction, arithmetic, product.block, product.density)
            return Choice(preference.faster(gpu.capability, *asked),  # type: ignore[union-attr]
                          "predicted to be the faster one by the static model; not measured")
        why_not = refusals[forced] if forced else "; ".join(dict.fromkeys(r for r in refusals.values() if r))
    else:
        why_not = f"native does not run on {device}" if forced == "native" else f"there is no {op} kernel for device {device}"
    if forced is not None:
        raise ValueError(f"Expected SPARSE_STGCN_BACKEND={forced} to be able to run {op}. Got: {why_not}; unset it.")
    return Choice("reference", str(why_not), fallback=True)


def gpu_refusals(dtype: torch.dtype, gpu: Gpu | None, product: Product) -> dict[str, str | None]:
    """Why the Triton and the CUDA kernels cannot run a product, or None where they can."""
    if dtype not in GPU_DTYPES:
        return dict.fromkeys(("triton", "cuda"), f"the GPU kernels take {_names(GPU_DTYPES)}, not {_name(dtype)}")
    if gpu is None:
        return dict.fromkeys(("triton", "cuda"), "no GPU is visible to torch")
    if gpu.capability < 80:
        old = f"the GPU kernels need compute capability 8.0, not {gpu.capability // 10}.{gpu.capability % 10}"
        return dict.fromkeys(("triton", "cuda"), old)
    triton, most = gpu.triton, 64 if product.adjacency_dims < 5 else 32
    if triton is None and product.op == "graph_conv" and product.vertices > most:
        per_channel = " with an adjacency per channel" if product.adjacency_dims == 5 else ""
        triton = f"the Triton graph_conv takes up to {most} vertices{per_channel}, not {product.vertices}"
    return {"triton": triton, "cuda": gpu.cuda or product.cuda}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = map(_name, dtypes)
    return f"{', '.join(most)} and {last}"


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


def backend_for(op: str, device: torch.device, dtype: torch.dtype, adjacency_dims: int = 3, vertices: int = 25) -> str:
    """choose() for this process: "reference", or the backend of the forward pass; a fallback warns once per reason.

    A GPU kernel that refuses one size is found out where the op runs, see gpu.py: it may differ between the products.
    """
    gpu = gpu_of(device)
    if device.type == "cpu" and gpu is None:
        return _warn(op, _on_cpu(op, dtype, adjacency_dims))
    product = Product(op, adjacency_dims=adjacency_dims, vertices=vertices)
    choice = choose(op, device.type, dtype, adjacency_dims=adjacency_dims, forced=_forced(),
                    native_available=_native.module is not None, gpu=gpu, product=product)
    return _warn(op, choice)


_chosen: dict[tuple[str, torch.dtype, int, str | None, bool], Choice] = {}


def _on_cpu(op: str, dtype: torch.dtype, adjacency_dims: int = 3) -> Choice:
    """choose() for this process and a CPU, which a training step asks some hundred times."""
    key = op, dtype, adjacency_dims, _forced(), _native.module is not None
    choice = None if torch.compiler.is_compiling() else _chosen.get(key)
    if choice is None:
        choice = choose(op, "cpu", dtype, adjacency_dims=adjacency_dims, forced=key[3], native_available=key[4])
        if not torch.compiler.is_compiling():
            _chosen[key] = choice
    return choice


def backend_of_product(product: Product, device: torch.device, dtype: torch.dtype) -> str:
    """"triton" or "cuda" for one product of one size, "reference" (with a warning) where neither takes it."""
    return _warn(product.op, choose(product.op, "cuda", dtype, forced=_forced(), gpu=gpu_of(device), product=product))


def _forced() -> str | None:
    return os.environ.get("SPARSE_STGCN_BACKEND") or None


def _warn(op: str, choice: Choice) -> str:
    # A warning breaks the graph of torch.compile; what is traced may warn when it runs uncompiled.
    if choice.fallback and choice.reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(choice.reason)
        warnings.warn(f"sparse_stgcn.{op} runs on the dense PyTorch reference: {choice.reason}.", stacklevel=4)
    return choice.backend


def gpu_of(device: torch.device) -> Gpu | None:
    """What can run on the GPU that is ``device``, or None."""
    return gpu_at(device.index or 0) if device.type == "cuda" else None


def gpu_at(index: int) -> Gpu | None:
    """What can run on a GPU of this process, or None where torch sees no such GPU."""
    return _gpu_at(index)


# What torch.compiler.assume_constant_result does; itself it imports torch's compiler, which doubles the time that a process
# needs for its first prediction.
gpu_at._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _gpu_at(index: int) -> Gpu | None:
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    from . import cuda

    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(10 * major + minor, missing_triton(), cuda.missing())


def missing_triton() -> str | None:
    """Why the Triton kernels cannot be used in this process, GPU or not, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error}); pip install triton"
    return None


def runs_natively(op: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the CPU kernel of ``op`` runs on x, in its ``dtype`` or this one: asked where torch's own layers are as good."""
    return x.is_cpu and _on_cpu(op, x.dtype if dtype is None else dtype).backend == "native"


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32 where autocast made it narrower on a CPU: most kernels there take float32 and no half precision.

    What autocast itself does with the ops that it keeps in float32.
    """
    return x.to(widened_dtype(x))


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # torch has no answer for "meta"


def beside(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x in the dtype of ``weight`` where autocast made it narrower than the parameters: the kernels take one dtype for both."""
    return x.to(weight.dtype) if x.dtype != weight.dtype and autocasts(x) else x


def widened_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of ``widened(x)``."""
    narrow = x.dtype in (torch.bfloat16, torch.float16) and x.is_cpu
    return torch.float32 if narrow and torch.is_autocast_enabled("cpu") else x.dtype


def backends() -> dict[str, str]:
    """Each backend's name with "available ..." or the reason why it is not."""
    from . import cuda

    gpu = gpu_at(0)
    no_gpu = None if gpu else "no GPU is visible to torch"
    version = missing_triton()
    if version is None:
        import triton

        version = f"triton {triton.__version__} is installed" + (f", but {no_gpu}" if no_gpu else "")
    report = {"reference": "available (dense PyTorch, any device and dtype)", "native": _native.reason, "triton": version,
              "cuda": cuda.missing() or "built"}
    for name in ("triton", "cuda") if gpu else ():
        why_not = gpu_refusals(torch.float32, gpu, Product("temporal_conv"))[name]
        report[name] = why_not or f"available ({report[name]}; {torch.cuda.get_device_name(0)})"
    return report
