"""CTR-GCN (Chen et al. 2021), as in PYSKL."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch_norms import normalise
from ..joins import live_stack, stacked
from ..kernels.ctr import ctr_aggregate_sum
from ..kernels.ctr_unit import ctr_unit
from ..layers import SparseConv2d
from ..skeleton import Skeleton
from .base import Backbone, SharingUnit, graph_parameter, init_fan_out, shortcut
from .multibranch import BranchedTemporal, MixedTemporal

__all__ = ["CTRGCN", "ChannelGraph", "ChannelGraphUnit"]

_TEMPORAL = ("branched", "mixed")


class ChannelGraph(nn.Module):
    """The convolutions of one subset of CTR-GCN, see ``kernels.ctr.ctr_aggregate_sum``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        rank = 8 if in_channels <= 16 else in_channels // 8
        self.conv1 = SparseConv2d(in_channels, rank)
        self.conv2 = SparseConv2d(in_channels, rank)
        self.conv3 = SparseConv2d(in_channels, out_channels)
        self.conv4 = SparseConv2d(rank, out_channels)


class ChannelGraphUnit(SharingUnit):
    """ReLU(BN(sum over k of ChannelGraph_k(x)) + down(x)): (N, I, T, V) -> (N, O, T, V).

    conv1 and conv2 run on the mean over time: it commutes with a 1 x 1 convolution and is T times cheaper.
    """

    mean = True

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        self.A = graph_parameter(adjacency)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.convs = nn.ModuleList(ChannelGraph(in_channels, out_channels) for _ in adjacency)
        self.down = shortcut(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)
        init_fan_out(self)
        nn.init.constant_(self.bn.weight, 1e-6)

    def read(self, x: Tensor, for_shortcut: Tensor, mean: Tensor) -> Tensor:
        """The unit where the mean over time (N, I, 1, V), which makes the graphs, is given; both inputs are x."""
        convs: Any = list(self.convs)
        embedded = stacked([c for conv in convs for c in (conv.conv1, conv.conv2)], mean)
        last, wide = [conv.conv4 for conv in convs], [conv.conv3 for conv in convs]
        lives = [conv.live() for conv in last]
        patterns = [None if live is None else live.pattern for live in lives]
        weights = [conv.dense_weight()[:, :, 0, 0] if live is None else live.values
                   for conv, live in zip(last, lives, strict=True)]
        embedded = embedded[:, :, 0].unflatten(1, (len(convs), 2, -1))
        rest: Any = weights, [conv.bias for conv in last], self.alpha, self.A, patterns
        live = live_stack(wide) if x.requires_grad else None  # in training; the fused runtime has its own way
        if live is not None:
            y = ctr_unit(embedded, x, *live, *rest)
        else:
            y = ctr_aggregate_sum(embedded, stacked(wide, x).unflatten(1, (len(convs), -1)), *rest)
        return normalise(self.bn, y, self.down(for_shortcut), relu=True)


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
