"""How many blocks every layer keeps: exact counts for a sparsity, a density rule and a scope."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .plan import Layer

__all__ = ["DENSITIES", "SCOPES", "Density", "budgets", "pools", "spread"]

DENSITIES = ("uniform", "erk")
SCOPES = ("layer", "block", "global")
Density = str | Mapping[str, float]


def budgets(layers: Sequence[Layer], sparsity: float, density: Density = "uniform", scope: str = "layer",
            floor: bool = True, least: np.ndarray | None = None) -> np.ndarray:
    """Number of live blocks of every layer, int64; see ``draw`` for the arguments and the rules.

    Args:
        least: counts that no layer goes below, besides the floor: those of a sparser mask that has to fit inside.

    Raises:
        ValueError: the block is taller or wider than every layer.
    """
    _check_block(layers)
    counts = np.zeros(len(layers), dtype=np.int64)
    lowest = np.array([layer.grid[0] if floor else 0 for layer in layers], dtype=float)
    lowest = lowest if least is None else np.maximum(lowest, least)
    if not isinstance(density, str):
        blocks = np.array([layer.num_blocks for layer in layers], dtype=float)
        asked = np.array([density[layer.name] for layer in layers])
        return np.clip(np.round(asked * blocks), lowest, blocks).astype(np.int64)
    for pool in pools(layers, scope):
        chosen = [layers[i] for i in pool]
        share = np.array([layer.share(density) for layer in chosen])
        target = (1 - sparsity) * float(sum(layer.num_weights for layer in chosen))
        counts[pool] = spread(chosen, share, target, lowest[pool], exact=scope != "layer" or density != "uniform")
    return counts


def spread(layers: Sequence[Layer], share: np.ndarray, target: float, lowest: np.ndarray, exact: bool = True) -> np.ndarray:
    """Live blocks of every layer, int64, for densities in proportion to ``share`` (> 0) that keep ``target`` weights.

    No layer keeps fewer blocks than ``lowest`` or more than it has; the others make up for those that are held there.

    Args:
        exact: the whole counts together miss ``target`` by less than half a block; else each is its own nearest one.
    """
    blocks = np.array([layer.num_blocks for layer in layers], dtype=float)
    size = np.array([layer.block_weights for layer in layers])
    ideal = _fill(share * blocks, lowest, blocks, size, target)
    whole = _round_to(ideal, lowest, blocks, size, target) if exact else np.clip(np.round(ideal), lowest, blocks)
    return whole.astype(np.int64)


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


def pools(layers: Sequence[Layer], scope: str) -> list[np.ndarray]:
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
