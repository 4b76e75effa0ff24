"""Block-sparse graph_conv in Triton, forward. Definition of correct: kernels/reference.py.

    y[n,o,t,w] = act( scale[o] * sum over k, v of A_k[v,w] (b_k[o] + sum over live (o,i,k) of W[o,i,k] x[n,i,t,v])
                      + shift[o] + residual[n,o,t,w] )

A program owns one row of blocks (bo output channels) and a few frames of one sample. For each subset k of the graph:

    x, gathered (frames * V, slots)  @  values (slots, bo)  ->  h (frames * V, bo)     -> as (frames * bo, V)
    h (frames * bo, V)  @  A_k (V, V)  ->  added to y (frames * bo, V), in registers

so that neither W_k x nor x A_k ever reaches memory. V is padded to 16, 32 or 64 with zeros of A. Skipped: dead blocks,
and subsets that a row of blocks does not use and that bring no bias. Fused: scale, shift, residual, ReLU. Contract:
sums in float32, rounded once; h stays float32 (16-bit input multiplies it in three TF32 products, which keep its
accuracy); addresses are 64-bit; every load and store of a tile is masked; the order of a sum depends on the pattern alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .temporal_conv import arithmetic_of, capability_of, unsupported


@triton.jit
def first_of_subset(taps, begin, end, k):
    """The first block of begin..end-1, sorted by subset, whose subset is k or later."""
    while begin < end:
        middle = (begin + end) // 2
        if tl.load(taps + middle) < k:
            begin = middle + 1
        else:
            end = middle
    return begin


@triton.jit
def graph_conv_forward_kernel(
    x, values, adjacency, y, row_ptr, inputs, taps, bias, scale, shift, residual,
    x_n, x_c, x_t, x_v, a_n, a_k, a_v, a_w, r_n, r_c, r_t, r_v,
    O, I, T, V, K, groups, tiles,
    BO: tl.constexpr, BI: tl.constexpr, FRAMES: tl.constexpr, JOINTS: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr, GRAPH_PRECISION: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    g = program % groups  # neighbours share their frames, so that x is read from L2
    n = (program // groups // tiles).to(tl.int64)
    first_frame = program // groups % tiles * FRAMES
    p = tl.arange(0, FRAMES * JOINTS)
    t, v = first_frame + p // JOINTS, p % JOINTS
    live_pixel = (t < T) & (v < V)
    x_pixel = n * x_n + t.to(tl.int64) * x_t + v.to(tl.int64) * x_v
    o = g * BO + tl.arange(0, BO)
    joint = tl.arange(0, JOINTS)
    row_begin, row_end = tl.load(row_ptr + g), tl.load(row_ptr + g + 1)
    sums = tl.zeros((FRAMES * BO, JOINTS), dtype=tl.float32)
    for k in range(K):
        begin = first_of_subset(taps, row_begin, row_end, k) * BI
        end = first_of_subset(taps, row_begin, row_end, k + 1) * BI
        hidden = tl.zeros((FRAMES * JOINTS, BO), dtype=tl.float32)
        for first in range(begin, end, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            live = slot < end
            channel = tl.load(inputs + slot // BI, mask=live, other=0) * BI + slot % BI
            live = live & (channel < I)
            at = x_pixel[:, None] + (channel.to(tl.int64) * x_c)[None, :]
            panel = tl.load(x + at, mask=live_pixel[:, None] & live[None, :], other=0.0)
            weight = slot.to(tl.int64)[:, None] * BO + tl.arange(0, BO)[None, :]
            w = tl.load(values + weight, mask=live[:, None], other=0.0)
            hidden = tl.dot(panel, w, hidden, input_precision=PRECISION)
        if bias is not None:
            b = tl.load(bias + k * O + o, mask=o < O, other=0.0).to(tl.float32)
            hidden += tl.where(live_pixel[:, None], b[None, :], 0.0)
        if bias is not None or begin < end:
            at_a = n * a_n + (joint.to(tl.int64) * a_v)[:, None] + (joint.to(tl.int64) * a_w)[None, :] + k * a_k
            edge = (joint < V)[:, None] & (joint < V)[None, :]
            graph = tl.load(adjacency + at_a, mask=edge, other=0.0).to(tl.float32)
            rows = tl.reshape(hidden, (FRAMES, JOINTS, BO))
            rows = tl.reshape(tl.permute(rows, (0, 2, 1)), (FRAMES * BO, JOINTS))
            sums = tl.dot(rows, graph, sums, input_precision=GRAPH_PRECISION)
    row = tl.arange(0, FRAMES * BO)
    frame, channel_out = (first_frame + row // BO).to(tl.int64), (g * BO + row % BO).to(tl.int64)
    in_output = channel_out < O
    if scale is not None:
        sums = sums * tl.load(scale + channel_out, mask=in_output, other=0.0).to(tl.float32)[:, None]
    if shift is not None:
        sums = sums + tl.load(shift + channel_out, mask=in_output, other=0.0).to(tl.float32)[:, None]
    live_output = (in_output & (frame < T))[:, None] & (joint < V)[None, :]
    if residual is not None:
        r = (n * r_n + channel_out * r_c + frame * r_t)[:, None] + (joint.to(tl.int64) * r_v)[None, :]
        sums = sums + tl.load(residual + r, mask=live_output, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)
    at_y = (((n * O + channel_out) * T + frame) * V)[:, None] + joint.to(tl.int64)[None, :]
    tl.store(y + at_y, sums.to(y.dtype.element_ty), mask=live_output)


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
        x: (N, I, T, V) of float32, bfloat16 or float16, any strides; V up to 64.
        values: (blocks, bi, bo) of the dtype of x; the pattern's taps are the subsets.
        adjacency: shared (K, V, V) or per sample (N, K, V, V), any strides.
        bias: (K, O) or None. scale, shift: (O,) or None. residual: (N, O, T, V) or None, any strides.
        row_ptr, input, tap: the pattern's index, on the device of x.
        shape, block: (O, I, K), (bo, bi).
        tf32: multiply float32 in TF32. None follows torch.get_float32_matmul_precision(): "highest" is IEEE float32.

    Returns:
        (N, O, T, V), contiguous, of the dtype of x.

    Raises:
        ValueError: no kernel takes this dtype, block, V, or an adjacency per channel.
    """
    (out_channels, in_channels, subsets), (bo, bi) = shape, block
    batch, _, frames, vertices = x.shape
    why_not = unsupported(x.dtype, block)
    if why_not is None and bo > 32:
        why_not = f"the Triton graph_conv takes blocks of up to 32 output channels, not {bo}x{bi}"
    if why_not is None and vertices > 64:
        why_not = f"the Triton graph_conv takes up to 64 vertices, not {vertices}"
    if why_not is None and adjacency.dim() == 5:
        why_not = "the Triton graph_conv takes an adjacency that is shared or per sample, not one per channel"
    if why_not:
        raise ValueError(f"Expected sizes for which there is a Triton kernel. Got: {why_not}.")
    arithmetic = arithmetic_of(x.dtype, tf32)
    joints = max(16, triton.next_power_of_2(vertices))
    config = configs.graph_conv_forward(capability_of(x), arithmetic, bo, joints)
    per_program = max(1, config.pixels // joints, 16 // bo)
    groups, tiles = -(-out_channels // bo), triton.cdiv(frames, per_program)
    y = x.new_empty((batch, out_channels, frames, vertices))
    if y.numel() == 0:
        return y
    adjacency_strides = (0, *adjacency.stride()) if adjacency.dim() == 3 else adjacency.stride()
    graph_conv_forward_kernel[(batch * tiles * groups,)](
        x, values.contiguous(), adjacency, y, row_ptr, input, tap, None if bias is None else bias.contiguous(),
        scale, shift, residual, *x.stride(), *adjacency_strides,
        *((0, 0, 0, 0) if residual is None else residual.stride()),
        out_channels, in_channels, frames, vertices, subsets, groups, tiles,
        BO=bo, BI=bi, FRAMES=per_program, JOINTS=joints, SLOTS=config.slots, RELU=relu, **precisions(arithmetic),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def precisions(arithmetic: str) -> dict[str, str]:
    """How the two products of graph_conv multiply: with the weights, and with the adjacency."""
    return {
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
        "GRAPH_PRECISION": {"float32": "ieee", "tf32": "tf32", "half": "tf32x3"}[arithmetic],
    }
