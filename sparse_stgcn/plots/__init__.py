"""Figures of trainings, networks and skeletons. Needs matplotlib; each returns a ``Figure`` that :func:`save` writes."""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .style import require, save

# Name -> module that defines it, loaded on first use: a command that asks for `require` alone stays quick.
_PUBLIC = {"curves": "runs", "lines": "runs", "violins": "runs", "confusion": "scores", "densities": "masks", "maps": "masks",
           "Point": "costs", "front": "costs", "pareto": "costs", "animate": "clips", "strip": "clips"}
__all__ = ["require", "save", *_PUBLIC]

if TYPE_CHECKING:
    from .clips import animate as animate
    from .clips import strip as strip
    from .costs import Point as Point
    from .costs import front as front
    from .costs import pareto as pareto
    from .masks import densities as densities
    from .masks import maps as maps
    from .runs import curves as curves
    from .runs import lines as lines
    from .runs import violins as violins
    from .scores import confusion as confusion


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value
