"""The two gradients of temporal_conv in Triton. Definition of correct: autograd of kernels/reference.py.

    dx[n,i,t,v] = sum over live (o,i,k) with t = s*stride + (k-(K-1)/2)*dilation of w[o,i,k] dy[n,o,s,v]
    dw[o,i,k]   = sum over n,s,v of dy[n,o,s,v] x[n,i, s*stride + (k-(K-1)/2)*dilation, v]

dx: a program owns one block column (bi input channels) and a tile of pixels, and gathers rows of dy through the
transposed index; weights are read where they lie. Blocks of bi >= 8 use the matrix unit; bi = 1 leaves it a single
column, so that products and sums are made one by one.

dw: a program owns one row of blocks and a share of the pixels; for 16 live slots at a time it multiplies the gathered
rows of x (16, pixels) with dy (pixels, bo). Its partial sums go to a workspace of their own, and a second pass adds the
shares up in their order: the result is the same on every run. The group lasso's term is added once, in that pass.

Contract: sums in float32; addresses are 64-bit; every load and store is masked; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .temporal_conv import arithmetic_of, capability_of, unsupported


@triton.jit
def temporal_conv_dx_kernel(
    dy, values, dx, t_ptr, t_perm, t_row, taps,
    d_n, d_c, d_t, d_v, O, I, T, V, out_frames, columns, tiles, stride, dilation, halo,
    BO: tl.constexpr, BI: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    h = program % columns
    n = (program // columns // tiles).to(tl.int64)
    p = program // columns % tiles * PIXELS + tl.arange(0, PIXELS)
    i = h * BI + tl.arange(0, BI)
    live_pixel = p < T * V
    t, v = p // V, (p % V).to(tl.int64)
    pixel = n * d_n + v * d_v
    sums = tl.zeros((PIXELS, BI), dtype=tl.float32)
    end = tl.load(t_ptr + h + 1) * BO
    for first in range(tl.load(t_ptr + h) * BO, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < end
        o = tl.load(t_row + slot // BO, mask=live, other=0) * BO + slot % BO
        block = tl.load(t_perm + slot // BO, mask=live, other=0)
        live = live & (o < O)
        past = (halo - tl.load(taps + block, mask=live, other=0)) * dilation
        ahead = t[:, None] + past[None, :]  # stride times the output frame
        inside = (ahead >= 0) & (ahead % stride == 0) & (ahead // stride < out_frames)
        at = pixel[:, None] + (ahead // stride).to(tl.int64) * d_t + (o.to(tl.int64) * d_c)[None, :]
        panel = tl.load(dy + at, mask=inside & live_pixel[:, None] & live[None, :], other=0.0)
        weight = block.to(tl.int64) * (BI * BO) + slot % BO
        if BI == 1:
            w = tl.load(values + weight, mask=live, other=0.0).to(tl.float32)
            sums += tl.sum(panel.to(tl.float32) * w[None, :], axis=1)[:, None]
        else:
            weight = weight[:, None] + tl.arange(0, BI)[None, :] * BO
            w = tl.load(values + weight, mask=live[:, None], other=0.0)
            sums = tl.dot(panel, w, sums, input_precision=PRECISION)
    at_x = (n * I + i.to(tl.int64))[None, :] * T * V + p.to(tl.int64)[:, None]
    tl.store(dx + at_x, sums.to(dx.dtype.element_ty), mask=live_pixel[:, None] & (i < I)[None, :])


@triton.jit
def temporal_conv_dw_kernel(
    x, dy, partial, row_ptr, inputs, taps,
    x_n, x_c, x_t, x_v, d_n, d_c, d_t, d_v,
    O, I, T, V, out_frames, groups, samples, tiles, share, slots, stride, dilation, halo,
    BO: tl.constexpr, BI: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % groups
    split = tl.program_id(0) // groups
    o = g * BO + tl.arange(0, BO)
    last_tile = tl.minimum((split + 1) * share, samples * tiles)
    end = tl.load(row_ptr + g + 1) * BI
    for first in range(tl.load(row_ptr + g) * BI, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < end
        channel = tl.load(inputs + slot // BI, mask=live, other=0) * BI + slot % BI
        inside_x = live & (channel < I)
        past = (tl.load(taps + slot // BI, mask=live, other=0) - halo) * dilation
        row = channel.to(tl.int64) * x_c + past.to(tl.int64) * x_t
        sums = tl.zeros((SLOTS, BO), dtype=tl.float32)
        for tile in range(split * share, last_tile):
            n = (tile // tiles).to(tl.int64)
            p = tile % tiles * PIXELS + tl.arange(0, PIXELS)
            live_pixel = p < out_frames * V
            s, v = (p // V).to(tl.int64), (p % V).to(tl.int64)
            at_x = row[:, None] + (n * x_n + s * stride * x_t + v * x_v)[None, :]
            frame = past[:, None] + (p // V * stride)[None, :]
            inside = (inside_x[:, None] & live_pixel[None, :]) & ((frame >= 0) & (frame < T))
            at_y = (n * d_n + s * d_t + v * d_v)[:, None] + (o.to(tl.int64) * d_c)[None, :]
            gradient = tl.load(dy + at_y, mask=live_pixel[:, None] & (o < O)[None, :], other=0.0)
            panel = tl.load(x + at_x, mask=inside, other=0.0)
            sums = tl.dot(panel, gradient, sums, input_precision=PRECISION)
        at = (split.to(tl.int64) * slots + slot.to(tl.int64))[:, None] * BO + tl.arange(0, BO)[None, :]
        tl.store(partial + at, sums, mask=live[:, None])


@triton.jit
def temporal_conv_dw_sum_kernel(
    partial, values, masked, scale, dw, splits, total, PER_BLOCK: tl.constexpr, COUNT: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    live = at < total
    sums = tl.zeros((COUNT,), dtype=tl.float32)
    share = at
    for _ in range(splits):
        sums += tl.load(partial + share, mask=live, other=0.0)
        share += total
    if masked is not None:
        vanishing = tl.load(masked + at // PER_BLOCK, mask=live, other=0) != 0
        value = tl.load(values + at, mask=live, other=0.0).to(tl.float32)
        sums += tl.where(vanishing, tl.load(scale).to(tl.float32) * value, 0.0)
    tl.store(dw + at, sums.to(dw.dtype.element_ty), mask=live)


def temporal_conv_dx(
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
    """dx (N, I, frames, V) of dy (N, O, To, V), any strides; t_ptr, t_perm, t_row: the pattern's transposed index.

    Raises:
        ValueError: no kernel takes this dtype or block; blocks of 2 to 7 input channels have none.
    """
    (out_channels, in_channels, taps), (bo, bi) = shape, block
    why_not = unsupported(dy.dtype, block)
    if why_not is None and bi != 1 and bi not in configs.ROWS:
        why_not = f"dx takes blocks of 1, 8, 16, 32 or 64 input channels, not {bo}x{bi}"
    if why_not:
        raise ValueError(f"Expected a pattern for which there is a Triton kernel. Got: {why_not}.")
    arithmetic = arithmetic_of(dy.dtype, tf32)
    config = configs.temporal_conv_dx(capability_of(dy), arithmetic, bi)
    batch, _, out_frames, vertices = dy.shape
    columns, tiles = -(-in_channels // bi), triton.cdiv(frames * vertices, config.pixels)
    dx = dy.new_empty((batch, in_channels, frames, vertices))
    if dx.numel() == 0:
        return dx
    temporal_conv_dx_kernel[(batch * tiles * columns,)](
        dy, values.contiguous(), dx, t_ptr, t_perm, t_row, tap, *dy.stride(),
        out_channels, in_channels, frames, vertices, out_frames, columns, tiles, stride, dilation, (taps - 1) // 2,
        BO=bo, BI=bi, PIXELS=config.pixels, SLOTS=config.slots, PRECISION="tf32" if arithmetic == "tf32" else "ieee",
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dx


def temporal_conv_dw(
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
    """(dw (blocks, bi, bo), dbias (O,)) of x (N, I, T, V) and dy (N, O, To, V), any strides.

    masked: bool (blocks,) or None; scale: 0-dim; adds scale * values to the gradient of the masked blocks.

    Raises:
        ValueError: no kernel takes this dtype or block.
    """
    (out_channels, in_channels, taps), (bo, bi) = shape, block
    if why_not := unsupported(x.dtype, block):
        raise ValueError(f"Expected a pattern for which there is a Triton kernel. Got: {why_not}.")
    arithmetic = arithmetic_of(x.dtype, tf32)
    config = configs.temporal_conv_dw(capability_of(x), arithmetic, bo)
    batch, _, frames, vertices = x.shape
    out_frames, groups, slots = dy.shape[2], -(-out_channels // bo), input.numel() * bi
    tiles = triton.cdiv(out_frames * vertices, config.pixels)
    splits = max(1, min(batch * tiles, configs.PROGRAMS_OF_DW // groups))
    partial = torch.empty((splits, slots, bo), dtype=torch.float32, device=x.device)
    dw = torch.empty((input.numel(), bi, bo), dtype=values.dtype, device=x.device)
    dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype)
    if slots == 0:
        return dw, dbias
    temporal_conv_dw_kernel[(groups * splits,)](
        x, dy, partial, row_ptr, input, tap, *x.stride(), *dy.stride(),
        out_channels, in_channels, frames, vertices, out_frames, groups, batch, tiles, triton.cdiv(batch * tiles, splits),
        slots, stride, dilation, (taps - 1) // 2,
        BO=bo, BI=bi, PIXELS=config.pixels, SLOTS=config.slots, PRECISION="tf32" if arithmetic == "tf32" else "ieee",
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    count = 256
    flags = None if masked is None else masked.to(torch.uint8)
    temporal_conv_dw_sum_kernel[(triton.cdiv(dw.numel(), count),)](
        partial, values.contiguous(), flags, scale, dw, splits, dw.numel(), PER_BLOCK=bi * bo, COUNT=count
    )
    return dw, dbias
