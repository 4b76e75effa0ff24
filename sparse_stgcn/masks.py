"""How a pattern is chosen: how many blocks every layer keeps (``budgets``) and which ones (``METHODS``)."""
from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch

from .kernels import BlockPattern

__all__ = ["DENSITIES", "METHODS", "SCOPES", "Layer", "budgets", "draw", "register"]

DENSITIES = ("uniform", "erk")
SCOPES = ("layer", "block", "global")


@dataclass(frozen=True)
class Layer:
    """A maskable weight (O, I, K) under a grid of blocks; ``group`` is its network block (0 to 9)."""

    name: str
    shape: tuple[int, int, int]
    block: tuple[int, int]
    group: int = 0
    weight: np.ndarray | None = None  # (O, I, K), for methods that look at it

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

    def share(self, density: str) -> float:
        """Density of this layer relative to the others, before it is scaled to the target."""
        return 1.0 if density == "uniform" else sum(self.shape) / self.num_weights


@dataclass(frozen=True)
class Plan:
    """What a method has to fulfil: ``counts[l]`` blocks of layer l, which may be shifted within a pool."""

    layers: Sequence[Layer]
    counts: np.ndarray
    pools: Sequence[np.ndarray]
    seed: int

    def generator(self, layer: Layer) -> np.random.Generator:
        """One stream of numbers per layer: its draw does not depend on which other layers there are."""
        return np.random.default_rng([self.seed, zlib.crc32(layer.name.encode())])


Method = Callable[[Plan], "list[np.ndarray]"]
METHODS: dict[str, Method] = {}
_WITHOUT_FLOOR: set[str] = set()


def register(name: str, floor: bool = True) -> Callable[[Method], Method]:
    """Add a method: a function from a ``Plan`` to one bool array (G, H, K) per layer, True for live blocks.

    With ``floor`` the counts it gets leave every block row at least one block.
    """
    def add(method: Method) -> Method:
        METHODS[name] = method
        (_WITHOUT_FLOOR.discard if floor else _WITHOUT_FLOOR.add)(name)
        return method
    return add


