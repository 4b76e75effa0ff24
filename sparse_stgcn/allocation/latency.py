"""LatencyTable: what a layer's live blocks cost in optimised inference on this machine, measured network by network.

Layers of one shape that run over equally many frames and joints are a class. The reference network has the fewest blocks in
all layers; one network for each class and density differs from it in this class alone. What it takes longer is the cost of
the class. Networks are timed whole, as ``optimize`` runs them, so that fusion and caches are in the figures.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import macs
from ..benchmark.measure import Candidate, paired
from ..masks import Layer
from ..recognizer import Recognizer
from ..runtime import FusedRecognizer, optimize
from ..sparsity import compact, mask_layers, sparsify

__all__ = ["LatencyClass", "LatencyTable", "lowest", "measure", "measure_network"]

DENSITIES = (0.1, 0.4, 1.0)


@dataclass(frozen=True)
class LatencyClass:
    """Seconds that one layer of the class takes more than with its fewest blocks, at ascending densities."""

    layers: tuple[str, ...]
    densities: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one sample: ``base``, with the fewest blocks everywhere, and what each layer adds."""

    base: float
    classes: tuple[LatencyClass, ...]

    def predict(self, density: Mapping[str, float]) -> float:
        """Seconds of a network whose layers have these densities; between measured ones, linear."""
        return self.base + sum(float(np.interp(density[name], kind.densities, kind.seconds))
                               for kind in self.classes for name in kind.layers)

    def slopes(self) -> dict[str, float]:
        """Seconds per unit of density of every layer, from its fewest blocks to all."""
        return {name: kind.seconds[-1] / max(kind.densities[-1] - kind.densities[0], 1e-9)
                for kind in self.classes for name in kind.layers}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LatencyTable:
        """The table of :meth:`to_dict`."""
        return cls(content["base"], tuple(LatencyClass(tuple(kind["layers"]), tuple(kind["densities"]), tuple(kind["seconds"]))
                                          for kind in content["classes"]))


def lowest(layers: Sequence[Layer]) -> dict[str, float]:
    """The density of every layer with one block in each row: the floor of random masks."""
    return {layer.name: layer.grid[0] / layer.num_blocks for layer in layers}


def measure(model: Recognizer, block: tuple[int, int] | str, frames: int, persons: int, rounds: int = 5) -> LatencyTable:
    """The table of a dense network for one sample (M, T, V, C) on torch's threads.

    Raises:
        ValueError: optimised inference has no fused program for this network here.
    """
    layers = mask_layers(model, block)
    floor = lowest(layers)
    x = _sample(model, frames, persons)
    base = _candidate(model, block, floor, x)
    bases, classes = [], []
    for names in _classes(model, layers, frames, persons):
        start = floor[names[0]]
        densities = [d for d in DENSITIES if d > start]
        variants = [_candidate(model, block, floor | dict.fromkeys(names, d), x, f"{d}") for d in densities]
        timings = paired([base, *variants], rounds)
        # The best round of each: other work on the machine only ever adds time.
        start_seconds = timings[base.name].best
        bases.append(start_seconds)
        extra = [timings[variant.name].best - start_seconds for variant in variants]
        # More blocks never cost less: what says otherwise is noise.
        seconds = np.maximum.accumulate([0.0, *(value / len(names) for value in extra)])
        classes.append(LatencyClass(tuple(names), (start, *densities), tuple(seconds.tolist())))
    return LatencyTable(min(bases), tuple(classes))


def measure_network(model: Recognizer, frames: int, persons: int, rounds: int = 9) -> float:
    """Seconds that optimised inference of one sample takes: the best of ``rounds``."""
    call = _call(model, _sample(model, frames, persons))
    return paired([Candidate("network", call, call)], rounds)["network"].best


def _sample(model: Recognizer, frames: int, persons: int) -> Tensor:
    shape = (1, persons, frames, len(model.backbone.skeleton), model.backbone.in_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _classes(model: Recognizer, layers: Sequence[Layer], frames: int, persons: int) -> list[list[str]]:
    """Names of the layers of every class, in the order of the network."""
    work = {item.name: item.dense for item in macs.count(model, frames, persons).counts}
    classes: dict[tuple[object, ...], list[str]] = {}
    for layer in layers:
        classes.setdefault((layer.shape, work[layer.name]), []).append(layer.name)
    return list(classes.values())


def _candidate(model: Recognizer, block: tuple[int, int] | str, density: Mapping[str, float], x: Tensor,
               name: str = "base") -> Candidate:
    sparse = compact(sparsify(copy.deepcopy(model), 0.0, block, density=density))
    call = _call(sparse, x)
    return Candidate(name, call, call)


def _call(model: Any, x: Tensor) -> Any:
    fast = optimize(model, x, engine="fused")
    if not isinstance(fast, FusedRecognizer):
        raise ValueError("Expected a network that optimised inference has a program for, on the CPU with the native module. "
                         f"Got {type(model.backbone).__name__}.")
    return lambda: fast(x)
