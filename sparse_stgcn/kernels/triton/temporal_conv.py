"""Block-sparse temporal_conv in Triton, forward. Definition of correct: kernels/reference.py.

    y[n,o,t,v] = act( scale[o] * sum over live (o,i,k) of w[o,i,k] x[n,i, t*stride + (k-(K-1)/2)*dilation, v]
                      + shift[o] + residual[n,o,t,v] )

A program owns one row of blocks and a tile of pixels of one sample. It walks over the row's slots (plan.py) and gathers
their input rows as they lie:

    x, gathered (pixels, slots)  @  weights (slots, rows)  ->  (pixels, rows), in registers for the whole reduction

Pixels are the matrix unit's M side, so that blocks of 8, 16 and 32 rows reach it on every architecture. Where the frames
of x are wide (launch.py), pixels run over padded frames: 16 bytes of a row are then one load whatever the tap, and what
it reads beyond V only reaches sums that are not stored. Skipped: dead slots. Fused: scale, shift, residual, ReLU.
Contract: sums in float32, rounded once; addresses are 64-bit; every load and store of a tile is masked; the order of a
sum depends on the pattern alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..device import on_its_device
from . import configs
from .launch import (
    arithmetic_of,
    capability_of,
    epilogue,
    new_frames,
    precisions,
    readable,
    refuse,
    strides,
    unsupported,
)
from .plan import plan_of


@triton.jit
def temporal_conv_forward_kernel(
    x, weights, y, row_ptr, channels, taps, scale, shift, residual,
    x_n, x_c, x_t, x_v, y_n, y_c, y_t, r_n, r_c, r_t, r_v,
    O, I, T, V, K, out_frames, units, groups, tiles, stride, dilation, halo,
    BO: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    g = program % groups  # neighbours share their pixels, so that x is read from L2
    n = (program // groups // tiles).to(tl.int64)
    p = program // groups % tiles * PIXELS + tl.arange(0, PIXELS)
    o = g * BO + tl.arange(0, BO)
    s, v = p // (units * ALIGN), p % (units * ALIGN)
    live_pixel = s < out_frames
    frame = s * stride
    x_pixel = n * x_n * ALIGN + frame.to(tl.int64) * x_t * ALIGN + v.to(tl.int64) * x_v
    sums = tl.zeros((PIXELS, BO), dtype=tl.float32)
    end = tl.load(row_ptr + (g + 1) * K)
    for first in range(tl.load(row_ptr + g * K), end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < end
        channel = tl.load(channels + slot, mask=live, other=0)
        past = (tl.load(taps + slot, mask=live, other=0) - halo) * dilation
        row = channel.to(tl.int64) * x_c * ALIGN + past.to(tl.int64) * x_t * ALIGN
        from_frame = frame[:, None] + past[None, :]
        inside = (live_pixel[:, None] & (live & (channel < I))[None, :]) & ((from_frame >= 0) & (from_frame < T))
        panel = tl.load(x + (x_pixel[:, None] + row[None, :]), mask=inside, other=0.0)
        weight = slot.to(tl.int64)[:, None] * BO + tl.arange(0, BO)[None, :]
        w = tl.load(weights + weight, mask=live[:, None], other=0.0)
        sums = tl.dot(panel, w, sums, input_precision=PRECISION)
    live_output = (live_pixel & (v < V))[:, None] & (o < O)[None, :]
    out, at_s, at_v = o.to(tl.int64)[None, :], s.to(tl.int64)[:, None], v.to(tl.int64)[:, None]
    at_residual = n * r_n + out * r_c + at_s * r_t + at_v * r_v
    sums = epilogue(sums, out, O, scale, shift, residual, at_residual, None, 0, live_output, RELU)
    tl.store(y + (n * y_n + out * y_c + at_s * y_t + at_v), sums.to(y.dtype.element_ty), mask=live_output)


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
    padded: bool = False,
    tf32: bool | None = None,
) -> Tensor:
    """Y = act(scale[o] * sum over live (o,i,k) of W[o,i,k] X[n,i, t*stride + (k-(K-1)/2)*dilation, v] + bias[o] + residual).

    Args:
        x: (N, I, T, V) of float32, bfloat16 or float16, any strides.
        values: (blocks, bi, bo); rounded to the dtype of x.
        bias, scale: (O,) or None. With `scale`, the bias is the shift of a folded batch norm: it is not scaled.
        row_ptr, input, tap: the pattern's index, on the device of x.
        shape, block: (O, I, K), (bo, bi).
        residual: (N, O, To, V) or None, any strides, added before the ReLU.
        padded: return a view with frames at multiples of 16 bytes, which a following temporal_conv reads faster.
        tf32: multiply float32 in TF32. None: as torch's own products do, see torch.backends.cuda.matmul.fp32_precision.

    Returns:
        (N, O, ceil(T / stride), V), of the dtype of x, contiguous unless `padded`. Sums are float32 and rounded once.

    Raises:
        ValueError: no kernel takes this dtype.
    """
    (out_channels, in_channels, taps) = shape
    refuse(unsupported(x.dtype))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(x.dtype, tf32)
    config = configs.temporal_conv_forward(capability_of(x), arithmetic, plan.rows)
    batch, _, frames, vertices = x.shape
    out_frames = -(-frames // stride)
    y = new_frames(x, (batch, out_channels, out_frames, vertices), padded)
    if y.numel() == 0:
        return y
    x, align = readable(x, plan.slots / in_channels / stride, arithmetic)
    units = triton.cdiv(vertices, align)
    tiles = triton.cdiv(out_frames * units * align, config.pixels)
    temporal_conv_forward_kernel[(batch * tiles * plan.groups,)](
        x, plan.weights(values, x.dtype), y, plan.row_ptr, plan.channel, plan.tap, scale, bias, residual,
        *strides(x, align), *y.stride()[:3], *strides(residual),
        out_channels, in_channels, frames, vertices, taps, out_frames, units, plan.groups, tiles, stride, dilation,
        (taps - 1) // 2, BO=plan.rows, PIXELS=config.pixels, SLOTS=config.slots, ALIGN=align,
        PRECISION=precisions(arithmetic)["PRECISION"], RELU=relu, **config.options(),
    )  # fmt: skip
    return y
