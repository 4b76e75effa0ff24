"""The two gradients of temporal_conv in Triton. Definition of correct: autograd of kernels/reference.py.

    dx[n,i,t,v] = sum over live (o,i,k) with t = s*stride + (k-(K-1)/2)*dilation of w[o,i,k] dy[n,o,s,v]
    dw[o,i,k]   = sum over n,s,v of dy[n,o,s,v] x[n,i, s*stride + (k-(K-1)/2)*dilation, v]

dx: a program owns `columns` neighbouring input channels and a tile of pixels, and gathers the rows of dy that any of them
needs (the entries of plan.py); weights are read where they lie. Fused: plus residual, the gradient that reaches x another
way; 0 where gate is not positive, the backward pass of a ReLU that made x.

dw: a program owns one row of blocks and a share of the pixels; for some live slots at a time it multiplies the gathered
rows of x (slots, pixels) with dy (pixels, rows). Its partial sums go to a workspace of their own, and a second pass adds
the shares up in a fixed order: the result is the same on every run. The group lasso's term is added once, in that pass.

Contract: sums in float32; addresses are 64-bit; every load and store is masked; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import on_its_device
from . import configs
from .launch import (
    arithmetic_of,
    capability_of,
    epilogue,
    precisions,
    readable,
    refuse,
    strides,
    sum_parts,
    unsupported,
)
from .plan import plan_of


@triton.jit
def temporal_conv_dx_kernel(
    dy, weights, dx, column_ptr, entry_row, entry_tap, entry_slot, residual, gate,
    d_n, d_c, d_t, d_v, r_n, r_c, r_t, r_v, g_n, g_c, g_t, g_v,
    O, I, T, V, K, out_frames, units, columns, tiles, stride, dilation, halo,
    BO: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    h = program % columns
    n = (program // columns // tiles).to(tl.int64)
    p = program // columns % tiles * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, COLUMNS)
    i = h * COLUMNS + column
    t, v = p // (units * ALIGN), p % (units * ALIGN)
    live_pixel = t < T
    pixel = n * d_n * ALIGN + v.to(tl.int64) * d_v
    sums = tl.zeros((PIXELS, COLUMNS), dtype=tl.float32)
    end = tl.load(column_ptr + (h + 1) * K) * BO
    for first in range(tl.load(column_ptr + h * K) * BO, end, SLOTS):
        q = first + tl.arange(0, SLOTS)
        live = q < end
        o = tl.load(entry_row + q // BO, mask=live, other=0) * BO + q % BO
        inside_dy = live & (o < O)
        past = (halo - tl.load(entry_tap + q // BO, mask=live, other=0)) * dilation
        ahead = t[:, None] + past[None, :]  # stride times the output frame
        s = ahead // stride
        inside = (ahead >= 0) & (s * stride == ahead) & (s < out_frames)
        at = pixel[:, None] + s.to(tl.int64) * d_t * ALIGN + (o.to(tl.int64) * d_c * ALIGN)[None, :]
        panel = tl.load(dy + at, mask=inside & live_pixel[:, None] & inside_dy[None, :], other=0.0)
        at_slot = (q // BO).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        slot = tl.load(entry_slot + at_slot, mask=live[:, None], other=-1)
        weight = slot.to(tl.int64) * BO + (q % BO)[:, None]
        w = tl.load(weights + weight, mask=slot >= 0, other=0.0)
        sums = tl.dot(panel, w, sums, input_precision=PRECISION)
    live_x = (live_pixel & (v < V))[:, None] & (i < I)[None, :]
    channel, at_t, at_v = i.to(tl.int64)[None, :], t.to(tl.int64)[:, None], v.to(tl.int64)[:, None]
    at_residual = n * r_n + channel * r_c + at_t * r_t + at_v * r_v
    at_gate = n * g_n + channel * g_c + at_t * g_t + at_v * g_v
    sums = epilogue(sums, channel, I, None, None, residual, at_residual, gate, at_gate, live_x, False)
    tl.store(dx + (((n * I + channel) * T + at_t) * V + at_v), sums.to(dx.dtype.element_ty), mask=live_x)


@triton.jit
def temporal_conv_dw_kernel(
    x, dy, partial, row_ptr, channels, taps, place,
    x_n, x_c, x_t, x_v, d_n, d_c, d_t, d_v,
    O, I, T, K, out_frames, units, groups, samples, tiles, share, total, stride, dilation, halo,
    BO: tl.constexpr, PIXELS: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % groups
    split = (tl.program_id(0) // groups).to(tl.int64)
    row = tl.arange(0, BO)
    o = g * BO + row
    first_tile = tl.program_id(0) // groups * share
    last_tile = tl.minimum(first_tile + share, samples * tiles)
    end = tl.load(row_ptr + (g + 1) * K)
    for first in range(tl.load(row_ptr + g * K), end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < end
        channel = tl.load(channels + slot, mask=live, other=0)
        inside_x = live & (channel < I)
        past = (tl.load(taps + slot, mask=live, other=0) - halo) * dilation
        x_row = channel.to(tl.int64) * x_c * ALIGN + past.to(tl.int64) * x_t * ALIGN
        sums = tl.zeros((SLOTS, BO), dtype=tl.float32)
        for tile in range(first_tile, last_tile):
            n = (tile // tiles).to(tl.int64)
            p = tile % tiles * PIXELS + tl.arange(0, PIXELS)
            s, v = p // (units * ALIGN), (p % (units * ALIGN)).to(tl.int64)
            live_pixel = s < out_frames
            at_s = s.to(tl.int64)
            x_pixel = n * x_n * ALIGN + at_s * stride * x_t * ALIGN + v * x_v
            frame = past[:, None] + (s * stride)[None, :]
            inside = (inside_x[:, None] & live_pixel[None, :]) & ((frame >= 0) & (frame < T))
            panel = tl.load(x + (x_row[:, None] + x_pixel[None, :]), mask=inside, other=0.0)
            d_pixel = n * d_n * ALIGN + at_s * d_t * ALIGN + v * d_v
            at_y = d_pixel[:, None] + (o.to(tl.int64) * d_c * ALIGN)[None, :]
            gradient = tl.load(dy + at_y, mask=live_pixel[:, None] & (o < O)[None, :], other=0.0)
            sums = tl.dot(panel, gradient, sums, input_precision=PRECISION)
        at = slot.to(tl.int64)[:, None] * BO + row[None, :]
        stored = live[:, None]
        if place is not None:
            at = tl.load(place + at, mask=stored, other=-1).to(tl.int64)
            stored = stored & (at >= 0)
        tl.store(partial + (split * total + at), sums, mask=stored)


@on_its_device
def temporal_conv_dx(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    stride: int,
    dilation: int,
    frames: int,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    tf32: bool | None = None,
) -> Tensor:
    """dx (N, I, frames, V) of dy (N, O, To, V), any strides; plus residual; 0 where gate is not positive.

    residual, gate: (N, I, frames, V) or None, any strides.

    Raises:
        ValueError: no kernel takes this dtype.
    """
    (out_channels, in_channels, taps) = shape
    refuse(unsupported(dy.dtype))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(dy.dtype, tf32)
    config = configs.temporal_conv_dx(capability_of(dy), arithmetic, plan.columns)
    batch, _, out_frames, vertices = dy.shape
    dx = dy.new_empty((batch, in_channels, frames, vertices))
    if dx.numel() == 0:
        return dx
    entries = plan.entry_row.numel()
    dy, align = readable(dy, entries * plan.rows / out_channels * frames / out_frames, arithmetic)
    units = triton.cdiv(vertices, align)
    tiles = triton.cdiv(frames * units * align, config.pixels)
    temporal_conv_dx_kernel[(batch * tiles * plan.column_groups,)](
        dy, plan.weights(values, dy.dtype), dx, plan.column_ptr, plan.entry_row, plan.entry_tap, plan.entry_slot,
        residual, gate, *strides(dy, align), *strides(residual), *strides(gate),
        out_channels, in_channels, frames, vertices, taps, out_frames, units, plan.column_groups, tiles, stride, dilation,
        (taps - 1) // 2, BO=plan.rows, COLUMNS=plan.columns, PIXELS=config.pixels, SLOTS=config.slots, ALIGN=align,
        PRECISION=precisions(arithmetic)["PRECISION"], **config.options(),
    )  # fmt: skip
    return dx


@on_its_device
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
    """(dw (blocks, bi, bo), dbias (O,)) of x (N, I, T, V) and dy (N, O, To, V), any strides; of the dtype of values.

    masked: bool (blocks,) or None; scale: 0-dim; adds scale * values to the gradient of the masked blocks.

    Raises:
        ValueError: no kernel takes this dtype.
    """
    (out_channels, in_channels, taps) = shape
    refuse(unsupported(x.dtype))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(x.dtype, tf32)
    config = configs.temporal_conv_dw(capability_of(x), arithmetic, plan.rows)
    batch, _, frames, vertices = x.shape
    out_frames = dy.shape[2]
    dw = torch.empty(values.shape, dtype=values.dtype, device=x.device)
    dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(values.dtype)
    if values.numel() == 0:
        return dw, dbias
    steps = triton.cdiv(plan.slots, plan.groups * config.slots) * plan.groups  # of about so many sums, each reads rows of dy
    reads = (plan.slots / stride + steps * plan.rows) / (in_channels + out_channels)
    (x, align), (dy, dy_align) = (readable(t, reads, arithmetic, clean=True) for t in (x, dy))
    align = min(align, dy_align)
    units = triton.cdiv(vertices, align)
    tiles = triton.cdiv(out_frames * units * align, config.pixels)
    splits = max(1, min(batch * tiles, configs.PROGRAMS_OF_DW // plan.groups))
    partial = torch.empty((splits, values.numel()), dtype=torch.float32, device=x.device)
    temporal_conv_dw_kernel[(plan.groups * splits,)](
        x, dy, partial, plan.row_ptr, plan.channel, plan.tap, plan.place, *strides(x, align), *strides(dy, align),
        out_channels, in_channels, frames, taps, out_frames, units, plan.groups, batch, tiles,
        triton.cdiv(batch * tiles, splits), values.numel(), stride, dilation, (taps - 1) // 2,
        BO=plan.rows, PIXELS=config.pixels, SLOTS=config.slots, ALIGN=align,
        PRECISION=precisions(arithmetic)["PRECISION"], **config.options(),
    )  # fmt: skip
    return sum_parts(partial, dw, values, masked, scale), dbias
