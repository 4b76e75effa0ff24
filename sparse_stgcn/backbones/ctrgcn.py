"""CTR-GCN (Chen et al. 2021), as in PYSKL."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import share, total
from ..kernels.dynamic import ctr_aggregate
from ..layers import SparseConv2d, joined, normalise
from ..skeleton import Skeleton
from .base import Backbone, graph_parameter, init_fan_out, shortcut
from .multibranch import BranchedTemporal, MixedTemporal

__all__ = ["CTRGCN", "ChannelGraph", "ChannelGraphUnit"]

_TEMPORAL = ("branched", "mixed")


class ChannelGraph(nn.Module):
    """One subset of CTR-GCN: a product with a graph per channel, see ``kernels.dynamic.ctr_aggregate``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        rank = 8 if in_channels <= 16 else in_channels // 8
        self.conv1 = SparseConv2d(in_channels, rank)
        self.conv2 = SparseConv2d(in_channels, rank)
        self.conv3 = SparseConv2d(in_channels, out_channels)
        self.conv4 = SparseConv2d(rank, out_channels)

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor, alpha: Tensor, graph: Tensor) -> Tensor:
        """conv1 and conv2 of the mean over time (N, R, 1, V), conv3 of x (N, O, T, V) -> (N, O, T, V)."""
        values, pattern = self.conv4.values, self.conv4.pattern
        weight = self.conv4.dense_weight()[:, :, 0, 0] if values is None else values
        bias: Tensor = self.conv4.bias  # type: ignore[assignment]  # built with one
        return ctr_aggregate(x1[:, :, 0], x2[:, :, 0], x3, weight, bias, alpha, graph, None if values is None else pattern)


class ChannelGraphUnit(nn.Module):
    """ReLU(BN(sum over k of ChannelGraph_k(x)) + down(x)): (N, I, T, V) -> (N, O, T, V).

    conv1 and conv2 run on the mean over time: it commutes with a 1 x 1 convolution and is T times cheaper.
    """

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        self.A = graph_parameter(adjacency)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.convs = nn.ModuleList(ChannelGraph(in_channels, out_channels) for _ in adjacency)
        self.down = shortcut(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)
        init_fan_out(self)
        nn.init.constant_(self.bn.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        convs: Any = self.convs
        x, again, mean = share(x, 2, mean=True)
        embedded = joined([c for conv in convs for c in (conv.conv1, conv.conv2)], mean)
        wide = joined([conv.conv3 for conv in convs], again)
        y = total([conv(x1, x2, x3, self.alpha, graph)
                   for conv, x1, x2, x3, graph in zip(convs, embedded[::2], embedded[1::2], wide, self.A, strict=True)])
        return normalise(self.bn, y, self.down(x), relu=True)


class CTRGCN(Backbone):
    """CTR-GCN: a graph for every channel, refined by the sample, and multi-branch temporal units.

    Args:
        num_person: persons per sample, M; the input norm has statistics for each.
        temporal: ``branched``, CTR-GCN's four branches; ``mixed``, the six branches with a transform that the
            paper's code puts in their place.
        graph, num_subsets, graph_seed: see ``Skeleton.adjacency``.
    """

    def __init__(self, skeleton: Skeleton, in_channels: int = 3, num_person: int = 2, base_channels: int = 64,
                 temporal: str = "branched", graph: str = "spatial", num_subsets: int = 3, graph_seed: int = 0
                 ) -> None:
        if temporal not in _TEMPORAL:
            raise ValueError(f"Expected temporal to be one of {', '.join(_TEMPORAL)}. Got {temporal!r}.")
        adjacency = skeleton.adjacency(graph, num_subsets, graph_seed)

        def temporal_unit(before: int, width: int, stride: int) -> nn.Module:
            if temporal == "mixed":
                return MixedTemporal(before, width, stride, joint_mean=False)
            unit = BranchedTemporal(before, width, stride)
            init_fan_out(unit)
            return unit

        super().__init__(
            skeleton, in_channels, norm="MVC", num_person=num_person, base_channels=base_channels,
            spatial=lambda before, width: ChannelGraphUnit(before, width, adjacency), temporal=temporal_unit,
            names=("net", "gcn1", "tcn1"))
        self.register_buffer("A", adjacency)  # in PYSKL's checkpoints, read by nothing
