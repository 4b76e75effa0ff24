"""``draw``: a pattern for every layer from a sparsity and the names of its rules."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch

from ..kernels import BlockPattern
from .budget import DENSITIES, SCOPES, Density, budgets, pools
from .plan import METHODS, Layer, Plan, has_floor

__all__ = ["LEVELS", "draw", "draw_levels"]

LEVELS = (0.6, 0.8, 0.95, 0.99)  # the paper's


def draw(layers: Sequence[Layer], sparsity: float, method: str = "random", density: Density = "uniform",
         scope: str = "layer", seed: int = 0, file: str | None = None, coordinates: bool = True) -> dict[str, BlockPattern]:
    """Choose the live blocks of every layer.

    Args:
        sparsity: fraction of the layers' weights that are masked, 0 <= sparsity < 1.
        method: ``random``, balanced: all block rows of a layer keep the same number of blocks up to one, and
            at least one, and a layer that reads the joints (4 inputs or fewer) every coordinate, if its rows suffice;
            ``nested``: the same, and the mask contains those of all sparser of the paper's ``LEVELS`` with the same
            seed, under any density and scope; ``biregular``: block columns keep the same number, too, up to
            one, so that as many inputs as possible are read; ``iid``: every block of a pool has the same chance, so
            rows, and with a wide scope layers, may stay empty; ``fan_in``: the authors' pooled scores, which cut
            wide layers first; ``magnitude``: the largest weights; ``predefined``: the masks of ``file``, whose
            own sparsity takes the place of the arguments.
        density: how the kept weights are shared out. ``uniform``: the same fraction of every layer. ``erk``:
            layer l in proportion to (O + I + K) / (O I K) and at most all of it (Evci et al. 2020). A mapping from
            names of layers to densities: these, and ``sparsity`` and ``scope`` are without effect.
        scope: the pool in which the number of kept blocks is exact: every ``layer``, the layers of every
            network ``block``, or all layers (``global``).
        seed: patterns are equal for equal seeds, on every machine.
        file: of ``predefined``: see ``masks.predefined.read``.
        coordinates: False: ``random`` and ``nested`` leave it to chance whether every coordinate is read, as they did in files
            that do not say so.

    Where the floor of one block per row keeps more than a layer's share, the layers of the pool that are
    above the floor give it back evenly; for scope ``layer`` these are all layers of the network. ERK compares
    layers, so with scope ``layer`` its shares are taken over the whole network. Where the floors alone exceed
    the target, they stay. ``iid``, ``fan_in`` and ``magnitude`` have no floor; where they leave block rows
    without a weight, one warning says how many.

    Blocks wider than a thin layer (3 input channels under 16 x 16, say) are ragged there: they hold what
    exists.

    Raises:
        ValueError: an argument is none of the values above, or ``block`` is taller or wider than every layer.
    """
    _check(layers, [sparsity], method, density, scope, seed)
    if file is not None and method != "predefined":
        raise ValueError(f"Expected file (--mask-file) with method 'predefined' only. Got method {method!r}.")
    denser = [level for level in LEVELS if level > sparsity] if method == "nested" else []
    counts = _counts(layers, [*denser, sparsity], method, density, scope)[float(sparsity)]
    return _patterns(layers, counts, method, density, scope, int(seed), file, coordinates)


def draw_levels(layers: Sequence[Layer], levels: Sequence[float] = LEVELS, method: str = "random",
                density: Density = "uniform", scope: str = "layer", seed: int = 0) -> dict[float, dict[str, BlockPattern]]:
    """Masks inside each other: the live blocks of every level are among those of all lower levels.

    Counts are exact at every level, as ``draw`` has them, except that no layer keeps fewer blocks at a level than at
    a sparser one.

    Args:
        levels: sparsities, in any order; others as for ``draw``. ``predefined`` has one level only.

    Returns:
        level -> name of layer -> pattern, from the lowest level to the sparsest.

    Raises:
        ValueError: as ``draw``, or ``method`` gave masks that are not inside each other.
    """
    _check(layers, levels, method, density, scope, seed)
    counts = _counts(layers, levels, method, density, scope)
    drawn = {level: _patterns(layers, counts[level], method, density, scope, int(seed), None) for level in sorted(counts)}
    for lower, sparser in zip(list(drawn), list(drawn)[1:], strict=False):
        for name, pattern in drawn[sparser].items():
            if bool((pattern.blocks() & ~drawn[lower][name].blocks()).any()):
                raise ValueError(f"Expected a method whose masks are inside each other. Got {method!r}: in {name}, "
                                 f"{sparser:g} keeps blocks that {lower:g} does not.")
    return drawn


def _counts(layers: Sequence[Layer], levels: Sequence[float], method: str, density: Density,
            scope: str) -> dict[float, np.ndarray]:
    """Blocks of every layer at every level, from the sparsest on and never fewer than before."""
    counts: dict[float, np.ndarray] = {}
    least = None
    for level in sorted({float(level) for level in levels}, reverse=True):
        least = counts[level] = budgets(layers, level, density, scope, has_floor(method), least)
    return counts


def _patterns(layers: Sequence[Layer], counts: np.ndarray, method: str, density: Density, scope: str, seed: int,
              file: str | None, coordinates: bool = True) -> dict[str, BlockPattern]:
    apart = density != "uniform" or scope == "layer"
    exact = [np.array([i]) for i in range(len(layers))] if apart else pools(layers, scope)
    live = METHODS[method](Plan(layers, counts, exact, seed, file, coordinates))
    if not has_floor(method):
        _warn_of_empty_rows(layers, live, method)
    return {layer.name: BlockPattern.from_blocks(torch.from_numpy(blocks), layer.shape, layer.block)
            for layer, blocks in zip(layers, live, strict=True)}


def _warn_of_empty_rows(layers: Sequence[Layer], live: Sequence[np.ndarray], method: str) -> None:
    rows = [blocks.any((1, 2)) for blocks in live]
    dead = sum(int((~row).sum()) for row in rows)
    if dead:
        empty = [layer.name for layer, row in zip(layers, rows, strict=True) if not row.any()]
        whole = f" {len(empty)} of {len(layers)} layers keep nothing: {', '.join(empty)}." if empty else ""
        warnings.warn(
            f"{method} leaves {dead:,} of {sum(row.size for row in rows):,} block rows without a weight; their outputs are "
            f"constant.{whole} method='random' keeps a block in every row.", stacklevel=4)


def _check(layers: Sequence[Layer], levels: Sequence[float], method: str, density: Density, scope: str,
           seed: int) -> None:
    for sparsity in levels:
        if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
            raise ValueError(f"Expected sparsity to be at least 0 and below 1 (the fraction of masked weights). "
                             f"Got {sparsity}.")
    named = [("method", method, METHODS), ("scope", scope, SCOPES)]
    if isinstance(density, str):
        named.append(("density", density, DENSITIES))
    for argument, value, allowed in named:
        if value not in allowed:
            raise ValueError(f"Expected {argument} to be one of {', '.join(allowed)}. Got {value!r}.")
    if not isinstance(density, str) and ({layer.name for layer in layers} != set(density)
                                         or not all(0 <= value <= 1 for value in density.values())):
        raise ValueError(f"Expected density to give each of the {len(layers)} layers a number in [0, 1]. "
                         f"Got {dict(density)}.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"Expected seed to be a whole number of at least 0. Got {seed!r}.")
