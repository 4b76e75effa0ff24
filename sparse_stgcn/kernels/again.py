"""again: what ops store of a tensor that is cheaper to make once more than to keep.

relu(norm(x)) is one pass over x, which the norm stores anyway. An op behind it that stores the result for its backward pass
doubles the memory of the layer; within ``again`` it stores how to make it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["again", "remember"]

_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a tensor -> its version then, and what makes its values once more


def remember(y: Tensor, make: Callable[[], Tensor], inputs: Sequence[Tensor] = ()) -> None:
    """``make()`` gives the values of y from ``inputs``, bit for bit, in a tensor of its shape and strides: for ``again``."""
    if y.requires_grad and not torch.compiler.is_compiling():
        _recipes[y] = y._version, _Recipe(make, inputs)


class _Recipe:
    """What makes a tensor, as long as nothing that it reads was changed: autograd's own check sees saved tensors only."""

    def __init__(self, make: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
        self.make, self.inputs = make, [(tensor, tensor._version) for tensor in inputs]

    def __call__(self) -> Tensor:
        for tensor, version in self.inputs:
            if tensor._version != version:
                raise RuntimeError("Expected the arguments of norm to be as they were in the forward pass. Got one of shape "
                                   f"{tuple(tensor.shape)} that was changed in place; change it after the backward pass.")
        return self.make()


@contextmanager
def again(y: Tensor) -> Iterator[None]:
    """Within, ops that store y or a view of it for their backward pass store how to make it, if that is known (``remember``).

    It is made when the first of these ops asks, and dropped when each has asked once: in a backward pass they are neighbours.
    """
    version, make = (None, None) if torch.compiler.is_compiling() else _recipes.get(y, (None, None))
    if make is None or version != y._version:  # changed in place since: what made it gives other values
        yield
        return
    made, memory = _Made(make), y.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != memory:
            return tensor
        return _View(made, tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept() if isinstance(kept, _View) else kept):
        yield


class _Made:
    """The tensor made again, from the first op that asks to the last."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.tensor: Tensor | None = None
        self.asking = self.asked = 0

    def ask(self) -> Tensor:
        tensor: Tensor = self.make() if self.tensor is None else self.tensor
        self.asked += 1
        # A graph that is kept (retain_graph) asks again.
        self.tensor = None if self.asked % self.asking == 0 else tensor
        return tensor


class _View:
    """What an op holds in place of a tensor."""

    def __init__(self, made: _Made, tensor: Tensor) -> None:
        self.made = made
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        made.asking += 1

    def __call__(self) -> Tensor:
        return self.made.ask().as_strided(self.size, self.stride, self.offset)
