"""Multiply-adds of a model per sample, dense and with its patterns, by block and by kind of work.

They are the work of the network as it is written: a runtime that needs fewer products for the same output, because it joins
some of them or leaves out what nothing reads, can exceed 100 % of a processor's peak by this count.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbones.aagcn import AdaptiveGraphUnit
from .backbones.ctrgcn import ChannelGraphUnit
from .backbones.dgstgcn import GroupGraphUnit
from .backbones.stgcn import GraphUnit
from .layers import SparseConv2d
from .recognizer import Recognizer
from .sparsity import block_of

__all__ = ["KINDS", "Count", "MultiplyAdds", "count"]

KINDS = ("1x1", "temporal", "aggregation", "graph", "other")


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one operation.

    Attributes:
        name: of the module that does it.
        block: network block, 0 to 9, or None for the head.
        kind: ``1x1`` and ``temporal`` convolutions, ``aggregation`` with the graph, matrix products that
            build a ``graph``, ``other`` (attention, classifier).
        dense: of the dense network as PYSKL computes it.
        effective: with kept weights only, without the zeros of a fixed graph, and with CTR-GCN's embeddings
            computed after the mean over time, as this package does. The operations are those of the network as it is
            written; a runtime may need fewer.
    """

    name: str
    block: int | None
    kind: str
    dense: int
    effective: int


@dataclass(frozen=True)
class MultiplyAdds:
    """All counts of a network, for one sample."""

    counts: tuple[Count, ...]

    @property
    def dense(self) -> int:
        return sum(item.dense for item in self.counts)

    @property
    def effective(self) -> int:
        return sum(item.effective for item in self.counts)

    def of(self, block: int | None = None, kind: str | None = None) -> MultiplyAdds:
        """The counts of one block, of one kind, or both."""
        return MultiplyAdds(tuple(item for item in self.counts if block in (None, item.block)
                                  and kind in (None, item.kind)))

    def per_block(self) -> list[tuple[int, int]]:
        """(dense, effective) of every network block; the head is not in it."""
        blocks = sorted({item.block for item in self.counts if item.block is not None})
        return [(part.dense, part.effective) for part in (self.of(block) for block in blocks)]


def count(model: Recognizer, frames: int = 100, persons: int = 2) -> MultiplyAdds:
    """Multiply-adds of one sample of shape (M = persons, T = frames, V, C).

    Convolutions, matrix products and linear layers count; element-wise work and norms do not. Nothing is
    computed: shapes come from a twin of the model on the meta device.

    Raises:
        ValueError: ``frames`` or ``persons`` is below 1, or persons does not fit the model.
    """
    for argument, value in (("frames", frames), ("persons", persons)):
        if value < 1:
            raise ValueError(f"Expected {argument} to be at least 1. Got {value}.")
    twin = Recognizer.from_config(model.config).to("meta").eval()
    real, counts = dict(model.named_modules()), []

    def watch(name: str, module: nn.Module, counter: Callable) -> None:
        block = block_of(f"{name}.") if name.startswith("backbone.") else None

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for label, kind, dense, effective in counter(real[name], inputs[0], output):
                counts.append(Count(f"{name}{label}", block, kind, dense, effective))

        module.register_forward_hook(hook)

    for name, module in twin.named_modules():
        counter = next((counter for kind, counter in _COUNTERS.items() if isinstance(module, kind)), None)
        if counter is not None:
            watch(name, module, counter)
    skeleton = twin.backbone.skeleton
    with torch.no_grad():
        twin(torch.empty(1, persons, frames, len(skeleton), twin.backbone.in_channels, device="meta"))
    return MultiplyAdds(tuple(counts))


Counted = list[tuple[str, str, int, int]]


def _conv(conv: SparseConv2d, x: Tensor, y: Tensor) -> Counted:
    places = y.shape[0] * y.shape[2] * y.shape[3]
    return [("", "1x1" if conv.kernel_size == 1 else "temporal", _size(conv) * places, _kept(conv) * places)]


def _linear(layer: nn.Linear | nn.Conv1d, x: Tensor, y: Tensor) -> Counted:
    places = y.numel() // layer.weight.shape[0]
    return [("", "other", layer.weight.numel() * places, layer.weight.numel() * places)]


def _graph_unit(unit: GraphUnit, x: Tensor, y: Tensor) -> Counted:
    places, support = x.shape[0] * x.shape[2], unit.support()
    rows = unit.conv.out_channels * places
    live = unit.A.numel() if support is None else int(support.sum())
    # The unit runs its convolution itself, so that no hook of the convolution sees it.
    conv = (_size(unit.conv) * places * x.shape[3], _kept(unit.conv) * places * x.shape[3])
    return [(".conv", "1x1", *conv), ("", "aggregation", unit.A.numel() * rows, live * rows)]


def _adaptive_unit(unit: AdaptiveGraphUnit, x: Tensor, y: Tensor) -> Counted:
    places = x.shape[0] * x.shape[2] * unit.A.numel()
    product, similarity = places * x.shape[1], places * unit.embedded
    return [("", "aggregation", product, product), ("", "graph", similarity, similarity)]


def _channel_unit(unit: ChannelGraphUnit, x: Tensor, y: Tensor) -> Counted:
    batch, channels, frames, joints = y.shape
    product, maps = batch * channels * frames * unit.A.numel(), batch * joints * joints
    counted: Counted = [("", "aggregation", product, product)]
    convs: Any = unit.convs
    for k, conv in enumerate(convs):  # the unit runs conv4 of all subsets itself, so that no hook sees it
        counted.append((f".convs.{k}.conv4", "1x1", _size(conv.conv4) * maps, _kept(conv.conv4) * maps))
        # PYSKL embeds all frames before the mean; the hooks of conv1 and conv2 have counted one of them.
        rest = (_size(conv.conv1) + _size(conv.conv2)) * batch * joints * (frames - 1)
        counted.append((f".convs.{k} (embeddings of all frames)", "1x1", rest, 0))
    return counted


def _group_unit(unit: GroupGraphUnit, x: Tensor, y: Tensor) -> Counted:
    inner, square = unit.post.in_channels, x.shape[3] ** 2
    product, score = x.shape[0] * inner * x.shape[2] * square, x.shape[0] * inner * square
    return [("", "aggregation", product, product), ("", "graph", score, score)]


_COUNTERS: dict[type | tuple[type, ...], Callable] = {
    SparseConv2d: _conv,
    (nn.Linear, nn.Conv1d): _linear,
    GraphUnit: _graph_unit,
    AdaptiveGraphUnit: _adaptive_unit,
    ChannelGraphUnit: _channel_unit,
    GroupGraphUnit: _group_unit,
}


def _size(conv: SparseConv2d) -> int:
    out_channels, in_channels, taps = conv.shape_oik
    return out_channels * in_channels * taps


def _kept(conv: SparseConv2d) -> int:
    return _size(conv) if conv.pattern is None else conv.pattern.num_live
