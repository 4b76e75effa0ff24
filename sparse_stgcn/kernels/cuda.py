"""The CUDA kernels (csrc/cuda): block-sparse temporal_conv, forward. Definition of correct: reference.py."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

module: Any
"""The compiled module, or None; `reason` tells why."""

try:
    from sparse_stgcn import _cuda as module  # type: ignore[attr-defined,no-redef]

    reason = "built"
except ImportError as error:
    module = None
    _note = Path(__file__).resolve().parent.parent / "_cuda_build.txt"
    _built = _note.read_text().strip() if _note.is_file() else ""
    reason = _built if _built not in ("", "built") else f"not built ({error}); it is built when nvcc is found"

_ARITHMETIC = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def missing() -> str | None:
    """Why no CUDA kernel can run here, or None if they can."""
    if module is None:
        return reason
    if not torch.backends.cuda.is_built():
        return f"built, but torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "built, but torch sees no GPU"
    return None


def unsupported(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why no kernel takes this dtype and block shape, or None. A property of the pair alone."""
    if dtype not in _ARITHMETIC:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if block[0] not in (8, 16, 32):
        return f"the CUDA kernels take blocks of 8, 16 or 32 output channels, not {block[0]}x{block[1]}"
    return None


@lru_cache(maxsize=4096)
def _launch(arithmetic: str, device: int, *sizes: int) -> Any:
    """The launch of one shape: how its work is cut, and how much scratch space it takes."""
    return module.TemporalConv(arithmetic, *sizes, _device(device))


@lru_cache(maxsize=64)
def _device(index: int) -> Any:
    return module.Device(index)


def temporal_conv(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    stride: int = 1,
    dilation: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    tf32: bool | None = None,
) -> Tensor:
    """Y = act(scale[o] * sum over live (o,i,k) of W[o,i,k] X[n,i, t*stride + (k-(K-1)/2)*dilation, v] + bias[o] + residual).

    Args:
        x: (N, I, T, V) of float32, bfloat16 or float16. Samples and channels may have any stride; a plane (T, V) that
            is not contiguous is copied.
        values: (blocks, bi, bo) of the dtype of x.
        bias, scale: (O,) or None. With `scale`, the bias is the shift of a folded batch norm: it is not scaled.
        row_ptr, input, tap: the pattern's index, on the device of x.
        shape, block: (O, I, K), (bo, bi).
        residual: (N, O, To, V) or None, added before the ReLU.
        tf32: multiply float32 in TF32. None follows torch.get_float32_matmul_precision(): "highest" is IEEE float32.

    Returns:
        (N, O, ceil(T / stride), V), contiguous, of the dtype of x. Sums are float32 and rounded once.

    Raises:
        ValueError: no kernel takes this dtype, block or size.
    """
    (out_channels, in_channels, taps), (bo, bi) = shape, block
    if reason_why_not := unsupported(x.dtype, block):
        raise ValueError(f"Expected a pattern for which there is a CUDA kernel. Got: {reason_why_not}.")
    x = _planes(x)
    residual = None if residual is None else _planes(residual)
    values = values.contiguous()
    if values.data_ptr() % 16:
        values = values.clone()
    shift = None if bias is None else bias.float().contiguous()
    scale = None if scale is None else scale.float().contiguous()
    arithmetic = _ARITHMETIC[x.dtype]
    if arithmetic == "float32" and (tf32 or (tf32 is None and torch.get_float32_matmul_precision() != "highest")):
        arithmetic = "tf32"
    batch, _, frames, vertices = x.shape
    launch = _launch(
        arithmetic, x.device.index or 0, batch, in_channels, frames, vertices, out_channels, taps, bo, bi,
        input.numel(), stride, dilation,
    )  # fmt: skip
    if launch.reason:
        raise ValueError(f"Expected sizes for which there is a CUDA kernel. Got: {launch.reason}.")
    y = x.new_empty((batch, out_channels, -(-frames // stride), vertices))
    scratch = torch.empty(launch.scratch, dtype=torch.int32, device=x.device)
    residual_strides = (0, 0) if residual is None else residual.stride()[:2]
    launch.forward(
        x.data_ptr(), *x.stride()[:2], values.data_ptr(), row_ptr.data_ptr(), input.data_ptr(), tap.data_ptr(),
        _address(scale), _address(shift), _address(residual), *residual_strides, relu, y.data_ptr(), scratch.data_ptr(),
        _stream(x),
    )  # fmt: skip
    return y


def _planes(x: Tensor) -> Tensor:
    """x, copied if its planes (T, V) are not contiguous."""
    contiguous = x.stride(3) == 1 or x.shape[3] == 1
    contiguous = contiguous and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return x if contiguous else x.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(x: Tensor) -> int:
    """torch's current stream; asked for on every call, so that CUDA graphs and stream contexts are honoured."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
