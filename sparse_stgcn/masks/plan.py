"""The nouns of a mask: a ``Layer`` to choose blocks of, the ``Plan`` a method fulfils, and the registry of methods."""
from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["METHODS", "Layer", "Method", "Plan", "has_floor", "is_seeded", "register"]


@dataclass(frozen=True)
class Layer:
    """A maskable weight (O, I, K) under a grid of blocks; ``group`` is its network block (0 to 9)."""

    name: str
    shape: tuple[int, int, int]
    block: tuple[int, int]
    group: int = 0
    weight: np.ndarray | None = None  # (O, I, K), for methods that look at it
    inputs: int | None = None  # fan_in of one output; I * K where it is not given

    @property
    def grid(self) -> tuple[int, int, int]:
        """(G, H, K): block rows, block columns, taps."""
        (out_channels, in_channels, taps), (bo, bi) = self.shape, self.block
        return -(-out_channels // bo), -(-in_channels // bi), taps

    @property
    def num_blocks(self) -> int:
        return int(np.prod(self.grid))

    @property
    def num_weights(self) -> int:
        return int(np.prod(self.shape))

    @property
    def block_weights(self) -> float:
        """Mean number of weights in a block; below bo * bi where edges are ragged."""
        return self.num_weights / self.num_blocks

    @property
    def fan_in(self) -> int:
        """Weights that one output of the convolution sums over. In a graph convolution K counts subsets, not taps."""
        return self.shape[1] * self.shape[2] if self.inputs is None else self.inputs

    def block_sizes(self) -> np.ndarray:
        """(G, H, K) float64: the weights that exist in every block."""
        (out_channels, in_channels, _), (bo, bi), (rows, cols, taps) = self.shape, self.block, self.grid
        height = np.minimum(bo, out_channels - bo * np.arange(rows)).astype(float)
        width = np.minimum(bi, in_channels - bi * np.arange(cols)).astype(float)
        return np.repeat(np.outer(height, width)[..., None], taps, 2)

    def block_sums(self, values: np.ndarray) -> np.ndarray:
        """(G, H, K): the sum of ``values`` (O, I, K) over every block."""
        (bo, bi), (rows, cols, _) = self.block, self.grid
        over_rows = np.add.reduceat(values, bo * np.arange(rows), 0)
        return np.add.reduceat(over_rows, bi * np.arange(cols), 1)

    def share(self, density: str) -> float:
        """Density of this layer relative to the others, before it is scaled to the target."""
        return 1.0 if density == "uniform" else sum(self.shape) / self.num_weights


@dataclass(frozen=True)
class Plan:
    """What a method has to fulfil: ``counts[l]`` blocks of layer l, which may be shifted within a pool.

    ``file`` is what ``draw`` got, for methods that read their masks, and ``coordinates`` whether every one of them is read.
    """

    layers: Sequence[Layer]
    counts: np.ndarray
    pools: Sequence[np.ndarray]
    seed: int
    file: str | None = None
    coordinates: bool = True

    def generator(self, layer: Layer) -> np.random.Generator:
        """One stream of numbers per layer: its draw does not depend on which other layers there are."""
        return np.random.default_rng([self.seed, zlib.crc32(layer.name.encode())])


Method = Callable[[Plan], "list[np.ndarray]"]
METHODS: dict[str, Method] = {}
_WITHOUT_FLOOR: set[str] = set()
_SEEDED: set[str] = set()


def register(name: str, floor: bool = True, seeded: bool = False) -> Callable[[Method], Method]:
    """Add a method: a function from a ``Plan`` to one bool array (G, H, K) per layer, True for live blocks.

    With ``floor`` the counts it gets leave every block row at least one block; without, ``draw`` warns of the
    block rows that the method left empty. With ``seeded`` its masks follow from the sizes of the layers and the seed
    alone, so that a checkpoint may keep these in place of the masks.
    """
    def add(method: Method) -> Method:
        METHODS[name] = method
        (_WITHOUT_FLOOR.discard if floor else _WITHOUT_FLOOR.add)(name)
        (_SEEDED.add if seeded else _SEEDED.discard)(name)
        return method
    return add


def has_floor(method: str) -> bool:
    """Whether ``method`` leaves every block row at least one block."""
    return method not in _WITHOUT_FLOOR


def is_seeded(method: str) -> bool:
    """Whether the masks of ``method`` follow from the sizes of the layers and the seed alone."""
    return method in _SEEDED
