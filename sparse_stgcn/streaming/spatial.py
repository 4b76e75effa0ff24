"""The spatial units of a stream: frame by frame where they are, with sliding means where they look at the whole clip."""
from __future__ import annotations

import torch
from torch import Tensor

from ..backbones.aagcn import AdaptiveGraphUnit
from ..backbones.ctrgcn import ChannelGraphUnit
from ..backbones.dgstgcn import GroupGraphUnit
from ..backbones.stgcn import GraphUnit
from ..kernels.prepared import FixedGraphConv
from ..runtime.program import fold
from .frames import Join, SlidingMean, no_frames
from .unit import StreamedConv, StreamedUnit, folded

__all__ = ["spatial_unit"]


def spatial_unit(unit: torch.nn.Module, window: int | None) -> StreamedUnit:
    """The streamed form of a spatial unit in eval mode; ``window``: frames of its sliding means, None: all so far."""
    if isinstance(unit, GraphUnit):
        return FixedGraph(unit)
    if isinstance(unit, AdaptiveGraphUnit):
        return AdaptiveGraph(unit, window)
    if isinstance(unit, (ChannelGraphUnit, GroupGraphUnit)):
        return MeanGraph(unit, window)
    raise TypeError(f"Expected a spatial unit of one of the four backbones. Got {type(unit).__name__}.")


class FixedGraph(StreamedUnit):
    """ST-GCN's unit, exactly: its graph does not depend on the frames."""

    @torch.no_grad()
    def __init__(self, unit: GraphUnit) -> None:
        weight, pattern, _ = folded(unit.conv, None)
        gain, shift = fold(unit.bn)
        bias = None if unit.conv.bias is None else unit.conv.bias.view(unit.conv.subsets, -1) * gain
        self.conv = FixedGraphConv(weight * gain[:, None, None], pattern, bias, shift, unit.graph().detach().contiguous())

    def push(self, x: Tensor, end: bool) -> Tensor:
        return self.conv(x).relu_() if x.shape[2] else no_frames(x, self.conv.pattern.shape[0])


class MeanGraph(StreamedUnit):
    """The units of CTR-GCN and DG-STGCN, whose graphs follow the mean over time: here over the last ``window`` frames."""

    def __init__(self, unit: ChannelGraphUnit | GroupGraphUnit, window: int | None) -> None:
        self.unit, self.mean = unit, SlidingMean(window)

    def push(self, x: Tensor, end: bool) -> Tensor:
        if not x.shape[2]:
            return no_frames(x, self.unit.bn.num_features)
        return self.unit.read(x, x, self.mean.push(x.transpose(1, 2))[:, :, None])


class AdaptiveGraph(StreamedUnit):
    """AA-GCN's unit: its graphs follow a mean over time of products, its attention two means; the convolution of the attention
    over frames is exact, and is what the unit waits for."""

    def __init__(self, unit: AdaptiveGraphUnit, window: int | None) -> None:
        self.unit = unit
        self.products = SlidingMean(window)
        if unit.attention:
            self.over_frames, self.over_both = SlidingMean(window), SlidingMean(window)
            self.gate = StreamedConv.of_weight(unit.conv_ta.weight.detach(), unit.conv_ta.bias.detach())  # type: ignore[union-attr]
            self.join = Join(2)
            self.delay = self.gate.delay

    def push(self, x: Tensor, end: bool) -> Tensor:
        unit = self.unit
        y = self._graphs(x) if x.shape[2] else no_frames(x, unit.bn.num_features)
        if not unit.attention:
            return y
        if y.shape[2]:
            joints = self.over_frames.push(y.transpose(1, 2))  # (N, C, V)
            y = y * (1 + torch.sigmoid(unit.conv_sa(joints))).unsqueeze(2)
        gates, y = self.join.push(self.gate.push(y.mean(3, keepdim=True), end), y.flatten(3))
        if not y.shape[2]:
            return y
        y = y * (1 + torch.sigmoid(gates))
        squeezed = self.over_both.push(y.mean(3).transpose(1, 2))  # (N, C)
        return y * (1 + torch.sigmoid(unit.fc2c(torch.relu(unit.fc1c(squeezed)))))[:, :, None, None]

    def _graphs(self, x: Tensor) -> Tensor:
        embedded = self.unit.embedded_pairs(x)
        products = torch.einsum("nkrtv,nkrtw->ntkvw", embedded[:, 0], embedded[:, 1])
        mean = self.products.push(products) / embedded.shape[3]
        return self.unit.with_graphs(x, x, self.unit.A + self.unit.alpha * torch.tanh(mean))
