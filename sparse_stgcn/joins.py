"""Convolutions that read the same tensor, or whose results are summed, run as one."""
from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .kernels import BlockPattern, graph_conv, graph_product, share, spans, split, temporal_conv
from .kernels.dispatch import beside, runs_natively
from .layers import SparseConv2d, unwatched

__all__ = ["joined", "live_stack", "stacked", "sum_over_graphs"]


def joined(convs: Sequence[SparseConv2d], x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """[conv(x) for conv in convs], 1 x 1 convolutions of one stride, as one product.

    x is read once, and its gradient is one sum that is written once. Live convolutions have to agree in their block; where a
    width is no multiple of it, outputs that nobody reads fill the last block, up to half as many as are read. Otherwise, and
    where a forward hook watches one of them, they run one by one, on x each or, where x is as many aliases of one tensor (see
    ``kernels.share``), on one each.
    """
    one = _as_one(convs, x if isinstance(x, Tensor) else x[0])
    if one is not None:
        return split(*one)
    xs = share(x, len(convs)) if isinstance(x, Tensor) else x
    return tuple(conv(part) for conv, part in zip(convs, xs, strict=True))


def stacked(convs: Sequence[SparseConv2d], x: Tensor) -> Tensor:
    """cat([conv(x) for conv in convs], 1), see ``joined``."""
    one = _as_one(convs, x)
    if one is not None and one[0].shape[1] == sum(conv.out_channels for conv in convs):
        return one[0]
    return torch.cat([conv(x) for conv in convs] if one is None else split(*one), 1)


def _as_one(convs: Sequence[SparseConv2d], x: Tensor) -> tuple[Tensor, list[tuple[int, int]]] | None:
    """The outputs of all convolutions in one tensor, and where in it those of each are."""
    kinds = {(conv.kernel_size, conv.stride, conv.subsets, conv.bias is None) for conv in convs}
    if len(kinds) > 1 or convs[0].kernel_size > 1:
        raise ValueError(f"Expected 1 x 1 convolutions of one stride. Got {', '.join(map(str, convs))}.")
    if not all(map(unwatched, convs)):
        return None
    widths = [conv.out_channels for conv in convs]
    live = _live(convs)
    if live is not None:
        values, pattern, bias, rooms = live
        y = temporal_conv(beside(x, values), values, pattern, bias, convs[0].stride)
        return y, [(begin, begin + width) for (begin, _), width in zip(spans(rooms), widths, strict=True)]
    if any(conv.stage == "compact" for conv in convs):
        return None
    bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])  # type: ignore[misc]
    y = F.conv2d(x, torch.cat([conv.dense_weight() for conv in convs]), bias, (convs[0].stride, 1))
    return y, spans(widths)


def _live(convs: Sequence[SparseConv2d]) -> tuple[Tensor, BlockPattern, Tensor | None, list[int]] | None:
    """Values, pattern and bias of live convolutions one below the other, and how many outputs there are for each."""
    patterns = _live_patterns(convs)
    pattern = None if patterns is None else _join(patterns)
    if patterns is None or pattern is None:
        return None
    values, rooms = torch.cat([conv.live().values for conv in convs]), _rooms(patterns)  # type: ignore[union-attr]
    bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])  # type: ignore[misc]
    if bias is not None and pattern.shape[0] > bias.numel():
        bias = torch.cat([F.pad(conv.bias, (0, room - width))  # type: ignore[arg-type]
                          for conv, room, width in zip(convs, rooms, [c.out_channels for c in convs], strict=True)])
    return values, pattern, bias, rooms


def _live_patterns(convs: Sequence[SparseConv2d]) -> tuple[BlockPattern, ...] | None:
    """``live_pattern`` of each; None where one of them has none."""
    patterns = tuple(pattern for conv in convs if (pattern := conv.live_pattern) is not None)
    return patterns if len(patterns) == len(convs) else None


def live_stack(convs: Sequence[SparseConv2d]) -> tuple[Tensor, BlockPattern, Tensor | None] | None:
    """Values, pattern (sum of O, I, 1) and bias of live 1 x 1 convolutions one below the other, with no output left over.

    None where they cannot be joined, or a hook watches one of them.
    """
    live = _live(convs) if all(map(unwatched, convs)) and len({conv.bias is None for conv in convs}) == 1 else None
    return None if live is None or live[1].shape[0] != sum(conv.out_channels for conv in convs) else live[:3]


