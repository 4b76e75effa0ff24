"""StreamNetwork: the blocks of a network on a stream of frames."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..backbones.base import Block
from ..recognizer import Recognizer
from ..runtime.program import fold
from .frames import Join
from .spatial import spatial_unit
from .temporal import temporal_unit
from .unit import StreamedConv, StreamedUnit

__all__ = ["StreamNetwork"]


class StreamedBlock(StreamedUnit):
    """ReLU(temporal(spatial(x)) + residual(x)): the residual waits for the temporal unit."""

    def __init__(self, block: Block, window: int | None) -> None:
        spatial, temporal = (getattr(block, name) for name in block.names)
        self.spatial, self.temporal = spatial_unit(spatial, window), temporal_unit(temporal)
        self.residual = None if block.residual is None or isinstance(block.residual, nn.Identity) \
            else StreamedConv(block.residual.conv, block.residual.bn)  # type: ignore[arg-type]
        self.join = None if block.residual is None else Join(2)
        self.delay, self.stride = self.spatial.delay + self.temporal.delay, self.temporal.stride

    def push(self, x: Tensor, end: bool) -> Tensor:
        y = self.temporal.push(self.spatial.push(x, end), end)
        if self.join is None:
            return y.relu_()
        y, shortcut = self.join.push(y, x if self.residual is None else self.residual.push(x, end))
        return torch.add(y, shortcut).relu_()


class StreamNetwork(StreamedUnit):
    """The features of a ``Recognizer`` in eval mode, frame by frame: each is final, and given out once.

    Where a network mixes frames by convolutions, dilations, strides and pooling only, which is so for ST-GCN, the features are
    those of the network on the whole sequence, up to float32 rounding: frames before the first and, after ``end``, behind the
    last one are what the network pads with. The means over time inside the spatial units of AA-GCN, CTR-GCN and DG-STGCN are
    means over the last ``window`` frames instead. Sparse convolutions run on their live blocks.

    Args:
        model: any stage; it is copied.
        window: frames of the input; None: all frames so far.

    Attributes:
        delay: feature t is given out with input frame t * stride + delay, counted from 0.
        stride: input frames per feature.
    """

    @torch.no_grad()
    def __init__(self, model: Recognizer, window: int | None = None) -> None:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        backbone = model.backbone
        self.head, self.num_person = model.cls_head.fc_cls, backbone.num_person
        gain, shift = fold(backbone.data_bn)
        shape = (self.num_person or 1, 1, len(backbone.skeleton), backbone.in_channels)
        self.gain, self.shift = gain.view(shape), shift.view(shape)
        self.blocks: list[StreamedBlock] = []
        rate, delay = 1, 0
        for block in backbone.blocks:
            made = StreamedBlock(block, None if window is None else max(1, window // rate))  # type: ignore[arg-type]
            self.blocks.append(made)
            delay += rate * made.delay
            rate *= made.stride
        self.delay, self.stride, self.channels = delay, rate, backbone.out_channels

    @torch.inference_mode()
    def push(self, x: Tensor, end: bool = False) -> Tensor:
        """New frames (M, T, V, C) -> the mean over persons and joints of the features that are final, (T', features)."""
        x = (x * self.gain + self.shift).permute(0, 3, 1, 2).contiguous()
        for block in self.blocks:
            if not (x.shape[2] or end):
                return x.new_empty(0, self.channels)
            x = block.push(x, end)
        return x.mean((0, 3)).T
