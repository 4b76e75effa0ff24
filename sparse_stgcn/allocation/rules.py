"""Rules: how densities are shared out among layers, up to a common factor that the budget sets.

With the loss model of ``sensitivity``, sum over layers of s_l / d_l, under a limit on a cost sum over layers of c_l d_l, the
best densities are d_l ~ sqrt(s_l / c_l) (Lagrange). ``weights`` takes the number of a layer's weights as its cost, and
``latency`` what the table of this machine says. ``erk`` is the same without looking at any data; ``mixed`` is the geometric
mean of ``erk`` and ``weights``, which trusts either half.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .costs import Costs

__all__ = ["shares"]


def shares(costs: Costs, need: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The relative density of every layer under every rule, > 0.

    Args:
        need: s_l of every layer, as ``sensitivity`` gives it.
    """
    layers = costs.layers
    s = np.array([need[layer.name] for layer in layers])
    s = np.maximum(s, 1e-6 * s.max() if s.max() > 0 else 1.0)
    erk = np.array([layer.share("erk") for layer in layers])
    weights = np.sqrt(s / np.array([layer.num_weights for layer in layers]))
    rules = {"uniform": np.ones(len(layers)), "erk": erk, "weights": weights, "mixed": np.sqrt(erk * weights)}
    if costs.latency is not None:
        slope = np.array([costs.latency.slopes()[layer.name] for layer in layers])
        rules["latency"] = np.sqrt(s / np.maximum(slope, 1e-3 * slope.max()))
    return rules
