"""The CUDA kernels (csrc/cuda): temporal_conv and graph_conv, forward and gradients. Definition of correct: reference.py.

Every function allocates its result and a workspace, and launches on torch's current stream."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .device import multiplies_in_tf32, on_its_device

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
    try:  # the module has a runtime of its own, which may be newer than the driver that torch is content with
        _device(torch.cuda.current_device())
    except RuntimeError as error:
        return f"built, but {error}"
    return None


def unsupported(dtype: torch.dtype) -> str | None:
    """Why no kernel takes this dtype, or None."""
    if dtype not in _ARITHMETIC:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def refusal(
    op: str,
    product: str,
    x: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    index: Tensor,
    frames: int,
    *more: int,
) -> str | None:
    """Why no kernel takes a product of this size, or None. op: "TemporalConv" with stride and dilation, or "GraphConv" with
    the dimensions of the adjacency; product: "forward", "input_gradient" or "weight_gradient"."""
    try:
        _prepare(op, product, x, shape, block, index, None, frames, *more)
    except ValueError as error:
        return f"the CUDA kernels refuse this size ({str(error).partition('Got: ')[2].rstrip('.')})"
    return None


@lru_cache(maxsize=4096)
def _launch(op: str, product: str, arithmetic: str, device: int, *sizes: int) -> Any:
    """The launch of one product of one shape: how its work is cut, and how much scratch space it takes."""
    return getattr(module, op)(arithmetic, *sizes, _device(device), product)


@lru_cache(maxsize=64)
def _device(index: int) -> Any:
    return module.Device(index)


@on_its_device
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
        tf32: multiply float32 in TF32. None: as torch's own products do, see torch.backends.cuda.matmul.fp32_precision.

    Returns:
        (N, O, ceil(T / stride), V), contiguous, of the dtype of x. Sums are float32 and rounded once.

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    x = _planes(x)
    residual = None if residual is None else _planes(residual)
    launch = _prepare("TemporalConv", "forward", x, shape, block, input, tf32, x.shape[2], stride, dilation)
    y = x.new_empty((x.shape[0], shape[0], -(-x.shape[2] // stride), x.shape[3]))
    shift, scale = _float(bias), _float(scale)
    scratch, values = _scratch(launch, x), values.contiguous()
    launch.forward(
        _plane(x), values.data_ptr(), _index(row_ptr, input, tap), _address(scale), _address(shift),
        _plane(residual), relu, y.data_ptr(), scratch.data_ptr(), _stream(x),
    )  # fmt: skip
    return y


@on_its_device
def temporal_conv_input_gradient(
    dy: Tensor,
    values: Tensor,
    t_ptr: Tensor,
    t_perm: Tensor,
    t_row: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    stride: int,
    dilation: int,
    frames: int,
    *,
    tf32: bool | None = None,
) -> Tensor:
    """dx (N, I, frames, V) of dy (N, O, To, V); t_ptr, t_perm, t_row: the pattern's transposed index.

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    dy = _planes(dy)
    launch = _prepare("TemporalConv", "input_gradient", dy, shape, block, tap, tf32, frames, stride, dilation)
    dx = dy.new_empty((dy.shape[0], shape[1], frames, dy.shape[3]))
    scratch, values = _scratch(launch, dy), values.contiguous()
    launch.input_gradient(
        _plane(dy), values.data_ptr(), _index(None, None, tap, t_ptr, t_perm, t_row), dx.data_ptr(),
        scratch.data_ptr(), _stream(dy),
    )  # fmt: skip
    return dx


