"""Costs: what a choice of live blocks keeps, weighs as a file, multiplies and takes, before anything is trained."""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checkpoint, macs
from ..masks import Layer
from ..pattern_coding import ESCAPE
from ..recognizer import Recognizer
from ..sparsity import compact, sparsify
from .latency import LatencyTable, lowest

__all__ = ["Costs"]

WEIGHT = 4  # bytes of a live weight in a checkpoint
HEADER = 256  # bytes by which offsets, counters and metrics in a header may grow


@dataclass(frozen=True)
class Costs:
    """Costs of a network as functions of the live blocks of its layers.

    Attributes:
        layers: the maskable weights.
        work: multiply-adds of one sample, per weight of each layer.
        fixed_work: multiply-adds that no mask changes.
        fixed_bytes: size of the checkpoint without any live weight and its place.
        latency: None where optimised inference has no program for the network.
    """

    layers: tuple[Layer, ...]
    work: np.ndarray
    fixed_work: int
    fixed_bytes: int
    latency: LatencyTable | None = None

    @classmethod
    def of(cls, model: Recognizer, layers: Sequence[Layer], frames: int, persons: int, meta: Mapping[str, Any],
           latency: LatencyTable | None = None) -> Costs:
        """The costs of a dense network.

        Args:
            frames, persons: of one sample.
            meta: what ``checkpoint.save`` will be given beside the network.
        """
        counted = {item.name: item for item in macs.count(model, frames, persons).counts}
        work = np.array([counted[layer.name].dense / layer.num_weights for layer in layers])
        names = {layer.name for layer in layers}
        fixed = sum(item.effective for name, item in counted.items() if name not in names)
        sparse = compact(sparsify(copy.deepcopy(model), 0.0, layers[0].block, density=lowest(layers)))
        _make_distinct(sparse)
        kept = round(sum(layer.block_weights * layer.grid[0] for layer in layers))
        size = checkpoint.size(sparse, "bitmask", **meta) + HEADER - WEIGHT * kept - _bitmask(layers)
        return cls(tuple(layers), work, fixed, size, latency)

    @property
    def maskable(self) -> int:
        return sum(layer.num_weights for layer in self.layers)

    def weights(self, counts: np.ndarray) -> float:
        """Live weights; of layers with ragged blocks, their expected number."""
        return float(sum(layer.block_weights * count for layer, count in zip(self.layers, counts, strict=True)))

    def density(self, counts: np.ndarray) -> dict[str, float]:
        return {layer.name: float(count) / layer.num_blocks for layer, count in zip(self.layers, counts, strict=True)}

    def bytes(self, counts: np.ndarray) -> float:
        """Size of the checkpoint file at most; about HEADER bytes above what it will be.

        The places of the live blocks are bits, or gaps of a byte each where those take less (``pattern_coding``).
        """
        gaps = float(counts.sum()) + sum(layer.num_blocks for layer in self.layers) / ESCAPE
        return self.fixed_bytes + WEIGHT * self.weights(counts) + min(_bitmask(self.layers), gaps)

    def multiply_adds(self, counts: np.ndarray) -> float:
        """Of one sample."""
        return self.fixed_work + float(sum(layer.block_weights * count * work for layer, count, work
                                           in zip(self.layers, counts, self.work, strict=True)))

    def seconds(self, counts: np.ndarray) -> float | None:
        """Predicted latency of one sample in optimised inference."""
        return None if self.latency is None else self.latency.predict(self.density(counts))


def _bitmask(layers: Sequence[Layer]) -> int:
    return sum(-(-layer.num_blocks // 8) for layer in layers)


def _make_distinct(model: nn.Module) -> None:
    """Give every batch norm statistics of its own, as training does: a checkpoint stores equal buffers once."""
    for index, norm in enumerate(module for module in model.modules() if isinstance(module, _BatchNorm)):
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.fill_(2 * index + 2)
            norm.running_var.fill_(2 * index + 3)
