"""split: slices of a tensor's channels, whose gradients are written where the gradient of the whole tensor lies.

torch joins the gradients of slices by a copy. Here an op that can write its gradient to any place asks for one (``place_of``
in its forward pass, ``memory`` in its backward pass); what another op wrote elsewhere is copied.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from ._memory import empty
from .dispatch import runs_natively

__all__ = ["Place", "memory", "place_of", "spans", "split"]

Span = tuple[int, int]


def spans(widths: Iterable[int]) -> list[Span]:
    """First and last (excluded) channel of tensors of these widths, one after the other."""
    return list(pairwise(accumulate(widths, initial=0)))


def split(y: Tensor, where: Sequence[Span]) -> tuple[Tensor, ...]:
    """y[:, begin:end] for each (begin, end) of ``where``: views, which must not be changed in place.

    Args:
        y: (N, C, T, V).
        where: in order, without overlap; channels in none of them have no gradient.
    """
    if not y.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not runs_natively("split", y):
        return tuple(y[:, begin:end] for begin, end in where)
    whole = _Whole(y, where)
    parts = _Split.apply(y, whole)
    for index, part in enumerate(parts):
        _places[part] = Place(whole, index)
    return parts


class _Whole:
    """The gradient of a split tensor, from the first op that writes a part of it to the split's own backward pass."""

    def __init__(self, y: Tensor, where: Sequence[Span]) -> None:
        self.shape, self.like, self.spans = y.shape, y.detach().new_empty(0), list(where)
        self.buffer: Tensor | None = None
        self.taken: set[int] = set()

    def part(self, index: int) -> Tensor:
        if self.buffer is None:
            self.buffer = empty(self.like, self.shape)
        begin, end = self.spans[index]
        return self.buffer[:, begin:end]

    def take(self, index: int) -> Tensor | None:
        """The memory of one slice, for the first op that asks: gradients of two ops are two tensors."""
        if index in self.taken:
            return None
        self.taken.add(index)
        return self.part(index)

    def _lies_in_place(self, gradient: Tensor | None, index: int) -> bool:
        part = self.part(index)
        return gradient is not None and gradient.data_ptr() == part.data_ptr() and gradient.stride() == part.stride()

    def collect(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The whole gradient; what is not in its place yet is copied there."""
        if any(not self._lies_in_place(gradients[index], index) for index in self.taken):
            self.buffer = None  # what was written there was not for this pass (torch.autograd.grad of a slice), or is summed up
        last = 0
        for index, (gradient, (begin, end)) in enumerate(zip(gradients, self.spans, strict=True)):
            part = self.part(index)
            if gradient is None:
                part.zero_()
            elif not self._lies_in_place(gradient, index):
                part.copy_(gradient)
            self.buffer[:, last:begin].zero_()  # type: ignore[index]  # part has made it
            last = end
        whole: Tensor = self.buffer  # type: ignore[assignment]
        whole[:, last:].zero_()
        self.buffer = None
        self.taken.clear()
        return whole


class Place(NamedTuple):
    """Where the gradient of a slice belongs."""

    whole: _Whole
    part: int


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a slice -> its Place


def place_of(x: Tensor) -> Place | None:
    """Of a slice made by ``split``; None for any other tensor."""
    return None if torch.compiler.is_compiling() else _places.get(x)


def memory(x: Tensor, place: Place | None, shape: Sequence[int] | None = None) -> Tensor:
    """Memory for the gradient of x, or of a tensor of this ``shape``: its place, unless that is taken, or a new tensor."""
    taken = None if place is None else place.whole.take(place.part)
    return empty(x, x.shape if shape is None else shape) if taken is None else taken


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, whole: _Whole) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.whole = whole
        return tuple(y[:, begin:end] for begin, end in whole.spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return (None if all(g is None for g in gradients) else ctx.whole.collect(gradients)), None
