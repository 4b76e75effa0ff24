"""Block-sparse temporal_conv in Triton, forward. Definition of correct: kernels/reference.py.

    y[n,o,t,v] = act( scale[o] * sum over live (o,i,k) of w[o,i,k] x[n,i, t*stride + (k-(K-1)/2)*dilation, v]
                      + shift[o] + residual[n,o,t,v] )

A program owns one row of blocks (bo output channels) and a tile of pixels of one sample. It walks over the row's live
(input, tap) slots, bi of them for each block, and gathers their input rows as they lie:

    x, gathered (pixels, slots)  @  values (slots, bo)  ->  (pixels, bo), in registers for the whole reduction

Pixels are the matrix unit's M side, so that blocks of 8, 16 and 32 rows reach it on every architecture. Skipped: dead
blocks. Fused: scale, shift, residual, ReLU. Contract: sums in float32, rounded once; addresses are 64-bit; every load
and store is masked; the order of a sum depends on the pattern alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


@triton.jit
def temporal_conv_forward_kernel(
    x, values, y, row_ptr, inputs, taps, scale, shift, residual,
    x_n, x_c, x_t, x_v, r_n, r_c, r_t, r_v,
    O, I, T, V, out_frames, groups, tiles, stride, dilation, halo,
    BO: tl.constexpr, BI: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    g = program % groups  # neighbours share their pixels, so that x is read from L2
    n = (program // groups // tiles).to(tl.int64)
    p = program // groups % tiles * PIXELS + tl.arange(0, PIXELS)
    o = g * BO + tl.arange(0, BO)
    live_pixel = p < out_frames * V
    live_output = live_pixel[:, None] & (o < O)[None, :]
    frame = p // V * stride
    t, v = (p // V).to(tl.int64), (p % V).to(tl.int64)
    x_pixel = n * x_n + t * stride * x_t + v * x_v  # (PIXELS,)
    sums = tl.zeros((PIXELS, BO), dtype=tl.float32)
    end = tl.load(row_ptr + g + 1) * BI
    for first in range(tl.load(row_ptr + g) * BI, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < end
        channel = tl.load(inputs + slot // BI, mask=live, other=0) * BI + slot % BI
        live = live & (channel < I)
        past = (tl.load(taps + slot // BI, mask=live, other=0) - halo) * dilation
        at = x_pixel[:, None] + (channel.to(tl.int64) * x_c + past.to(tl.int64) * x_t)[None, :]
        from_frame = frame[:, None] + past[None, :]
        inside = (live_pixel[:, None] & live[None, :]) & ((from_frame >= 0) & (from_frame < T))
        panel = tl.load(x + at, mask=inside, other=0.0)
        weight = slot.to(tl.int64)[:, None] * BO + tl.arange(0, BO)[None, :]
        sums = tl.dot(
            panel, tl.load(values + weight, mask=live[:, None], other=0.0), sums, input_precision=PRECISION
        )
    if scale is not None:
        sums = sums * tl.load(scale + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        sums = sums + tl.load(shift + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        r = (n * r_n + t * r_t + v * r_v)[:, None] + (o.to(tl.int64) * r_c)[None, :]
        sums = sums + tl.load(residual + r, mask=live_output, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)
    at_y = (n * O + o.to(tl.int64))[None, :] * out_frames * V + p.to(tl.int64)[:, None]
    tl.store(y + at_y, sums.to(y.dtype.element_ty), mask=live_output)


_ARITHMETIC = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half"}


def unsupported(dtype: torch.dtype, block: tuple[int, int]) -> str | None:
    """Why no kernel takes this dtype and block shape, or None. A property of the pair alone."""
    if dtype not in _ARITHMETIC:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if block[0] not in configs.ROWS:
        rows = ", ".join(map(str, configs.ROWS[:-1])) + f" or {configs.ROWS[-1]}"
        return f"the Triton kernels take blocks of {rows} output channels, not {block[0]}x{block[1]}"
    return None


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
        x: (N, I, T, V) of float32, bfloat16 or float16, any strides.
        values: (blocks, bi, bo) of the dtype of x.
        bias, scale: (O,) or None. With `scale`, the bias is the shift of a folded batch norm: it is not scaled.
        row_ptr, input, tap: the pattern's index, on the device of x.
        shape, block: (O, I, K), (bo, bi).
        residual: (N, O, To, V) or None, any strides, added before the ReLU.
        tf32: multiply float32 in TF32. None follows torch.get_float32_matmul_precision(): "highest" is IEEE float32.

    Returns:
        (N, O, ceil(T / stride), V), contiguous, of the dtype of x. Sums are float32 and rounded once.

    Raises:
        ValueError: no kernel takes this dtype or block.
    """
    (out_channels, in_channels, taps), (bo, bi) = shape, block
    if why_not := unsupported(x.dtype, block):
        raise ValueError(f"Expected a pattern for which there is a Triton kernel. Got: {why_not}.")
    arithmetic = arithmetic_of(x.dtype, tf32)
    config = configs.temporal_conv_forward(capability_of(x), arithmetic, bo)
    batch, _, frames, vertices = x.shape
    out_frames, groups = -(-frames // stride), -(-out_channels // bo)
    tiles = triton.cdiv(out_frames * vertices, config.pixels)
    y = x.new_empty((batch, out_channels, out_frames, vertices))
    if y.numel() == 0:
        return y
    temporal_conv_forward_kernel[(batch * tiles * groups,)](
        x, values.contiguous(), y, row_ptr, input, tap, scale, bias, residual,
        *x.stride(), *((0, 0, 0, 0) if residual is None else residual.stride()),
        out_channels, in_channels, frames, vertices, out_frames, groups, tiles, stride, dilation, (taps - 1) // 2,
        BO=bo, BI=bi, PIXELS=config.pixels, SLOTS=config.slots, PRECISION="tf32" if arithmetic == "tf32" else "ieee",
        RELU=relu, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def arithmetic_of(dtype: torch.dtype, tf32: bool | None) -> str:
    """The table's name of the arithmetic: "float32", "tf32" or "half"."""
    arithmetic = _ARITHMETIC[dtype]
    if arithmetic == "float32" and (tf32 or (tf32 is None and torch.get_float32_matmul_precision() != "highest")):
        return "tf32"
    return arithmetic


def capability_of(x: Tensor) -> int:
    """Compute capability of the GPU that x lies on, 90 for 9.0."""
    if not x.is_cuda:  # the interpreter takes CPU tensors and runs any tile
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
