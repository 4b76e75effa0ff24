"""Which blocks a layer keeps: the methods that ``draw`` knows by name.

All of them but ``biregular`` order the blocks and keep the first ones, in an order that does not depend on how many are
kept: for equal seeds, fewer blocks are a subset of more. ``draw_levels`` builds on that.
"""
from __future__ import annotations

import numpy as np

from . import predefined as file_masks
from .plan import Layer, Plan, register

__all__ = ["biregular", "fan_in", "iid", "magnitude", "predefined", "random", "root_mean_square", "top"]


COORDINATES = 4  # a layer with no more inputs than these reads joints: x, y, z and perhaps a confidence


@register("random", seeded=True)
def random(plan: Plan) -> list[np.ndarray]:
    """Balanced: each block row of a layer draws its own positions; rows differ by one block at most.

    Every coordinate of the joints is read, as ``_read_every_coordinate`` says.
    """
    live = []
    for layer, count in zip(plan.layers, plan.counts, strict=True):
        rng, (rows, cols, taps) = plan.generator(layer), layer.grid
        per_row, extra = divmod(int(count), rows)
        chosen = np.zeros((rows, cols * taps), dtype=bool)
        widest = per_row + (extra > 0)
        if widest:
            keys = rng.random(chosen.shape)
            if plan.coordinates:
                _read_every_coordinate(layer, keys)
            # The smallest keys of a row, the largest of them last; rows without an extra block drop the last.
            order = np.argpartition(keys, widest - 1, axis=1)[:, :widest]
            np.put_along_axis(chosen, order, True, axis=1)
            if extra:
                poorer = rng.permutation(rows)[extra:]
                chosen[poorer, order[poorer, -1]] = False
        live.append(chosen.reshape(layer.grid))
    return live