@on_its_device
def temporal_conv_weight_gradient(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    masked: Tensor | None,
    scale: Tensor | None,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    stride: int,
    dilation: int,
    *,
    tf32: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(dw (blocks, bi, bo), dbias (O,)) of x (N, I, T, V) and dy (N, O, To, V).

    masked: bool (blocks,) or None; scale: 0-dim; adds scale * values to the gradient of the masked blocks.

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    x, dy = _planes(x), _planes(dy)
    launch = _prepare("TemporalConv", "weight_gradient", x, shape, block, input, tf32, x.shape[2], stride, dilation)
    dw = torch.empty((input.numel(), block[1], block[0]), dtype=x.dtype, device=x.device)
    masked, scale = (None, None) if masked is None else (masked.contiguous(), _float(scale))
    scratch, values, sums = _scratch(launch, x), values.contiguous(), _sums_of(dy, input.numel())
    launch.weight_gradient(
        _plane(x), _plane(dy), values.data_ptr(), _index(row_ptr, input, tap), _address(masked), _address(scale),
        dw.data_ptr(), _address(sums), scratch.data_ptr(), _stream(x),
    )  # fmt: skip
    return dw, (dy.sum((0, 2, 3), dtype=torch.float32) if sums is None else sums.sum(1)).to(dy.dtype)


def bias_map(adjacency: Tensor, bias: Tensor) -> Tensor:
    """What biases (K, O) add to y through the graph: sum over k, v of b_k[o] A_k[v,w]; (O, V), or (N, O, V), in float32.

    A product and a sum: a matrix product would be one of bfloat16 under autocast, or of TF32."""
    arriving = adjacency.sum(-2, dtype=torch.float32)
    return (bias.float()[:, :, None] * (arriving if adjacency.dim() == 5 else arriving[..., None, :])).sum(-3)


@on_its_device
def graph_conv(
    x: Tensor,
    values: Tensor,
    adjacency: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    tf32: bool | None = None,
) -> Tensor:
    """Y = act(scale[o] * sum over k, v of A_k[v,w] (b_k[o] + sum over live i of W_k[o,i] X[n,i,t,v]) + shift[o] + residual).

    Args:
        x: (N, I, T, V) of float32, bfloat16 or float16. Samples and channels may have any stride; a plane (T, V) that
            is not contiguous is copied.
        values: (blocks, bi, bo) of the dtype of x; the pattern's taps are the subsets.
        adjacency: (K, V, V), per sample (N, K, V, V) or per channel (N, K, O, V, V), of the dtype of x, any strides.
        bias: (K, O) or None. scale, shift: (O,) or None. residual: (N, O, T, V) or None.
        row_ptr, input, tap: the pattern's index, on the device of x.
        shape, block: (O, I, K), (bo, bi).
        tf32: multiply float32 in TF32. None: as torch's own products do, see torch.backends.cuda.matmul.fp32_precision.

    Returns:
        (N, O, T, V), contiguous, of the dtype of x. Sums are float32; in 16 bits what is between the two products, X A_k or
        per channel W_k X, is rounded once, as is the result.

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    x = _planes(x)
    residual = None if residual is None else _planes(residual)
    launch = _prepare("GraphConv", "forward", x, shape, block, input, tf32, x.shape[2], adjacency.dim())
    y = x.new_empty((x.shape[0], shape[0], *x.shape[2:]))
    added = None if bias is None else _float(bias_map(adjacency, bias))
    shift, scale, adjacency = _float(shift), _float(scale), adjacency.to(x.dtype)
    scratch, values = _scratch(launch, x), values.contiguous()
    launch.forward(
        _plane(x), values.data_ptr(), _graph(adjacency), _index(row_ptr, input, tap), _address(added),
        0 if added is None or added.dim() == 2 else added.stride(0), _address(scale), _address(shift), _plane(residual), relu,
        y.data_ptr(), scratch.data_ptr(), _stream(x),
    )  # fmt: skip
    return y


@on_its_device
def graph_conv_input_gradient(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    adjacency: Tensor,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    t_ptr: Tensor,
    t_perm: Tensor,
    t_row: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    *,
    need_x: bool = True,
    need_adjacency: bool = True,
    tf32: bool | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx (N, I, T, V), dadjacency of the shape of the adjacency, without what comes through bias_map) of dy (N, O, T, V).

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    x, dy = _planes(x), _planes(dy)
    launch = _prepare("GraphConv", "input_gradient", x, shape, block, input, tf32, x.shape[2], adjacency.dim())
    adjacency = adjacency.to(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dadjacency = torch.empty_like(adjacency, memory_format=torch.contiguous_format) if need_adjacency else None
    scratch, values = _scratch(launch, x), values.contiguous()
    launch.input_gradient(
        _plane(x), _plane(dy), values.data_ptr(), _graph(adjacency), _index(row_ptr, input, tap, t_ptr, t_perm, t_row),
        _address(dx), _address(dadjacency), scratch.data_ptr(), _stream(x),
    )  # fmt: skip
    return dx, dadjacency


@on_its_device
def graph_conv_weight_gradient(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    adjacency: Tensor,
    masked: Tensor | None,
    scale: Tensor | None,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    *,
    tf32: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(dw (blocks, bi, bo), the gradient of bias_map) of x (N, I, T, V) and dy (N, O, T, V).

    masked: bool (blocks,) or None; scale: 0-dim; adds scale * values to the gradient of the masked blocks.

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    x, dy = _planes(x), _planes(dy)
    launch = _prepare("GraphConv", "weight_gradient", x, shape, block, input, tf32, x.shape[2], adjacency.dim())
    dw = torch.empty((input.numel(), block[1], block[0]), dtype=x.dtype, device=x.device)
    masked, scale = (None, None) if masked is None else (masked.contiguous(), _float(scale))
    scratch, values, adjacency = _scratch(launch, x), values.contiguous(), adjacency.to(x.dtype)
    sums = _sums_of(dy, input.numel()) if adjacency.dim() == 3 else None
    launch.weight_gradient(
        _plane(x), _plane(dy), values.data_ptr(), _graph(adjacency), _index(row_ptr, input, tap), _address(masked),
        _address(scale), dw.data_ptr(), _address(sums), scratch.data_ptr(), _stream(x),
    )  # fmt: skip
    if sums is None:
        sums = dy.sum((0, 2) if adjacency.dim() == 3 else 2, dtype=torch.float32)
    return dw, sums.to(dy.dtype)


def _sums_of(dy: Tensor, blocks: int) -> Tensor | None:
    """Where the kernel leaves the sum of dy over samples and frames, (O, V); without a block it does not run."""
    return dy.new_empty((dy.shape[1], dy.shape[3]), dtype=torch.float32) if blocks else None


def _prepare(
    op: str,
    product: str,
    x: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    index: Tensor,
    tf32: bool | None,
    frames: int,
    *more: int,
) -> Any:
    """The launch for a tensor of this dtype, batch and number of joints.

    Raises:
        ValueError: no kernel takes this dtype or size.
    """
    if why_not := unsupported(x.dtype):
        raise ValueError(f"Expected a dtype for which there is a CUDA kernel. Got: {why_not}.")
    arithmetic = _ARITHMETIC[x.dtype]
    if arithmetic == "float32" and (multiplies_in_tf32() if tf32 is None else tf32):
        arithmetic = "tf32"
    launch = _launch(
        op, product, arithmetic, x.device.index or 0, x.shape[0], shape[1], frames, x.shape[3], shape[0], shape[2], *block,
        index.numel(), *more,
    )  # fmt: skip
    if launch.reason:
        raise ValueError(f"Expected sizes for which there is a CUDA kernel. Got: {launch.reason}.")
    return launch


def _planes(x: Tensor) -> Tensor:
    """x, copied if its planes (T, V) are not contiguous."""
    contiguous = x.stride(3) == 1 or x.shape[3] == 1
    contiguous = contiguous and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return x if contiguous else x.contiguous()


def _scratch(launch: Any, x: Tensor) -> Tensor:
    return torch.empty(launch.scratch, dtype=torch.uint8, device=x.device)


def _plane(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _graph(adjacency: Tensor) -> tuple[int, ...]:
    """Address of an adjacency and its strides of sample, subset, channel, from and to."""
    *outer, to = adjacency.stride()
    batch, subset, channel, source = {2: (0, outer[0], 0), 3: (*outer[:2], 0), 4: tuple(outer[:3])}[len(outer)] + (outer[-1],)
    return adjacency.data_ptr(), batch, subset, channel, source, to


def _index(*parts: Tensor | None) -> tuple[int, ...]:
    """Addresses of row_ptr, input, tap, t_ptr, t_perm and t_row, 0 for those a product does not read."""
    return tuple(_address(part) for part in parts) + (0,) * (6 - len(parts))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(x: Tensor) -> int:
    """torch's current stream; asked for on every call, so that CUDA graphs and stream contexts are honoured."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
