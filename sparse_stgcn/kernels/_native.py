"""The native CPU module: loaded once, on torch's own thread pool."""
from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .pattern import BlockPattern

module: ModuleType | None
reason: str
try:
    from sparse_stgcn import _native as module  # type: ignore[attr-defined,no-redef]

    isa: str = module.isa()
    reason = f"available ({isa})"
except ImportError as error:
    module, isa = None, "none"
    reason = f"the native module is not built ({error}); run pip install -e . where a C++17 compiler is found"
except ValueError as error:  # SPARSE_STGCN_ISA names a set that this processor lacks
    module, isa = None, "none"
    reason = str(error)


def _pool() -> str:
    """Hands torch's thread pool to the native module. torch is loaded by now, so its symbols are in this process."""
    from pathlib import Path

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        symbol = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return "calling thread only (torch_parallel_for was not found)"
    if module is not None:
        module.set_parallel_for(ctypes.cast(symbol, ctypes.c_void_p).value)
    return "torch's pool"


threads_source: str = _pool() if module is not None else "none"


def sizes(shape: tuple[int, int, int] | list[int], block: tuple[int, int] | list[int], blocks: int) -> list[int]:
    """The pattern's sizes as csrc/bindings.cpp takes them."""
    return [*shape, *block, blocks]


def address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def storage(tensor: Tensor) -> int:
    """What activations are stored in, as csrc/bindings.h numbers it."""
    return {torch.float64: 1, torch.bfloat16: 2}.get(tensor.dtype, 0)


def wide(tensor: Tensor) -> Tensor:
    """tensor in the precision that its op sums in: bfloat16 as float32, anything else as it is."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def one_run(x: Tensor) -> Tensor:
    """x if the pixels (T, V) of a channel lie in one run, otherwise a contiguous copy."""
    frames, joints = x.shape[2:]
    return x if (joints == 1 or x.stride(3) == 1) and (frames == 1 or x.stride(2) == joints) else x.contiguous()


def channels_apart(x: Tensor) -> Tensor:
    """x if its channels are T V numbers apart, as those of a slice are, otherwise a contiguous copy."""
    pixels = x.shape[2] * x.shape[3]
    x = one_run(x)
    return x if x.shape[1] == 1 or x.stride(1) == pixels else x.contiguous()


def plane(x: Tensor | None) -> tuple[int, tuple[int, int]]:
    """Address and strides of sample and channel; zeros for None."""
    return (0, (0, 0)) if x is None else (x.data_ptr(), (x.stride(0), x.stride(1)))


def index(row_ptr: Tensor, input: Tensor, tap: Tensor) -> list[int]:
    """Addresses of a pattern's indices."""
    return [row_ptr.data_ptr(), input.data_ptr(), tap.data_ptr()]


def pattern_arguments(pattern: BlockPattern) -> dict[str, Any]:
    """A pattern as the arguments of the raw ops."""
    return {"row_ptr": pattern.row_ptr, "input": pattern.input, "tap": pattern.tap,
            "shape": list(pattern.shape), "block": list(pattern.block)}
