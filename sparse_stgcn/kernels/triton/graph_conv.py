"""Block-sparse graph_conv in Triton, forward. Definition of correct: kernels/reference.py.

    y[n,o,t,w] = act( scale[o] * sum over k, v of A_k[v,w] (b_k[o] + sum over live (o,i,k) of W[o,i,k] x[n,i,t,v])
                      + shift[o] + residual[n,o,t,w] )

A program owns ROWS output channels of one row of blocks and a few frames of one sample. For each subset k of the graph:

    x, gathered (frames * V, slots)  @  weights (slots, rows)  ->  hidden (frames * V, rows)    -> as (frames * rows, V)
    hidden (frames * rows, V)  @  A_k (V, V)  ->  added to y (frames * rows, V), in registers

so that neither W_k x nor x A_k ever reaches memory. An adjacency per channel makes the second line a batch of `rows`
products (frames, V) @ (V, V). V is padded to 32 or 64 with zeros of A. Skipped: dead slots, and subsets that a row of
blocks does not use and that bring no bias. Fused: scale, shift, residual, ReLU. Contract: sums in float32, rounded once;
hidden stays float32 (16-bit input multiplies it in three TF32 products, which keep its accuracy); addresses are 64-bit;
every load and store of a tile is masked; the order of a sum depends on the pattern alone.
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
def to_rows(pixels, FRAMES: tl.constexpr, ROWS: tl.constexpr, JOINTS: tl.constexpr):
    """(FRAMES * JOINTS, ROWS) -> (FRAMES * ROWS, JOINTS)."""
    cube = tl.permute(tl.reshape(pixels, (FRAMES, JOINTS, ROWS)), (0, 2, 1))
    return tl.reshape(cube, (FRAMES * ROWS, JOINTS))


@triton.jit
def to_pixels(rows, FRAMES: tl.constexpr, ROWS: tl.constexpr, JOINTS: tl.constexpr):
    """(FRAMES * ROWS, JOINTS) -> (FRAMES * JOINTS, ROWS)."""
    cube = tl.permute(tl.reshape(rows, (FRAMES, ROWS, JOINTS)), (0, 2, 1))
    return tl.reshape(cube, (FRAMES * JOINTS, ROWS))


@triton.jit
def through_graph(
    rows, adjacency, a_v, a_w, a_o, o, O, V, W,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, JOINTS: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows (FRAMES * ROWS, JOINTS) times A (v, w), which is zero beyond (V, W); of each of its channels o, if per channel."""
    joint = tl.arange(0, JOINTS)
    at = (joint.to(tl.int64) * a_v)[:, None] + (joint.to(tl.int64) * a_w)[None, :]
    edge = (joint < V)[:, None] & (joint < W)[None, :]
    if PER_CHANNEL:
        at_o = (o.to(tl.int64) * a_o)[:, None, None] + at[None, :, :]
        graph = tl.load(adjacency + at_o, mask=(o < O)[:, None, None] & edge[None, :, :], other=0.0)
        cube = tl.permute(tl.reshape(rows, (FRAMES, ROWS, JOINTS)), (1, 0, 2))
        product = tl.dot(cube, graph.to(tl.float32), input_precision=PRECISION)
        return tl.reshape(tl.permute(product, (1, 0, 2)), (FRAMES * ROWS, JOINTS))
    else:
        graph = tl.load(adjacency + at, mask=edge, other=0.0)
        return tl.dot(rows, graph.to(tl.float32), input_precision=PRECISION)


