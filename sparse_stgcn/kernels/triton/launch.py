"""What the host functions of every op share: checks, arithmetic, and how wide the frames of a tensor can be read.

A tap moves a row of x by whole frames of V elements. With V = 25 no such row starts at 16 bytes, and a kernel loads it
2 or 4 bytes at a time. Kernels therefore take strides in units of ALIGN elements: 1, or the 8 or 4 elements of 16 bytes
where every frame starts at 16 bytes and may be read up to its next multiple of them. Three kinds of tensor are so: V is
such a multiple; the frames were stored with padding (graph_conv and temporal_conv do so when asked); or pad_frames has
copied them, which moves more bytes than it saves unless every row is read several times (configs.PACK_FROM).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import multiplies_in_tf32
from . import configs

ARITHMETIC = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half"}


def unsupported(dtype: torch.dtype, vertices: int = 1, adjacency_dims: int = 3) -> str | None:
    """Why no kernel takes this dtype and, for graph_conv, vertices and adjacency; or None. Blocks may have any shape."""
    if dtype not in ARITHMETIC:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    most = 64 if adjacency_dims < 5 else 32
    if vertices > most:
        per_channel = " with an adjacency per channel" if adjacency_dims == 5 else ""
        return f"the Triton graph_conv takes up to {most} vertices{per_channel}, not {vertices}"
    return None


def refuse(why_not: str | None) -> None:
    if why_not:
        raise ValueError(f"Expected sizes for which there is a Triton kernel. Got: {why_not}.")


def arithmetic_of(dtype: torch.dtype, tf32: bool | None) -> str:
    """The table's name of the arithmetic: "float32", "tf32" or "half"."""
    arithmetic = ARITHMETIC[dtype]
    return "tf32" if arithmetic == "float32" and (multiplies_in_tf32() if tf32 is None else tf32) else arithmetic


def precisions(arithmetic: str) -> dict[str, str]:
    """How products of stored numbers multiply, and how those with sums do (float32, whatever was stored)."""
    return {
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
        "GRAPH_PRECISION": {"float32": "ieee", "tf32": "tf32", "half": "tf32x3"}[arithmetic],
    }


def capability_of(x: Tensor) -> int:
    """Compute capability of the GPU that x lies on, 90 for 9.0."""
    if not x.is_cuda:  # the interpreter takes CPU tensors and runs any tile
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def width_of(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // x.element_size()


def strides(x: Tensor | None, align: int = 1) -> tuple[int, int, int, int]:
    """The four strides of x, the first three in units of `align` elements."""
    if x is None:
        return 0, 0, 0, 0
    n, c, t, v = (0 if size <= 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return n // align, c // align, t // align, v if x.shape[3] > 1 else 1


def is_wide(x: Tensor, clean: bool) -> bool:
    """Whether every frame of x starts at 16 bytes and can be read in whole 16 bytes; `clean`: without foreign elements."""
    width, beyond = width_of(x), -x.shape[3] % width_of(x)
    if x.numel() == 0 or x.data_ptr() % 16 or (x.shape[3] > 1 and x.stride(3) != 1) or (clean and beyond):
        return False
    if any(stride % width for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1):
        return False
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + beyond + 1) * x.element_size() <= x.untyped_storage().nbytes()


def readable(x: Tensor, reads: float, arithmetic: str, *, clean: bool = False) -> tuple[Tensor, int]:
    """x, or its copy with padded frames where `reads` loads of every element pay for it; and ALIGN."""
    if is_wide(x, clean):
        return x, width_of(x)
    if x.numel() and reads >= configs.PACK_FROM[configs.family(capability_of(x)), arithmetic]:
        return pad_frames(x), width_of(x)
    return x, 1


def new_frames(x: Tensor, shape: tuple[int, int, int, int], padded: bool) -> Tensor:
    """An empty tensor like x; `padded`: a view whose frames lie at multiples of 16 bytes, with room behind each."""
    if not padded:
        return x.new_empty(shape)
    return x.new_empty((*shape[:3], shape[3] + -shape[3] % width_of(x)))[..., : shape[3]]


@triton.jit
def pad_frames_kernel(
    x, y, x_n, x_c, x_t, x_v, C, T, V, units, total, ALIGN: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    frame, v = at // (units * ALIGN), at % (units * ALIGN)
    row = frame // T
    source = row // C * x_n + row % C * x_c + frame % T * x_t + v * x_v
    value = tl.load(x + source, mask=(at < total) & (v < V), other=0.0)
    tl.store(y + at, value, mask=at < total)


def pad_frames(x: Tensor) -> Tensor:
    """A copy of x (N, C, T, V) as a view of (N, C, T, V') with V' a multiple of 16 bytes and zeros behind each frame."""
    width, count = width_of(x), 1024
    units = triton.cdiv(x.shape[3], width)
    y = x.new_empty((*x.shape[:3], units * width))
    if y.numel():
        pad_frames_kernel[(triton.cdiv(y.numel(), count),)](
            x, y, *strides(x), *x.shape[1:], units, y.numel(), ALIGN=width, COUNT=count, num_warps=4
        )
    return y[..., : x.shape[3]]


@triton.jit
def epilogue(sums, channel, channels, scale, shift, residual, at_residual, gate, at_gate, live, RELU: tl.constexpr):
    """act(sums * scale[channel] + shift[channel] + residual), then 0 where gate is not positive; what is None is left out."""
    if scale is not None:
        sums = sums * tl.load(scale + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if shift is not None:
        sums = sums + tl.load(shift + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if residual is not None:
        sums = sums + tl.load(residual + at_residual, mask=live, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)
    if gate is not None:
        sums = tl.where(tl.load(gate + at_gate, mask=live, other=0.0) > 0, sums, 0.0)
    return sums


@triton.jit
def sum_parts_kernel(partial, values, masked, scale, out, parts, total, PER_BLOCK: tl.constexpr, COUNT: tl.constexpr,
                     AT_ONCE: tl.constexpr):  # fmt: skip
    """out[at] = sum over parts, in a fixed order, of partial[part, at]; plus the group lasso's term of a masked block."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    live = at < total
    lanes = tl.zeros((AT_ONCE, COUNT), dtype=tl.float32)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        share = part.to(tl.int64)[:, None] * total + at[None, :]
        lanes += tl.load(partial + share, mask=(part < parts)[:, None] & live[None, :], other=0.0)
    sums = tl.sum(lanes, axis=0)
    if masked is not None:
        vanishing = tl.load(masked + at // PER_BLOCK, mask=live, other=0) != 0
        value = tl.load(values + at, mask=live, other=0.0).to(tl.float32)
        sums += tl.where(vanishing, tl.load(scale).to(tl.float32) * value, 0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=live)


def sum_parts(partial: Tensor, out: Tensor, values: Tensor | None = None, masked: Tensor | None = None,
              scale: Tensor | None = None) -> Tensor:  # fmt: skip
    """out = partial (parts, ...) summed over parts in a fixed order, plus scale * values on blocks that are masked."""
    count = 32
    if out.numel():
        per_block = 1 if values is None else max(1, values[0].numel())
        sum_parts_kernel[(triton.cdiv(out.numel(), count),)](
            partial, None if masked is None or values is None else values.contiguous(),
            None if masked is None else masked.to(torch.uint8), None if masked is None else scale, out,
            partial.shape[0], out.numel(), PER_BLOCK=per_block, COUNT=count, AT_ONCE=16, num_warps=4,
        )  # fmt: skip
    return out
