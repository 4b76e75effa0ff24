"""Sparse spatial-temporal graph convolution networks for skeleton-based action recognition."""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. Names load on first use, so that `import sparse_stgcn` stays quick and
# never fails for a part that is not needed.
_PUBLIC = {
    "create_model": "backbones",
    "Recognizer": "recognizer",
    "sparsify": "sparsity",
    "compact": "sparsity",
    "densify": "sparsity",
    "save": "checkpoint",
    "load": "checkpoint",
    "Skeleton": "skeleton",
    "BlockPattern": "kernels",
    "Archive": "data.archive",
    "Predictor": "predictor",
    "StreamPredictor": "streaming.predictor",
    "RollingPredictor": "streaming.rolling",
    "optimize": "runtime",
    "Ensemble": "recognizer",
    "backends": "kernels",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .backbones import create_model as create_model
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .data.archive import Archive as Archive
    from .kernels import BlockPattern as BlockPattern
    from .kernels import backends as backends
    from .predictor import Predictor as Predictor
    from .recognizer import Ensemble as Ensemble
    from .recognizer import Recognizer as Recognizer
    from .runtime import optimize as optimize
    from .skeleton import Skeleton as Skeleton
    from .sparsity import compact as compact
    from .sparsity import densify as densify
    from .sparsity import sparsify as sparsify
    from .streaming.predictor import StreamPredictor as StreamPredictor
    from .streaming.rolling import RollingPredictor as RollingPredictor


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparse_stgcn' has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