def sum_over_graphs(convs: Sequence[SparseConv2d], x: Tensor, graphs: Tensor) -> Tensor:
    """y = sum over k of conv_k(x G_k): (N, I, T, V) and a graph of every sample (N, K, V, V) -> (N, O, T, V).

    Live 1 x 1 convolutions of one block are one graph convolution, in which no x G_k exists as a whole.
    """
    watched = not all(map(unwatched, convs))
    patterns = _live_patterns(convs)
    dense = all(conv.stage != "compact" for conv in convs)
    if not watched and patterns is None and dense and torch.is_grad_enabled() and runs_natively("graph_product", x):
        weight, offset = torch.cat([conv.dense_weight() for conv in convs], 1), None
        if convs[0].bias is not None:
            offset = torch.stack([conv.bias for conv in convs]).sum(0)  # type: ignore[misc]
        return F.conv2d(graph_product(x, graphs), weight, offset)
    if watched or patterns is None or len({pattern.block for pattern in patterns}) > 1:
        batch, channels, frames, joints = x.shape
        rows, parts = x.flatten(1, 2), zip(convs, graphs.unbind(1), strict=True)
        return reduce(add, (conv(torch.bmm(rows, graph).view(batch, channels, frames, joints)) for conv, graph in parts))
    pattern, order, inverse = _stack(patterns)
    values = _Reordered.apply(torch.cat([conv.live().values for conv in convs]), order, inverse)  # type: ignore[union-attr]
    offset = None if convs[0].bias is None else torch.stack([conv.bias for conv in convs]).sum(0)  # type: ignore[misc]
    x = beside(x, values)
    return graph_conv(x, values, pattern, graphs.to(x.dtype), offset=offset)


_joins: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first pattern -> the patterns joined, and their join


def _is(reference: weakref.ref[BlockPattern], pattern: BlockPattern) -> bool:
    return reference() is pattern


def _rooms(patterns: Sequence[BlockPattern]) -> list[int]:
    """Outputs of each pattern in their join: whole blocks, but for the last one."""
    whole = [-(-p.shape[0] // p.block[0]) * p.block[0] for p in patterns]
    return [*whole[:-1], patterns[-1].shape[0]]


def _join(patterns: tuple[BlockPattern, ...]) -> BlockPattern | None:
    """The pattern of the weights one below the other, see ``_rooms``; None if they cannot be joined or it does not pay."""
    kept = _joins.get(patterns[0])
    if kept is not None and len(kept[0]) == len(patterns) - 1 and all(map(_is, kept[0], patterns[1:])):
        return kept[1]
    block, (_, inputs, taps) = patterns[0].block, patterns[0].shape
    together, outputs = None, sum(_rooms(patterns))
    if all(p.block == block for p in patterns) and 2 * outputs <= 3 * sum(p.shape[0] for p in patterns):
        together = BlockPattern.from_blocks(torch.cat([p.blocks() for p in patterns]), (outputs, inputs, taps), block)
    _joins[patterns[0]] = (tuple(map(weakref.ref, patterns[1:])), together)
    return together


class _Reordered(torch.autograd.Function):
    """values[order], a permutation: its gradient is one too, where torch adds up what an index names, one after the other."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return values[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.saved_tensors[0]], None, None


_stacks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first pattern -> the others, their stack, order and inverse


def _stack(patterns: tuple[BlockPattern, ...]) -> tuple[BlockPattern, Tensor, Tensor]:
    """1 x 1 patterns (O, I, 1) as the taps of one (O, I, K), where its blocks are among all of theirs, and the inverse."""
    kept = _stacks.get(patterns[0])
    if kept is not None and len(kept[0]) == len(patterns) - 1 and all(map(_is, kept[0], patterns[1:])):
        return kept[1]
    live = torch.cat([pattern.blocks() for pattern in patterns], 2)
    outputs, inputs, _ = patterns[0].shape
    stack = BlockPattern.from_blocks(live, (outputs, inputs, len(patterns)), patterns[0].block).to(live.device)
    place, before = torch.zeros(live.shape, dtype=torch.long, device=live.device), 0
    for k, pattern in enumerate(patterns):
        place[pattern.rows, pattern.input.long(), k] = torch.arange(pattern.num_blocks, device=live.device) + before
        before += pattern.num_blocks
    with torch.inference_mode(False):  # what is kept must serve training too
        order = place[stack.rows, stack.input.long(), stack.tap.long()].clone()
        inverse = order.argsort()
    _stacks[patterns[0]] = (tuple(map(weakref.ref, patterns[1:])), (stack, order, inverse))
    return stack, order, inverse
