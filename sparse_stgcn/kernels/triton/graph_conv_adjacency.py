"""Gradient of graph_conv in its adjacency, in Triton. Definition of correct: autograd of kernels/reference.py.

    dA[n,k,o,v,w] = sum over t of h[n,k,o,t,v] dy[n,o,t,w],   h = b_k[o] + sum over live (o,i,k) of W[o,i,k] x[n,i,t,v]

summed over o for an adjacency per sample, and over n too for a shared one. h is computed again, ROWS channels and a few
frames at a time, as in the forward pass; it never reaches memory. Per program the sum is a (V, V) tile in registers (one
for each channel, if per channel). A shared or per-sample adjacency splits its frames and channels over programs, and a
second pass adds their tiles up in order; per channel, a program owns its tiles and writes them itself.

Contract: sums in float32; addresses are 64-bit; every load and store of a tile is masked; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import on_its_device
from . import configs
from .graph_conv import hidden_rows, joints_of
from .graph_conv_backward import load_rows
from .launch import arithmetic_of, capability_of, precisions, readable, refuse, strides, sum_parts, unsupported
from .plan import plan_of


@triton.jit
def graph_conv_dadjacency_kernel(
    x, dy, weights, partial, row_ptr, channels, bias,
    x_n, x_c, x_t, x_v, d_n, d_c, d_t, d_v,
    O, I, T, V, K, units, parts, outer, samples, tiles, share,
    BO: tl.constexpr, ROWS: tl.constexpr, FRAMES: tl.constexpr, JOINTS: tl.constexpr, SLOTS: tl.constexpr,
    ALIGN: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, GRAPH_PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    g, inner = part * ROWS // BO, part * ROWS % BO
    k = tl.program_id(0) // parts % K
    owner = tl.program_id(0) // (parts * K) % outer
    split = tl.program_id(0) // (parts * K) // outer
    first_tile = split * share
    last_tile = tl.minimum(first_tile + share, samples * tiles)
    p = tl.arange(0, FRAMES * JOINTS)
    o = part * ROWS + tl.arange(0, ROWS)
    begin, end = tl.load(row_ptr + g * K + k), tl.load(row_ptr + g * K + k + 1)
    if PER_CHANNEL:  # noqa: SIM108 (decided when compiled)
        sums = tl.zeros((ROWS, JOINTS, JOINTS), dtype=tl.float32)
    else:
        sums = tl.zeros((JOINTS, JOINTS), dtype=tl.float32)
    for tile in range(first_tile, last_tile):
        n, first_frame = (owner + tile // tiles).to(tl.int64), tile % tiles * FRAMES
        t, v = first_frame + p // JOINTS, p % JOINTS
        x_pixel = n * x_n * ALIGN + t.to(tl.int64) * x_t * ALIGN + v.to(tl.int64) * x_v
        rows = hidden_rows(
            x, x_pixel, x_c, (t < T) & (v < units * ALIGN), (t < T) & (v < V), weights, channels, begin, end, inner,
            bias if bias is None else bias + k * O, o, O, I, BO, FRAMES, ROWS, JOINTS, SLOTS, ALIGN, PRECISION,
        )  # fmt: skip
        o_of_row = part * ROWS + tl.arange(0, FRAMES * ROWS) % ROWS
        gradient = load_rows(dy, n * d_n * ALIGN, first_frame, d_c * ALIGN, d_t * ALIGN, d_v, o_of_row, O, T, V,
                             units * ALIGN, FRAMES, ROWS, JOINTS)  # fmt: skip
        if PER_CHANNEL:
            left = tl.permute(tl.reshape(rows, (FRAMES, ROWS, JOINTS)), (1, 2, 0))
            right = tl.permute(tl.reshape(gradient, (FRAMES, ROWS, JOINTS)), (1, 0, 2))
            sums = tl.dot(left, right, sums, input_precision=GRAPH_PRECISION)
        else:
            sums = tl.dot(tl.trans(rows), gradient, sums, input_precision=GRAPH_PRECISION)
    joint = tl.arange(0, JOINTS)
    edge = (joint < V)[:, None] & (joint < V)[None, :]
    at = (joint.to(tl.int64) * V)[:, None] + joint.to(tl.int64)[None, :]
    matrix = owner.to(tl.int64) * K + k
    if PER_CHANNEL:
        at = (matrix * O + o)[:, None, None] * V * V + at[None, :, :]
        edge = (o < O)[:, None, None] & edge[None, :, :]
    else:
        at += ((split.to(tl.int64) * parts + part) * outer * K + matrix) * V * V
    tl.store(partial + at, sums.to(partial.dtype.element_ty), mask=edge)


@on_its_device
def graph_conv_dadjacency(
    x: Tensor,
    dy: Tensor,
    values: Tensor,
    adjacency: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    input: Tensor,
    tap: Tensor,
    shape: tuple[int, int, int],
    block: tuple[int, int],
    *,
    tf32: bool | None = None,
) -> Tensor:
    """dA of the shape and dtype of adjacency, contiguous; of x (N, I, T, V) and dy (N, O, T, V), any strides.

    values, bias: as graph_conv. Of adjacency, only shape and dtype are read.

    Raises:
        ValueError: no kernel takes this dtype or V.
    """
    out_channels, in_channels, subsets = shape
    batch, _, frames, vertices = x.shape
    refuse(unsupported(x.dtype, vertices, adjacency.dim()))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(x.dtype, tf32)
    joints, per_channel = joints_of(vertices), adjacency.dim() == 5
    config = configs.graph_conv("graph_conv_dadjacency", capability_of(x), arithmetic, plan.rows, joints, per_channel)
    da = torch.empty(adjacency.shape, dtype=adjacency.dtype, device=x.device)
    if da.numel() == 0:
        return da
    reads = (plan.slots + subsets * out_channels) / (in_channels + out_channels)
    (x, align), (dy, dy_align) = (readable(t, reads, arithmetic) for t in (x, dy))
    align = min(align, dy_align)
    parts, tiles = plan.groups * (plan.rows // config.rows), triton.cdiv(frames, config.frames)
    outer, samples = (1, batch) if adjacency.dim() == 3 else (batch, 1)
    splits = 1 if per_channel else max(1, min(samples * tiles, configs.PROGRAMS_OF_DW // (parts * subsets * outer)))
    sums_shape = da.shape if per_channel else (splits * parts, *da.shape)
    partial = da if per_channel else torch.empty(sums_shape, dtype=torch.float32, device=x.device)
    graph_conv_dadjacency_kernel[(parts * subsets * outer * splits,)](
        x, dy, plan.weights(values, x.dtype), partial, plan.row_ptr, plan.channel,
        None if bias is None else bias.contiguous(), *strides(x, align), *strides(dy, align),
        out_channels, in_channels, frames, vertices, subsets, triton.cdiv(vertices, align), parts, outer, samples, tiles,
        triton.cdiv(samples * tiles, splits),
        BO=plan.rows, ROWS=config.rows, FRAMES=config.frames, JOINTS=joints, SLOTS=config.slots, ALIGN=align,
        PER_CHANNEL=per_channel, **precisions(arithmetic),
        **config.options(),
    )  # fmt: skip
    return da if per_channel else sum_parts(partial, da)
