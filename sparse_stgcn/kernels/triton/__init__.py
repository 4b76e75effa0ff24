"""Triton kernels, one file per op. Importing this package does not import triton; asking it for a function does.

The functions have the meaning, and where there is one the signature, of the ops in kernels/temporal_conv.py and
kernels/graph_conv.py:

    temporal_conv, temporal_conv_dx, temporal_conv_dw
    graph_conv, graph_conv_dx, graph_conv_dw, graph_conv_dadjacency
    unsupported: why no kernel takes a dtype and an adjacency's or frame's size, or None
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "temporal_conv": ".temporal_conv",
    "temporal_conv_dx": ".temporal_conv_backward",
    "temporal_conv_dw": ".temporal_conv_backward",
    "graph_conv": ".graph_conv",
    "graph_conv_dx": ".graph_conv_backward",
    "graph_conv_dw": ".graph_conv_backward",
    "graph_conv_dadjacency": ".graph_conv_adjacency",
    "unsupported": ".launch",
}

__all__ = sorted(_WHERE)


def function(name: str) -> Any:
    """The function of this package with that name; imports triton.

    Raises:
        ImportError: triton is not installed.
        KeyError: there is no such function.
    """
    return getattr(import_module(_WHERE[name], __name__), name)
