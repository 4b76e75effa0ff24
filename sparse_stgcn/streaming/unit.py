"""What every part of a streamed network is, and the parts that look over several frames: convolution and pooling."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import BlockPattern
from ..kernels.prepared import WindowConv
from ..layers import SparseConv2d
from ..runtime.program import fold
from .frames import FrameQueue, Join, SlidingMean, no_frames

__all__ = ["StreamedConv", "StreamedPool", "StreamedUnit", "folded"]


class StreamedUnit(ABC):
    """A part of a network that takes frames as they come and gives out each of its own as soon as it is final.

    Attributes:
        delay: output frame t is given out with input frame t * stride + delay.
        stride: input frames per output frame.
    """

    delay: int = 0
    stride: int = 1

    @abstractmethod
    def push(self, x: Tensor, end: bool) -> Tensor:
        """New frames (N, I, T, V), T from 0 -> those that are final now, (N, O, T', V); with ``end`` all that are left."""

    def held(self) -> Iterator[Any]:
        """Everything below this unit that keeps frames."""
        for value in vars(self).values():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, StreamedUnit):
                    yield from part.held()
                elif isinstance(part, Join):
                    yield from part.queues
                elif isinstance(part, (FrameQueue, SlidingMean)):
                    yield part

    def reset(self) -> None:
        """Forget all frames."""
        for part in self.held():
            part.reset()


class StreamedConv(StreamedUnit):
    """A k x 1 convolution and the batch norm behind it, on live weights: frames wait for those (k - 1) / 2 * dilation later."""

    def __init__(self, conv: SparseConv2d, norm: nn.Module | None = None) -> None:
        weight, pattern, bias = folded(conv, norm)
        self._start(WindowConv(weight, pattern, bias, conv.stride, conv.dilation), 0.0)

    def _start(self, conv: WindowConv, fill: float) -> None:
        self.conv, self.stride, self.delay = conv, conv.stride, conv.reach // 2
        self.frames = FrameQueue(self.delay, fill)

    @classmethod
    def of_weight(cls, weight: Tensor, bias: Tensor | None) -> StreamedConv:
        """From a dense weight (O, I, K)."""
        made = cls.__new__(cls)
        made._start(WindowConv(weight, BlockPattern.full((*weight.shape,), (1, 1)), bias), 0.0)
        return made

    def push(self, x: Tensor, end: bool) -> Tensor:
        if self.conv.taps == self.stride == 1:
            return self.conv(x, x.shape[2]) if x.shape[2] else no_frames(x, self.conv.pattern.shape[0])
        frames, conv = self.frames, self.conv
        frames.append(x)
        if end:
            frames.pad(self.delay)
        count = max(0, (len(frames) - conv.reach - 1) // self.stride + 1)
        if not count:
            return no_frames(x, conv.pattern.shape[0])
        y = conv(frames.view(), count)
        frames.drop(count * self.stride)
        return y


class StreamedPool(StreamedUnit):
    """Maximum over three frames: frames wait for the next one."""

    delay = 1

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.frames = FrameQueue(1, -torch.inf)

    def push(self, x: Tensor, end: bool) -> Tensor:
        frames, stride = self.frames, self.stride
        frames.append(x)
        if end:
            frames.pad(1)
        count = max(0, (len(frames) - 3) // stride + 1)
        if not count:
            return no_frames(x, x.shape[1])
        here = frames.view()[:, :, :(count - 1) * stride + 3]
        first, second, third = (here[:, :, k:here.shape[2] - 2 + k:stride] for k in range(3))
        y = torch.maximum(torch.maximum(first, second), third)
        frames.drop(count * stride)
        return y


@torch.no_grad()
def folded(conv: SparseConv2d, norm: nn.Module | None) -> tuple[Tensor, BlockPattern, Tensor | None]:
    """Weight (O, I, K), live blocks and bias of a convolution with the batch norm behind it, if there is one, in eval mode."""
    pattern = conv.pattern if conv.values is not None else BlockPattern.full(conv.shape_oik, (8, 1))
    assert pattern is not None
    weight = conv.as_oik(conv.dense_weight())
    bias: Tensor | None = conv.bias
    if isinstance(norm, nn.BatchNorm2d):
        gain, shift = fold(norm)
        weight, bias = weight * gain[:, None, None], shift if bias is None else shift + bias * gain
    return weight, pattern, bias
