"""DG-STGCN (Duan et al. 2022), as in PYSKL."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch_norms import norm_fuses, normalise, track
from ..kernels import again
from ..kernels.dg_unit import dg_unit
from ..kernels.dynamic import dg_aggregate
from ..layers import SparseConv2d, pointwise_unit, run_units, unwatched
from ..skeleton import Skeleton
from .base import Backbone, SharingUnit, graph_parameter, shortcut
from .multibranch import MixedTemporal

__all__ = ["DGSTGCN", "GroupGraphUnit"]


class GroupGraphUnit(SharingUnit):
    """ReLU(BN(post(pre(x) times the graphs)) + down(x)), see ``kernels.dynamic.dg_aggregate``.

    K subsets of C_mid = ratio * O channels each; alpha and beta have K entries in PYSKL's checkpoints, of
    which the first is used. Shapes: (N, I, T, V) -> (N, O, T, V).
    """

    mean = True

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor, ratio: float = 0.125) -> None:
        super().__init__()
        self.subsets = adjacency.shape[0]
        inner = self.subsets * int(ratio * out_channels)
        self.A = graph_parameter(adjacency)
        self.alpha = nn.Parameter(torch.zeros(self.subsets))
        self.beta = nn.Parameter(torch.zeros(self.subsets))
        self.pre = pointwise_unit(in_channels, inner).append(nn.ReLU(inplace=True))
        self.post = SparseConv2d(inner, out_channels)
        self.conv1 = SparseConv2d(in_channels, inner)
        self.conv2 = SparseConv2d(in_channels, inner)
        self.down = shortcut(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)

    def read(self, x: Tensor, for_shortcut: Tensor, mean: Tensor) -> Tensor:
        """The unit where the mean over time (N, I, 1, V), which makes the graphs, is given; both inputs are x."""
        y = self.post(self._product(x, self.conv1(mean)[:, :, 0], self.conv2(mean)[:, :, 0]))
        return normalise(self.bn, y, self.down(for_shortcut), relu=True, elsewhere=True)

    def _product(self, x: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
        """pre(x) times the graphs that are made of x1 and x2: (N, K C_mid, T, V)."""
        grouped = lambda y: y.unflatten(1, (self.subsets, -1))
        graphs = grouped(x1), grouped(x2), self.alpha[0], self.beta[0], self.A
        conv: nn.Module
        bn: Any
        conv, bn, relu = self.pre
        if all(map(unwatched, (self.pre, bn, relu))):
            z = conv(x)
            if norm_fuses(bn, z):
                # Which inputs are read is no matter of a trace: it is asked of the pattern's numbers.
                post = self.post.live_pattern if unwatched(self.post) and not torch.compiler.is_compiling() else None
                read = None if post is None else post.inputs_read()
                y, batch_mean, variance = dg_unit(z, bn.weight, bn.bias, *graphs, bn.eps, read)
                track(bn, batch_mean, variance)
                return y
            inner = run_units([bn, relu], z)
        else:
            inner = self.pre(x)
        with again(inner):
            return dg_aggregate(grouped(inner), *graphs).flatten(1, 2)


class DGSTGCN(Backbone):
    """DG-STGCN: K subsets with graphs per channel from the sample, and multi-branch temporal units.

    Args:
        num_subsets: K.
        graph: adjacency mode; PYSKL draws it at ``random``, here from ``graph_seed``.
        ratio: channels of a subset over output channels.
        joint_mean: fuse the mean joint into the temporal unit (PYSKL); the paper's code does not.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        in_channels: int = 3,
        base_channels: int = 64,
        num_subsets: int = 8,
        graph: str = "random",
        graph_seed: int = 0,
        ratio: float = 0.125,
        joint_mean: bool = True,
    ) -> None:
        adjacency = skeleton.adjacency(graph, num_subsets, graph_seed)
        super().__init__(
            skeleton,
            in_channels,
            base_channels=base_channels,
            spatial=lambda before, width: GroupGraphUnit(before, width, adjacency, ratio),
            temporal=lambda before, width, stride: MixedTemporal(
                before, width, stride, joint_mean, len(skeleton)
            ),
        )
