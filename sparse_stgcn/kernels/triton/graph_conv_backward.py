"""Gradients of graph_conv in x and W, in Triton. Definition of correct: autograd of kernels/reference.py.

    dx[n,i,t,v] = sum over k, w of A_k[v,w] sum over live (o,i,k) of W[o,i,k] dy[n,o,t,w]
    dw[o,i,k]   = sum over n, t, v of x[n,i,t,v] sum over w of A_k[v,w] dy[n,o,t,w]

dx: a program owns COLUMNS input channels and a few frames, and is the forward pass with the roles of channels and of v and w
exchanged: weights first, then the graph. With an adjacency per channel o the graph goes first, channel by channel, and
the weights multiply what comes out of it. Fused: plus residual; 0 where gate is not positive (a ReLU that made x).

dw: a program owns ROWS output channels and a share of the frames. It brings dy through the graph in registers, STRIP joints
at a time, and multiplies it with the gathered rows of x; a second pass adds the shares up in a fixed order, and the group
lasso's term.

Contract: sums in float32; addresses are 64-bit; every load and store of a tile is masked; no atomics; neither W' dy nor
A dy ever reaches memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import on_its_device
from . import configs
from .graph_conv import adjacency_strides, joints_of, through_graph, to_pixels, to_rows
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
def load_rows(dy, at_n, first_frame, d_c, d_t, d_v, o, O, T, V, width, FRAMES: tl.constexpr, ROWS: tl.constexpr,
              JOINTS: tl.constexpr):  # fmt: skip
    """dy of the channels o (FRAMES * ROWS,) of each frame, as float32 (FRAMES * ROWS, JOINTS); zero beyond V."""
    row, w = tl.arange(0, FRAMES * ROWS), tl.arange(0, JOINTS)
    frame = first_frame + row // ROWS
    at = at_n + (o.to(tl.int64) * d_c + frame.to(tl.int64) * d_t)[:, None] + (w.to(tl.int64) * d_v)[None, :]
    live = ((o < O) & (frame < T))[:, None] & (w < width)[None, :]
    return tl.where((w < V)[None, :], tl.load(dy + at, mask=live, other=0.0).to(tl.float32), 0.0)


@triton.jit
def graph_conv_dx_kernel(
    dy, weights, adjacency, dx, column_ptr, entry_row, entry_slot, residual, gate,
    d_n, d_c, d_t, d_v, a_n, a_k, a_o, a_v, a_w, r_n, r_c, r_t, r_v, g_n, g_c, g_t, g_v,
    O, I, T, V, K, units, parts, tiles,
    BO: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, FRAMES: tl.constexpr,
    JOINTS: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
    GRAPH_PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    h, inner = part * PART // COLUMNS, part * PART % COLUMNS
    n = (tl.program_id(0) // parts // tiles).to(tl.int64)
    first_frame = tl.program_id(0) // parts % tiles * FRAMES
    column = inner + tl.arange(0, PART)
    if PER_CHANNEL:
        pixels = tl.zeros((FRAMES * JOINTS, PART), dtype=tl.float32)
    else:
        sums = tl.zeros((FRAMES * PART, JOINTS), dtype=tl.float32)
    for k in range(K):
        begin, end = tl.load(column_ptr + h * K + k), tl.load(column_ptr + h * K + k + 1)
        at_a = n * a_n + k * a_k
        if PER_CHANNEL:
            for step in range(begin * (BO // ROWS), end * (BO // ROWS)):
                entry, within = step // (BO // ROWS), step % (BO // ROWS) * ROWS
                first = tl.load(entry_row + entry) * BO + within
                o = first + tl.arange(0, FRAMES * ROWS) % ROWS
                rows = load_rows(dy, n * d_n * ALIGN, first_frame, d_c * ALIGN, d_t * ALIGN, d_v, o, O, T, V,
                                 units * ALIGN, FRAMES, ROWS, JOINTS)  # fmt: skip
                rows = through_graph(rows, adjacency + at_a, a_w, a_v, a_o, first + tl.arange(0, ROWS), O, V, V,
                                     FRAMES, ROWS, JOINTS, True, GRAPH_PRECISION)  # fmt: skip
                # A product takes at least 16 terms (configs.DEPTH), the registers 8 adjacencies: every other term is 0.
                hidden = to_pixels(rows, FRAMES, ROWS, JOINTS)
                hidden = tl.reshape(tl.join(hidden, tl.zeros_like(hidden)), (FRAMES * JOINTS, 2 * ROWS))
                term = tl.arange(0, 2 * ROWS)
                at_slot = column.to(tl.int64)[None, :] + entry * COLUMNS + term[:, None] * 0
                slot = tl.load(entry_slot + at_slot, mask=(term % 2 == 0)[:, None], other=-1)
                at_w = slot.to(tl.int64) * BO + (within + term // 2)[:, None]
                w = tl.load(weights + at_w, mask=slot >= 0, other=0.0)
                pixels = tl.dot(hidden, w.to(tl.float32), pixels, input_precision=GRAPH_PRECISION)
        elif begin < end:
            p = tl.arange(0, FRAMES * JOINTS)
            t, v = first_frame + p // JOINTS, p % JOINTS
            d_pixel = n * d_n * ALIGN + t.to(tl.int64) * d_t * ALIGN + v.to(tl.int64) * d_v
            hidden = tl.zeros((FRAMES * JOINTS, PART), dtype=tl.float32)
            for first in range(begin * BO, end * BO, SLOTS):
                q = first + tl.arange(0, SLOTS)
                live = q < end * BO
                o = tl.load(entry_row + q // BO, mask=live, other=0) * BO + q % BO
                inside = ((t < T) & (v < units * ALIGN))[:, None] & (live & (o < O))[None, :]
                at = d_pixel[:, None] + (o.to(tl.int64) * d_c * ALIGN)[None, :]
                panel = tl.load(dy + at, mask=inside, other=0.0)
                at_slot = (q // BO).to(tl.int64)[:, None] * COLUMNS + column[None, :]
                slot = tl.load(entry_slot + at_slot, mask=live[:, None], other=-1)
                w = tl.load(weights + (slot.to(tl.int64) * BO + (q % BO)[:, None]), mask=slot >= 0, other=0.0)
                hidden = tl.dot(panel, w, hidden, input_precision=PRECISION)
            hidden = tl.where(((t < T) & (v < V))[:, None], hidden, 0.0)
            sums += through_graph(
                to_rows(hidden, FRAMES, PART, JOINTS), adjacency + at_a, a_w, a_v, a_o, column, I, V, V,
                FRAMES, PART, JOINTS, False, GRAPH_PRECISION,
            )  # fmt: skip
    if PER_CHANNEL:
        sums = to_rows(pixels, FRAMES, PART, JOINTS)
    row, joint = tl.arange(0, FRAMES * PART), tl.arange(0, JOINTS).to(tl.int64)[None, :]
    frame, channel = (first_frame + row // PART).to(tl.int64)[:, None], (part * PART + row % PART).to(tl.int64)[:, None]
    live_x = (channel < I) & (frame < T) & (joint < V)
    at_residual = n * r_n + channel * r_c + frame * r_t + joint * r_v
    at_gate = n * g_n + channel * g_c + frame * g_t + joint * g_v
    sums = epilogue(sums, channel, I, None, None, residual, at_residual, gate, at_gate, live_x, False)
    tl.store(dx + (((n * I + channel) * T + frame) * V + joint), sums.to(dx.dtype.element_ty), mask=live_x)


@triton.jit
def graph_conv_dw_kernel(
    x, dy, adjacency, partial, row_ptr, channels, place,
    x_n, x_c, x_t, x_v, d_n, d_c, d_t, d_v, a_n, a_k, a_o, a_v, a_w,
    O, I, T, V, K, units, parts, samples, tiles, share, total,
    BO: tl.constexpr, ROWS: tl.constexpr, FRAMES: tl.constexpr, JOINTS: tl.constexpr, STRIP: tl.constexpr,
    SLOTS: tl.constexpr, ALIGN: tl.constexpr, PER_CHANNEL: tl.constexpr, GRAPH_PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    g, inner = part * ROWS // BO, part * ROWS % BO
    split = (tl.program_id(0) // parts).to(tl.int64)
    first_tile = tl.program_id(0) // parts * share
    last_tile = tl.minimum(first_tile + share, samples * tiles)
    p = tl.arange(0, FRAMES * STRIP)
    o, o_of_row = part * ROWS + tl.arange(0, ROWS), part * ROWS + tl.arange(0, FRAMES * ROWS) % ROWS
    for k in range(K):
        begin, end = tl.load(row_ptr + g * K + k), tl.load(row_ptr + g * K + k + 1)
        for first in range(begin, end, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            live = slot < end
            channel = tl.load(channels + slot, mask=live, other=0)
            sums = tl.zeros((SLOTS, ROWS), dtype=tl.float32)
            for tile in range(first_tile, last_tile):
                n, first_frame = (tile // tiles).to(tl.int64), tile % tiles * FRAMES
                t, at_a = first_frame + p // STRIP, n * a_n + k * a_k
                for first_v in range(0, JOINTS, STRIP):
                    v = first_v + p % STRIP
                    rows = tl.zeros((FRAMES * ROWS, STRIP), dtype=tl.float32)
                    for first_w in range(0, JOINTS, STRIP):
                        arriving = load_rows(
                            dy, n * d_n * ALIGN + first_w * d_v, first_frame, d_c * ALIGN, d_t * ALIGN, d_v, o_of_row, O, T,
                            V - first_w, units * ALIGN - first_w, FRAMES, ROWS, STRIP,
                        )  # fmt: skip
                        rows += through_graph(
                            arriving, adjacency + (at_a + first_w * a_w + first_v * a_v), a_w, a_v, a_o, o, O, V - first_w,
                            V - first_v, FRAMES, ROWS, STRIP, PER_CHANNEL, GRAPH_PRECISION,
                        )  # fmt: skip
                    x_pixel = n * x_n * ALIGN + t.to(tl.int64) * x_t * ALIGN + v.to(tl.int64) * x_v
                    inside = (live & (channel < I))[:, None] & ((t < T) & (v < units * ALIGN))[None, :]
                    at_x = (channel.to(tl.int64) * x_c * ALIGN)[:, None] + x_pixel[None, :]
                    panel = tl.where((v < V)[None, :], tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32), 0.0)
                    sums = tl.dot(panel, to_pixels(rows, FRAMES, ROWS, STRIP), sums, input_precision=GRAPH_PRECISION)
            at = slot.to(tl.int64)[:, None] * BO + inner + tl.arange(0, ROWS)[None, :]
            stored = live[:, None]
            if place is not None:
                at = tl.load(place + at, mask=stored, other=-1).to(tl.int64)
                stored = stored & (at >= 0)
            tl.store(partial + (split * total + at), sums, mask=stored)


@on_its_device
def graph_conv_dx(
    dy: Tensor,
    values: Tensor,
    adjacency: Tensor,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    tf32: bool | None = None,
) -> Tensor:
    """dx (N, I, T, V) of dy (N, O, T, V), any strides; plus residual; 0 where gate is not positive.

    values, adjacency: as graph_conv. residual, gate: (N, I, T, V) or None, any strides.

    Raises:
        ValueError: no kernel takes this dtype or V.
    """
    out_channels, in_channels, subsets = shape
    batch, _, frames, vertices = dy.shape
    refuse(unsupported(dy.dtype, vertices, adjacency.dim()))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(dy.dtype, tf32)
    joints, per_channel = joints_of(vertices), adjacency.dim() == 5
    config = configs.graph_conv("graph_conv_dx", capability_of(dy), arithmetic, plan.columns, joints, per_channel)
    dx = dy.new_empty((batch, in_channels, frames, vertices))
    if dx.numel() == 0:
        return dx
    dy, align = readable(dy, plan.entry_row.numel() * plan.rows / out_channels, arithmetic)
    parts, tiles = plan.column_groups * (plan.columns // config.rows), triton.cdiv(frames, config.frames)
    graph_conv_dx_kernel[(batch * tiles * parts,)](
        dy, plan.weights(values, dy.dtype), adjacency, dx, plan.column_ptr, plan.entry_row, plan.entry_slot, residual, gate,
        *strides(dy, align), *adjacency_strides(adjacency), *strides(residual), *strides(gate),
        out_channels, in_channels, frames, vertices, subsets, triton.cdiv(vertices, align), parts, tiles,
        BO=plan.rows, COLUMNS=plan.columns, PART=config.rows, ROWS=8, FRAMES=config.frames, JOINTS=joints,
        SLOTS=config.slots, ALIGN=align, PER_CHANNEL=per_channel, **precisions(arithmetic),
        **config.options(),
    )  # fmt: skip
    return dx


@on_its_device
def graph_conv_dw(
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
    """(dw (blocks, bi, bo), dbias (K, O)) of x (N, I, T, V) and dy (N, O, T, V), any strides; of the dtype of values.

    adjacency: as graph_conv. masked: bool (blocks,) or None; scale: 0-dim; adds scale * values on the masked blocks.

    Raises:
        ValueError: no kernel takes this dtype or V.
    """
    out_channels, in_channels, subsets = shape
    batch, _, frames, vertices = x.shape
    refuse(unsupported(x.dtype, vertices, adjacency.dim()))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(x.dtype, tf32)
    joints, per_channel = joints_of(vertices), adjacency.dim() == 5
    config = configs.graph_conv("graph_conv_dw", capability_of(x), arithmetic, plan.rows, joints, per_channel)
    dw = torch.empty(values.shape, dtype=values.dtype, device=x.device)
    dbias = _dbias(dy, adjacency).to(values.dtype)
    if values.numel() == 0:
        return dw, dbias
    steps = triton.cdiv(plan.slots, plan.groups * subsets * config.slots) * plan.groups * subsets
    reads = (plan.slots + steps * plan.rows) / (in_channels + out_channels)
    (x, align), (dy, dy_align) = (readable(t, reads, arithmetic) for t in (x, dy))
    align = min(align, dy_align)
    parts, tiles = plan.groups * (plan.rows // config.rows), triton.cdiv(frames, config.frames)
    splits = max(1, min(batch * tiles, configs.PROGRAMS_OF_DW // parts))
    partial = torch.empty((splits, values.numel()), dtype=torch.float32, device=x.device)
    graph_conv_dw_kernel[(parts * splits,)](
        x, dy, adjacency, partial, plan.row_ptr, plan.channel, plan.place,
        *strides(x, align), *strides(dy, align), *adjacency_strides(adjacency),
        out_channels, in_channels, frames, vertices, subsets, triton.cdiv(vertices, align), parts, batch, tiles,
        triton.cdiv(batch * tiles, splits), values.numel(),
        BO=plan.rows, ROWS=config.rows, FRAMES=config.frames, JOINTS=joints, STRIP=configs.STRIP, SLOTS=config.slots,
        ALIGN=align, PER_CHANNEL=per_channel, GRAPH_PRECISION=precisions(arithmetic)["GRAPH_PRECISION"],
        **config.options(),
    )  # fmt: skip
    return sum_parts(partial, dw, values, masked, scale), dbias


def _dbias(dy: Tensor, adjacency: Tensor) -> Tensor:
    """dbias[k,o] = sum over n, t, w of dy[n,o,t,w] sum over v of A_k[v,w], in float32: two small sums."""
    of_joint, arriving = dy.sum(2, dtype=torch.float32), adjacency.sum(-2, dtype=torch.float32)
    if adjacency.dim() == 3:
        return (of_joint.sum(0)[None] * arriving[:, None]).sum(-1)
    arriving = arriving[:, :, None] if adjacency.dim() == 4 else arriving
    return (of_joint[:, None] * arriving).sum((0, 3))
