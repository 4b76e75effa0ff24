"""elsewhere: what an op stores of its result, until another op holds the same values in a tensor that is stored as well.

The ReLU at the end of a unit needs the unit's result y in its backward pass. Where y goes on only as a part of a larger tensor
(``append_mean``), which the layers behind store, y itself need not be kept: the part stands for it.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ._memory import empty

__all__ = ["Stored", "remember", "replaceable", "stand_in"]


class Stored:
    """A tensor as an op stores it; ``memory`` is its address, which the op says."""

    def __init__(self) -> None:
        self.memory = 0
        self.tensor: Tensor | None = None
        self.version = 0

    def keep(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a result itself would refer to its op, and that to the result
        self.version = tensor._version

    def get(self) -> Tensor:
        kept: Tensor = self.tensor  # type: ignore[assignment]  # packed before it is asked for
        if kept._version != self.version:  # autograd's own check sees saved tensors only
            raise RuntimeError("Expected the result of norm to be as it was in the forward pass. Got one of shape "
                               f"{tuple(kept.shape)} that was changed in place; change it after the backward pass.")
        return kept if kept.is_contiguous() else empty(kept, kept.shape).copy_(kept)


_stored: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a result -> how its op stores it


@contextmanager
def replaceable() -> Iterator[Stored]:
    """Within, an op stores the tensor whose address it puts into ``memory`` so that ``stand_in`` may replace it."""
    stored = Stored()

    def pack(tensor: Tensor) -> Any:
        if not stored.memory or tensor.data_ptr() != stored.memory:
            return tensor
        stored.keep(tensor)
        return stored

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.get() if isinstance(kept, Stored) else kept):
        yield stored


def remember(y: Tensor, stored: Stored) -> None:
    """y is the result that ``stored`` holds."""
    if stored.tensor is not None:
        _stored[y] = stored


def stand_in(y: Tensor, other: Tensor) -> None:
    """``other`` has the values of y, bit for bit, and is stored anyway: it is kept in place of y, if y's op allows that."""
    stored = None if torch.compiler.is_compiling() else _stored.get(y)
    if stored is not None:
        stored.keep(other)