def draw(layers: Sequence[Layer], sparsity: float, method: str = "random", density: str = "uniform",
         scope: str = "layer", seed: int = 0) -> dict[str, BlockPattern]:
    """Choose the live blocks of every layer.

    Args:
        sparsity: fraction of the layers' weights that are masked, 0 <= sparsity < 1.
        method: ``random``, balanced: all block rows of a layer keep the same number of blocks up to one, and
            at least one; ``iid``: every block of a pool has the same chance, so rows, and with a wide scope
            layers, may stay empty.
        density: how the kept weights are shared out. ``uniform``: the same fraction of every layer. ``erk``:
            layer l in proportion to (O + I + K) / (O I K) and at most all of it (Evci et al. 2020).
        scope: the pool in which the number of kept blocks is exact: every ``layer``, the layers of every
            network ``block``, or all layers (``global``).
        seed: patterns are equal for equal seeds, on every machine.

    Where the floor of one block per row keeps more than a layer's share, the layers of the pool that are
    above the floor give it back evenly; for scope ``layer`` these are all layers of the network. ERK compares
    layers, so with scope ``layer`` its shares are taken over the whole network. Where the floors alone exceed
    the target, they stay.

    Blocks wider than a thin layer (3 input channels under 16 x 16, say) are ragged there: they hold what
    exists.

    Raises:
        ValueError: an argument is none of the values above, or ``block`` is taller or wider than every layer.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"Expected sparsity to be at least 0 and below 1 (the fraction of masked weights). "
                         f"Got {sparsity}.")
    for argument, value, allowed in (("method", method, METHODS), ("density", density, DENSITIES),
                                     ("scope", scope, SCOPES)):
        if value not in allowed:
            raise ValueError(f"Expected {argument} to be one of {', '.join(allowed)}. Got {value!r}.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"Expected seed to be a whole number of at least 0. Got {seed!r}.")
    _check_block(layers)
    pools = _pools(layers, scope)
    counts = budgets(layers, sparsity, density, scope, floor=method not in _WITHOUT_FLOOR)
    exact = [np.array([i]) for i in range(len(layers))] if density == "erk" or scope == "layer" else pools
    live = METHODS[method](Plan(layers, counts, exact, int(seed)))
    return {layer.name: BlockPattern.from_blocks(torch.from_numpy(blocks), layer.shape, layer.block)
            for layer, blocks in zip(layers, live, strict=True)}


def budgets(layers: Sequence[Layer], sparsity: float, density: str = "uniform", scope: str = "layer",
            floor: bool = True) -> np.ndarray:
    """Number of live blocks of every layer, int64; see ``draw`` for the arguments and the rules."""
    counts = np.zeros(len(layers), dtype=np.int64)
    for pool in _pools(layers, scope):
        chosen = [layers[i] for i in pool]
        blocks = np.array([layer.num_blocks for layer in chosen], dtype=float)
        size = np.array([layer.block_weights for layer in chosen])
        low = np.array([layer.grid[0] if floor else 0 for layer in chosen], dtype=float)
        share = np.array([layer.share(density) for layer in chosen])
        target = (1 - sparsity) * float(size @ blocks)
        ideal = _fill(share * blocks, low, blocks, size, target)
        whole = np.clip(np.round(ideal), low, blocks) if scope == "layer" and density == "uniform" else \
            _round_to(ideal, low, blocks, size, target)
        counts[pool] = whole.astype(np.int64)
    return counts


def _fill(
    slope: np.ndarray, low: np.ndarray, high: np.ndarray, size: np.ndarray, target: float
) -> np.ndarray:
    """clip(c * slope, low, high) with the scale c that makes the weights add up to ``target``."""
    if size @ low >= target:
        return low.copy()
    # The sum grows piecewise linearly in c with bends where a layer leaves its floor or meets its cap.
    bends = np.unique(np.concatenate([[0.0], low / slope, high / slope]))
    total = np.array([size @ np.clip(c * slope, low, high) for c in bends])
    at = int(np.clip(np.searchsorted(total, target, side="right"), 1, len(bends) - 1))
    rise = total[at] - total[at - 1]
    step = (target - total[at - 1]) / rise if rise > 0 else 0.0
    scale = bends[at - 1] + min(step, 1.0) * (bends[at] - bends[at - 1])
    # Rounded far below half a block, so that the order of a sum can never tip a count over.
    return np.clip(np.round(scale * slope, 6), low, high)


def _round_to(
    ideal: np.ndarray, low: np.ndarray, high: np.ndarray, size: np.ndarray, target: float
) -> np.ndarray:
    """Whole counts by largest remainder, whose weights miss ``target`` by less than half a block."""
    whole = np.clip(np.floor(ideal), low, high)
    for i in np.argsort(whole - ideal, kind="stable"):
        if whole[i] < high[i] and target - size @ whole >= size[i] / 2 - 1e-3:
            whole[i] += 1
    return whole


def _pools(layers: Sequence[Layer], scope: str) -> list[np.ndarray]:
    """Indices of the layers that share one target."""
    if scope != "block":
        return [np.arange(len(layers))] if layers else []
    groups = np.array([layer.group for layer in layers])
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _check_block(layers: Sequence[Layer]) -> None:
    if not layers:
        return
    bo, bi = layers[0].block
    tallest, widest = max(layer.shape[0] for layer in layers), max(layer.shape[1] for layer in layers)
    if min(bo, bi) < 1:
        raise ValueError(f"Expected block to be two positive sizes (outputs, inputs). Got {(bo, bi)}.")
    if bo > tallest or bi > widest:
        raise ValueError(f"Expected block to fit a layer: at most {tallest} outputs x {widest} inputs. "
                         f"Got {bo} x {bi}; choose a smaller block, 8x1 for example.")


@register("random")
def random(plan: Plan) -> list[np.ndarray]:
    """Balanced: each block row of a layer draws its own positions; rows differ by one block at most."""
    live = []
    for layer, count in zip(plan.layers, plan.counts, strict=True):
        rng, (rows, cols, taps) = plan.generator(layer), layer.grid
        per_row, extra = divmod(int(count), rows)
        chosen = np.zeros((rows, cols * taps), dtype=bool)
        widest = per_row + (extra > 0)
        if widest:
            keys = rng.random(chosen.shape)
            # The smallest keys of a row, the largest of them last; rows without an extra block drop the last.
            order = np.argpartition(keys, widest - 1, axis=1)[:, :widest]
            np.put_along_axis(chosen, order, True, axis=1)
            if extra:
                poorer = rng.permutation(rows)[extra:]
                chosen[poorer, order[poorer, -1]] = False
        live.append(chosen.reshape(layer.grid))
    return live


@register("iid", floor=False)
def iid(plan: Plan) -> list[np.ndarray]:
    """Every block of a pool has the same chance; the number is exact in the pool, not in a layer or a row."""
    counts = plan.counts.copy()
    for pool in plan.pools:
        if len(pool) > 1:
            blocks = np.array([plan.layers[i].num_blocks for i in pool])
            rng = np.random.default_rng([plan.seed, *(int(i) for i in pool)])
            counts[pool] = rng.multivariate_hypergeometric(
                blocks, int(counts[pool].sum()), method="marginals"
            )
    live = []
    for layer, count in zip(plan.layers, counts, strict=True):
        chosen = np.zeros(layer.num_blocks, dtype=bool)
        if count:
            keys = plan.generator(layer).random(layer.num_blocks)
            chosen[np.argpartition(keys, int(count) - 1)[: int(count)]] = True
        live.append(chosen.reshape(layer.grid))
    return live