@triton.jit
def hidden_rows(
    x, x_pixel, x_c, readable, live_pixel, weights, channels, begin, end, inner, bias, o, O, I,
    BO: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, JOINTS: tl.constexpr, SLOTS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """bias[o] + sum over the slots begin..end-1 of their weights times x, as (FRAMES * ROWS, JOINTS); zero beyond V."""
    hidden = tl.zeros((FRAMES * JOINTS, ROWS), dtype=tl.float32)
    for first in range(begin, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        live = slot < end
        channel = tl.load(channels + slot, mask=live, other=0)
        row = channel.to(tl.int64) * x_c * ALIGN
        inside = readable[:, None] & (live & (channel < I))[None, :]
        panel = tl.load(x + (x_pixel[:, None] + row[None, :]), mask=inside, other=0.0)
        weight = slot.to(tl.int64)[:, None] * BO + inner + tl.arange(0, ROWS)[None, :]
        w = tl.load(weights + weight, mask=live[:, None], other=0.0)
        hidden = tl.dot(panel, w, hidden, input_precision=PRECISION)
    if bias is not None:
        hidden += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    hidden = tl.where(live_pixel[:, None], hidden, 0.0)
    return to_rows(hidden, FRAMES, ROWS, JOINTS)


@triton.jit
def graph_conv_forward_kernel(
    x, weights, adjacency, y, row_ptr, channels, bias, scale, shift, residual,
    x_n, x_c, x_t, x_v, y_n, y_c, y_t, a_n, a_k, a_o, a_v, a_w, r_n, r_c, r_t, r_v,
    O, I, T, V, K, units, parts, tiles,
    BO: tl.constexpr, ROWS: tl.constexpr, FRAMES: tl.constexpr, JOINTS: tl.constexpr, SLOTS: tl.constexpr,
    ALIGN: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr, GRAPH_PRECISION: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts  # neighbours share their frames, so that x is read from L2
    g, inner = part * ROWS // BO, part * ROWS % BO
    n = (tl.program_id(0) // parts // tiles).to(tl.int64)
    first_frame = tl.program_id(0) // parts % tiles * FRAMES
    p = tl.arange(0, FRAMES * JOINTS)
    t, v = first_frame + p // JOINTS, p % JOINTS
    x_pixel = n * x_n * ALIGN + t.to(tl.int64) * x_t * ALIGN + v.to(tl.int64) * x_v
    o = part * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((FRAMES * ROWS, JOINTS), dtype=tl.float32)
    for k in range(K):
        begin, end = tl.load(row_ptr + g * K + k), tl.load(row_ptr + g * K + k + 1)
        if bias is not None or begin < end:
            rows = hidden_rows(
                x, x_pixel, x_c, (t < T) & (v < units * ALIGN), (t < T) & (v < V), weights, channels, begin, end, inner,
                bias if bias is None else bias + k * O, o, O, I, BO, FRAMES, ROWS, JOINTS, SLOTS, ALIGN, PRECISION,
            )  # fmt: skip
            sums += through_graph(
                rows, adjacency + (n * a_n + k * a_k), a_v, a_w, a_o, o, O, V, V,
                FRAMES, ROWS, JOINTS, PER_CHANNEL, GRAPH_PRECISION,
            )  # fmt: skip
    row, joint = tl.arange(0, FRAMES * ROWS), tl.arange(0, JOINTS).to(tl.int64)[None, :]
    frame, channel = (first_frame + row // ROWS).to(tl.int64)[:, None], (part * ROWS + row % ROWS).to(tl.int64)[:, None]
    live = (channel < O) & (frame < T) & (joint < V)
    at_residual = n * r_n + channel * r_c + frame * r_t + joint * r_v
    sums = epilogue(sums, channel, O, scale, shift, residual, at_residual, None, 0, live, RELU)
    tl.store(y + (n * y_n + channel * y_c + frame * y_t + joint), sums.to(y.dtype.element_ty), mask=live)


def adjacency_strides(adjacency: Tensor) -> tuple[int, int, int, int, int]:
    """Strides (n, k, o, v, w) of a shared (K, V, V), per sample (N, K, V, V) or per channel (N, K, O, V, V) adjacency."""
    n = 0 if adjacency.dim() == 3 else adjacency.stride(0)
    o = 0 if adjacency.dim() < 5 else adjacency.stride(2)
    return n, adjacency.stride(-3 if adjacency.dim() < 5 else 1), o, adjacency.stride(-2), adjacency.stride(-1)


def joints_of(vertices: int) -> int:
    """The vertices of a frame as a tile holds them."""
    return next(joints for joints in configs.JOINTS if vertices <= joints)


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
    padded: bool = False,
    tf32: bool | None = None,
) -> Tensor:
    """Y = act(scale[o] * sum over k, v of A_k[v,w] (b_k[o] + sum over live i of W_k[o,i] X[n,i,t,v]) + shift[o] + residual).

    Args:
        x: (N, I, T, V) of float32, bfloat16 or float16, any strides; V up to 64, or 32 if the adjacency is per channel.
        values: (blocks, bi, bo), rounded to the dtype of x; the pattern's taps are the subsets.
        adjacency: shared (K, V, V), per sample (N, K, V, V) or per channel (N, K, O, V, V), any strides.
        bias: (K, O) or None. scale, shift: (O,) or None. residual: (N, O, T, V) or None, any strides.
        row_ptr, input, tap: the pattern's index, on the device of x.
        shape, block: (O, I, K), (bo, bi).
        padded: return a view with frames at multiples of 16 bytes, which a following temporal_conv reads faster.
        tf32: multiply float32 in TF32. None: as torch's own products do, see torch.backends.cuda.matmul.fp32_precision.

    Returns:
        (N, O, T, V), of the dtype of x, contiguous unless `padded`.

    Raises:
        ValueError: no kernel takes this dtype or V.
    """
    out_channels, in_channels, subsets = shape
    batch, _, frames, vertices = x.shape
    refuse(unsupported(x.dtype, vertices, adjacency.dim()))
    plan, arithmetic = plan_of(row_ptr, input, tap, shape, block), arithmetic_of(x.dtype, tf32)
    joints, per_channel = joints_of(vertices), adjacency.dim() == 5
    config = configs.graph_conv("graph_conv_forward", capability_of(x), arithmetic, plan.rows, joints, per_channel)
    y = new_frames(x, (batch, out_channels, frames, vertices), padded)
    if y.numel() == 0:
        return y
    x, align = readable(x, plan.slots / in_channels, arithmetic)
    parts, tiles = plan.groups * (plan.rows // config.rows), triton.cdiv(frames, config.frames)
    graph_conv_forward_kernel[(batch * tiles * parts,)](
        x, plan.weights(values, x.dtype), adjacency, y, plan.row_ptr, plan.channel,
        None if bias is None else bias.contiguous(), scale, shift, residual,
        *strides(x, align), *y.stride()[:3], *adjacency_strides(adjacency), *strides(residual),
        out_channels, in_channels, frames, vertices, subsets, triton.cdiv(vertices, align), parts, tiles,
        BO=plan.rows, ROWS=config.rows, FRAMES=config.frames, JOINTS=joints, SLOTS=config.slots, ALIGN=align,
        PER_CHANNEL=per_channel, RELU=relu, **precisions(arithmetic),
        **config.options(),
    )  # fmt: skip
    return y
