"""Archives of skeleton sequences, the readers that make them, transforms, and the way into a network."""
from __future__ import annotations

from .archive import Archive
from .dataset import SkeletonDataset

__all__ = ["Archive", "SkeletonDataset"]