def _read_every_coordinate(layer: Layer, keys: np.ndarray) -> None:
    """Let every input of a layer that reads the joints be the first choice of some row; ``keys`` (G, H K), smallest first.

    Of H columns that G rows choose from, H (1 - 1 / H)^G are nobody's first choice: with 8 rows one mask in nine lacks x, y or
    z where rows keep one block. A hidden channel is one of many, a coordinate is not. What rows choose
    first is in every mask of the seed, so that fewer blocks stay a subset of more.
    """
    rows, cols, taps = layer.grid
    if layer.shape[1] > COORDINATES or cols > rows:
        return
    best = keys.argmin(1)
    for column in sorted(set(range(cols)) - set((best // taps).tolist())):
        first = best // taps
        spare = np.flatnonzero(np.bincount(first, minlength=cols)[first] > 1)
        own = keys[spare, column * taps:(column + 1) * taps]
        row, tap = np.unravel_index(own.argmin(), own.shape)
        row, chosen = spare[row], column * taps + tap
        keys[row, [best[row], chosen]] = keys[row, [chosen, best[row]]]
        best[row] = chosen


@register("nested", seeded=True)
def nested(plan: Plan) -> list[np.ndarray]:
    """``random`` with counts that grow along the paper's levels; see ``draw`` and ``draw_levels``."""
    return random(plan)


@register("biregular", seeded=True)
def biregular(plan: Plan) -> list[np.ndarray]:
    """Balanced on both sides: rows, and block columns over all taps, differ by one block at most.

    ``random`` leaves inputs to chance: of H columns that c blocks read, (1 - 1 / H)^c H are read by nobody, half of them
    in a temporal convolution of ST-GCN at 0.99. Here min(c, H) are read. Which column meets which row, and at which tap,
    is random; fewer blocks are no subset of more.
    """
    live = []
    for layer, count in zip(plan.layers, plan.counts, strict=True):
        rng, (rows, cols, _) = plan.generator(layer), layer.grid
        degree = np.full(rows, int(count) // rows)
        degree[rng.permutation(rows)[: int(count) % rows]] += 1
        # Rows take the columns from one endless cycle, so that none has a column more often than once more than another.
        column = np.resize(rng.permutation(cols), int(count))
        row = np.repeat(rng.permutation(rows), degree)
        keys = rng.random(layer.grid)
        uses = np.zeros((rows, cols), dtype=np.int64)
        np.add.at(uses, (row, column), 1)
        live.append(keys.argsort(2).argsort(2) < uses[..., None])
    return live


@register("iid", floor=False, seeded=True)
def iid(plan: Plan) -> list[np.ndarray]:
    """Every block of a pool has the same chance; the number is exact in the pool, not in a layer or a row."""
    return top([-plan.generator(layer).random(layer.grid) for layer in plan.layers], plan)


@register("fan_in", floor=False, seeded=True)
def fan_in(plan: Plan) -> list[np.ndarray]:
    """The highest of signed scores drawn like weights, uniform in +-sqrt(6 / fan_in) (the authors' code).

    In a pool of several layers the narrower law of a wide layer loses: its blocks are cut first. The authors pool
    the whole ST-GCN (``scope="global"``) and each block of the other networks (``scope="block"``).
    """
    return top([plan.generator(layer).uniform(-1, 1, layer.grid) * (6 / layer.fan_in) ** 0.5 for layer in plan.layers],
               plan)


@register("magnitude", floor=False)
def magnitude(plan: Plan) -> list[np.ndarray]:
    """The largest root mean square of a block's weights; for 1 x 1 blocks |w| (Han et al. 2015)."""
    return top([root_mean_square(layer) for layer in plan.layers], plan)


@register("predefined", floor=False)
def predefined(plan: Plan) -> list[np.ndarray]:
    """The masks of a file, whatever the counts; see ``masks.predefined.read``."""
    if plan.file is None:
        raise ValueError("Expected file (--mask-file) with method 'predefined': a checkpoint, a work directory or an "
                         ".npz of masks. Got none.")
    return file_masks.read(plan.file, plan.layers)


def top(scores: list[np.ndarray], plan: Plan) -> list[np.ndarray]:
    """The blocks with the highest scores (G, H, K): of every layer its count, of a pool the sum of its counts.

    Where ragged edges make the blocks of a pool unequal, it keeps the number whose weights come nearest to those of
    the counts. Ties go to the first block.
    """
    live = [np.zeros(0, dtype=bool)] * len(scores)
    for pool in plan.pools:
        chosen = [plan.layers[i] for i in pool]
        joined = np.concatenate([scores[i].ravel() for i in pool])
        sizes = np.concatenate([layer.block_sizes().ravel() for layer in chosen])
        if np.ptp(sizes) == 0:
            first = _first(joined, int(plan.counts[pool].sum()))
        else:
            order = np.argsort(-joined, kind="stable")
            weights = np.concatenate([[0.0], sizes[order].cumsum()])
            target = sum(plan.counts[i] * plan.layers[i].block_weights for i in pool)
            first = order[: np.abs(weights - target).argmin()]
        kept = np.zeros(joined.size, dtype=bool)
        kept[first] = True
        ends = np.cumsum([layer.num_blocks for layer in chosen])[:-1]
        for i, part in zip(pool, np.split(kept, ends), strict=True):
            live[i] = part.reshape(plan.layers[i].grid)
    return live


def _first(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` highest scores; of equal ones the first."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    limit = -np.partition(-scores, count - 1)[count - 1]
    above = np.flatnonzero(scores > limit)
    return np.concatenate([above, np.flatnonzero(scores == limit)[: count - len(above)]])


def root_mean_square(layer: Layer) -> np.ndarray:
    """(G, H, K): of the weights that exist in every block."""
    if layer.weight is None:
        raise ValueError(f"Expected layer {layer.name!r} with its weight, which method 'magnitude' compares. Got none.")
    return np.sqrt(layer.block_sums(np.square(layer.weight, dtype=np.float64)) / layer.block_sizes())
