"""ST-GCN (Yan et al. 2018) with trainable edge importance, as in PYSKL."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch_norms import norm_fuses, normalise, track
from ..kernels import share
from ..kernels.stgcn_block import Normed, fuses, stgcn_block
from ..layers import SparseConv2d, TemporalUnit, unwatched
from ..skeleton import Skeleton
from .base import Backbone, Block, graph_parameter

__all__ = ["STGCN", "GraphBlock", "GraphUnit"]

_ADAPTIVE = ("importance", "init", "offset", "fixed")


class GraphUnit(nn.Module):
    """ReLU(BN(y)), y[w] = sum over k, v of A_k[v,w] conv_k(x)[v]: (N, I, T, V) -> (N, O, T, V).

    ``adaptive`` says how the graph learns: ``importance`` A * PA with PA = 1 at first, ``init`` A itself,
    ``offset`` A + PA with PA near 0, ``fixed`` not at all.
    """

    def __init__(
        self, in_channels: int, out_channels: int, adjacency: Tensor, adaptive: str = "importance"
    ) -> None:
        super().__init__()
        self.adaptive = adaptive
        if adaptive == "init":
            self.A = graph_parameter(adjacency)
        else:
            self.register_buffer("A", adjacency.clone())
        if adaptive == "importance":
            self.PA = nn.Parameter(torch.ones_like(adjacency))
        elif adaptive == "offset":
            self.PA = nn.Parameter(torch.empty_like(adjacency).uniform_(-1e-6, 1e-6))
        self.conv = SparseConv2d(in_channels, out_channels, subsets=adjacency.shape[0])
        self.bn = nn.BatchNorm2d(out_channels)
        self._support: tuple[object, Tensor] | None = None

    def graph(self) -> Tensor:
        """(K, V, V) as used in the forward pass."""
        if self.adaptive == "importance":
            return self.A * self.PA
        return self.A + self.PA if self.adaptive == "offset" else self.A

    def support(self) -> Tensor | None:
        """Bool (K, V, V): the only entries of the graph that can ever differ from 0; None if all can.

        It follows the values of A: a change of A in place, by loading a state dict for instance, renews it.
        """
        if self.adaptive not in ("importance", "fixed"):
            return None
        if torch.compiler.is_exporting() and self._support is not None:
            return self._support[1]  # traced tensors have no address; export runs the network once before it traces
        version = None if self.A.is_inference() else self.A._version
        key = (self.A.data_ptr(), self.A.device, version)
        if version is None or self._support is None or self._support[0] != key:
            with torch.inference_mode(False):  # it outlives this call, and is asked for its version
                self._support = (key, self.A != 0)
        return self._support[1]

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.bn, self.conv.aggregate(x, self.graph(), self.support()), relu=True)


class GraphBlock(Block):
    """A block whose two convolutions, norms, residual and ReLUs are one op in training on a CPU.

    See ``kernels.stgcn_block``; everywhere else, and where a hook watches what lies between, the units run one by one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.fuses(x):
            return super().forward(x)
        gcn: Any = self.gcn
        tcn: Any = self.tcn
        identity = isinstance(self.residual, nn.Identity)
        residual = None
        if self.residual is not None and not identity:
            x, for_residual = share(x, 2)
            residual = self.residual(for_residual)
        graph, temporal = gcn.conv.live(), tcn.conv.live()
        graph_bias = None if graph.bias is None else graph.bias.view(gcn.conv.subsets, gcn.conv.out_channels)
        out, first, second = stgcn_block(
            x, Normed(graph.values, graph.pattern, graph_bias, gcn.bn.weight, gcn.bn.bias, gcn.bn.eps), gcn.graph(),
            Normed(temporal.values, temporal.pattern, temporal.bias, tcn.bn.weight, tcn.bn.bias, tcn.bn.eps),
            residual, identity, gcn.support(), tcn.conv.stride, tcn.conv.dilation)
        track(gcn.bn, *first)
        track(tcn.bn, *second)
        return out

    def fuses(self, x: Tensor) -> bool:
        """Whether x can go through the block as one op."""
        gcn, tcn = self._modules.get("gcn"), self._modules.get("tcn")
        if type(gcn) is not GraphUnit or type(tcn) is not TemporalUnit or x.dim() != 4:
            return False
        if type(gcn.conv) is not SparseConv2d or type(tcn.conv) is not SparseConv2d:
            return False
        inside = [gcn, gcn.conv, gcn.bn, tcn, tcn.conv, tcn.bn]
        if isinstance(self.residual, nn.Identity):
            inside.append(self.residual)
        pattern: Any = tcn.conv.live_pattern
        if gcn.conv.live_pattern is None or pattern is None or not all(map(unwatched, inside)):
            return False
        if not (norm_fuses(gcn.bn, x) and norm_fuses(tcn.bn, x)):
            return False
        weights = (*gcn.conv.parameters(), *tcn.conv.parameters(), gcn.A)
        return all(w.dtype == x.dtype for w in weights) and fuses(x, pattern, tcn.conv.stride)


class STGCN(Backbone):
    """ST-GCN: a fixed graph in three subsets with trainable importance, and 9 x 1 temporal convolutions.

    Args:
        graph: adjacency mode, see ``Skeleton.adjacency``; num_subsets, graph_seed: of ``random``.
        adaptive: how the graph learns, see ``GraphUnit``. The sparse networks of the paper's code are
            ``graph="random", adaptive="init"``.
    """

    def __init__(self, skeleton: Skeleton, in_channels: int = 3, base_channels: int = 64,
                 graph: str = "stgcn_spatial", adaptive: str = "importance", num_subsets: int = 3,
                 graph_seed: int = 0) -> None:
        if adaptive not in _ADAPTIVE:
            raise ValueError(f"Expected adaptive to be one of {', '.join(_ADAPTIVE)}. Got {adaptive!r}.")
        adjacency = skeleton.adjacency(graph, num_subsets, graph_seed)
        super().__init__(
            skeleton, in_channels, base_channels=base_channels,
            spatial=lambda before, width: GraphUnit(before, width, adjacency, adaptive),
            temporal=lambda before, width, stride: TemporalUnit(before, width, stride=stride), block=GraphBlock)
