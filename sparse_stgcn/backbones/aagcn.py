"""AA-GCN (2s-AGCN with attention, Shi et al. 2019), as in PYSKL."""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch_norms import normalise
from ..joins import live_stack, stacked, sum_over_graphs
from ..kernels import attend
from ..kernels.aa_unit import aa_unit_graph
from ..kernels.dispatch import runs_natively, widened
from ..kernels.dynamic import aa_graph
from ..layers import SparseConv2d, TemporalUnit, unwatched
from ..skeleton import Skeleton
from .base import Backbone, SharingUnit, graph_parameter, init_fan_out, shortcut

__all__ = ["AAGCN", "AdaptiveGraphUnit"]


class AdaptiveGraphUnit(SharingUnit):
    """ReLU(BN(sum over k of conv_d_k(x (A_k + alpha G_k(x)))) + down(x)), then attention.

    G_k is a graph per sample from the embeddings conv_a_k and conv_b_k, see ``kernels.dynamic.aa_graph``.
    With ``attention`` the output is scaled by 1 + s for joints, then frames, then channels, each s a sigmoid.
    Shapes: (N, I, T, V) -> (N, O, T, V).
    """

    readers = 3

    def __init__(
        self, in_channels: int, out_channels: int, adjacency: Tensor, attention: bool = True
    ) -> None:
        super().__init__()
        subsets, joints = adjacency.shape[0], adjacency.shape[1]
        self.embedded = out_channels // 4
        conv = lambda width: nn.ModuleList(SparseConv2d(in_channels, width) for _ in range(subsets))
        self.A = graph_parameter(adjacency)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.conv_d, self.conv_a, self.conv_b = conv(out_channels), conv(self.embedded), conv(self.embedded)
        self.attention = attention
        if attention:
            kernel = joints if joints % 2 else joints - 1
            self.conv_ta = nn.Conv1d(out_channels, 1, 9, padding=4)
            self.conv_sa = nn.Conv1d(out_channels, 1, kernel, padding=(kernel - 1) // 2)
            self.fc1c = nn.Linear(out_channels, out_channels // 2)
            self.fc2c = nn.Linear(out_channels // 2, out_channels)
        self.down = shortcut(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        init_fan_out(self)
        for parameter in self.conv_d.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, math.sqrt(2 / (parameter.numel() * len(self.conv_d))))
        nn.init.constant_(self.bn.weight, 1e-6)
        if self.attention:
            for layer in (self.conv_ta, self.conv_sa, self.fc1c, self.fc2c):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)
            nn.init.xavier_normal_(self.conv_sa.weight)
            nn.init.kaiming_normal_(self.fc1c.weight)

    def read(self, x: Tensor, for_graphs: Tensor, for_shortcut: Tensor) -> Tensor:
        """The unit; all inputs are x."""
        live = live_stack([*self.conv_a, *self.conv_b]) if for_graphs.requires_grad else None  # type: ignore[list-item]
        graphs = (aa_graph(self.embedded_pairs(for_graphs), self.alpha, self.A) if live is None
                  else aa_unit_graph(for_graphs, *live, self.alpha, self.A))
        y = self.with_graphs(x, for_shortcut, graphs)
        return self._attend(y) if self.attention else y

    def embedded_pairs(self, x: Tensor) -> Tensor:
        """(N, 2, K, R, T, V): conv_a of all subsets, then conv_b."""
        convs: Any = [*self.conv_a, *self.conv_b]
        return stacked(convs, x).unflatten(1, (2, len(self.conv_d), -1))

    def with_graphs(self, x: Tensor, for_shortcut: Tensor, graphs: Tensor) -> Tensor:
        """The unit before its attention where the graphs (N, K, V, V) are given; both inputs are x."""
        convs: Any = list(self.conv_d)
        return normalise(self.bn, sum_over_graphs(convs, x, graphs), self.down(for_shortcut), relu=True)

    def _attend(self, y: Tensor) -> Tensor:
        layers = (self.conv_sa, self.conv_ta, self.fc1c, self.fc2c)
        y = widened(y)
        if all(map(unwatched, layers)) and runs_natively("attend", y):
            return attend(y, *(p for layer in layers for p in (layer.weight, layer.bias)))  # type: ignore[arg-type]
        y = y * (1 + torch.sigmoid(self.conv_sa(y.mean(2)))).unsqueeze(2)
        y = y * (1 + torch.sigmoid(self.conv_ta(y.mean(3)))).unsqueeze(3)
        squeezed = torch.sigmoid(self.fc2c(F.relu(self.fc1c(y.mean((2, 3))))))
        return y * (1 + squeezed)[:, :, None, None]


class AAGCN(Backbone):
    """AA-GCN: trainable graph plus a graph per sample, attention, and 9 x 1 temporal convolutions.

    Args:
        num_person: persons per sample, M; the input norm has statistics for each.
        attention: off gives the 3.47 M parameters of the paper, on those of PYSKL's checkpoints.
        graph, num_subsets, graph_seed: see ``Skeleton.adjacency``.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        in_channels: int = 3,
        num_person: int = 2,
        base_channels: int = 64,
        attention: bool = True,
        graph: str = "spatial",
        num_subsets: int = 3,
        graph_seed: int = 0,
    ) -> None:
        adjacency = skeleton.adjacency(graph, num_subsets, graph_seed)

        def temporal(before: int, width: int, stride: int) -> nn.Module:
            unit = TemporalUnit(before, width, stride=stride)
            init_fan_out(unit)
            return unit

        super().__init__(
            skeleton,
            in_channels,
            norm="MVC",
            num_person=num_person,
            base_channels=base_channels,
            temporal=temporal,
            spatial=lambda before, width: AdaptiveGraphUnit(before, width, adjacency, attention),
        )
        self.register_buffer("A", adjacency)  # in PYSKL's checkpoints, read by nothing
