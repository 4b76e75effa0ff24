"""What the four backbones share: the input norm, the table of ten blocks, and the block."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels import share
from ..layers import SparseConv2d, TemporalUnit, pointwise_unit, unwatched
from ..skeleton import Skeleton

__all__ = ["Backbone", "Block", "SharingUnit", "init_fan_out", "shortcut"]

# Width relative to the base, and stride over time, of each block.
_TABLE = ((1, 1),) * 4 + ((2, 2), (2, 1), (2, 1)) + ((4, 2), (4, 1), (4, 1))

Unit = Callable[[int, int], nn.Module]
StridedUnit = Callable[[int, int, int], nn.Module]


class SharingUnit(nn.Module):
    """A spatial unit several of whose layers read its input: their gradients are added up in one sweep, see ``kernels.share``.

    readers: how many of them; mean: whether one more reads the mean over time; read: the unit's output where x is given once
    for each reader, then its mean over time (N, I, 1, V).
    """

    readers = 2
    mean = False
    read: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.read(*share(x, self.readers, self.mean))

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit's output, and x for one more reader, whose gradient is added to the others in the same sweep."""
        other, *mine = share(x, self.readers + 1, self.mean)
        return self.read(*mine), other


class Block(nn.Module):
    """ReLU(temporal(spatial(x)) + residual(x)): (N, I, T, V) -> (N, O, ceil(T / stride), V).

    ``names`` are the state-dict keys of the spatial and the temporal unit; the temporal unit takes the residual and whether
    to end with a ReLU as arguments, so that both can be part of its batch norm. The residual is the input, or a
    strided 1 x 1 convolution with batch norm where the shape changes, or absent (``residual=False``).
    """

    def __init__(
        self,
        spatial: nn.Module,
        temporal: nn.Module,
        in_channels: int,
        out_channels: int,
        stride: int,
        residual: bool = True,
        names: tuple[str, str] = ("gcn", "tcn"),
    ) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], spatial)
        self.add_module(names[1], temporal)
        self.residual: nn.Module | None = None
        if residual:
            same = in_channels == out_channels and stride == 1
            self.residual = nn.Identity() if same else TemporalUnit(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        spatial, temporal = (getattr(self, name) for name in self.names)
        if self.residual is None or not x.requires_grad:
            return temporal(spatial(x), None if self.residual is None else self.residual(x), relu=True)
        if isinstance(spatial, SharingUnit) and unwatched(spatial):
            y, x = spatial.beside(x)
        else:
            x, for_spatial = share(x, 2)
            y = spatial(for_spatial)
        return temporal(y, self.residual(x), relu=True)


class Backbone(nn.Module):
    """Batch norm of the input, then ten blocks: (N, M, T, V, C) -> (N, M, 4 * base_channels, ceil(T / 4), V).

    Persons M are folded into the batch. Blocks 5 and 8 double the width and halve T.

    Args:
        skeleton: V joints and their graph.
        in_channels: C.
        spatial: (in, out) -> spatial unit.
        temporal: (in, out, stride) -> temporal unit.
        norm: features of the input norm: "VC" per joint and channel, whatever M is; "MVC" also per person,
            which fixes M to ``num_person``.
        names: state-dict keys of the block list, and of a block's spatial and temporal unit.
        block: the class of the blocks.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        in_channels: int,
        spatial: Unit,
        temporal: StridedUnit,
        norm: str = "VC",
        num_person: int = 2,
        base_channels: int = 64,
        names: tuple[str, str, str] = ("gcn", "gcn", "tcn"),
        block: type[Block] = Block,
    ) -> None:
        super().__init__()
        self.skeleton, self.in_channels = skeleton, in_channels
        self.num_person = num_person if norm == "MVC" else None
        self.data_bn = nn.BatchNorm1d((self.num_person or 1) * len(skeleton) * in_channels)
        blocks: list[Block] = []
        before = in_channels
        for factor, stride in _TABLE:
            width = base_channels * factor
            blocks.append(block(spatial(before, width), temporal(width, width, stride), before, width, stride,
                                residual=bool(blocks), names=names[1:]))
            before = width
        self.out_channels = before
        self._blocks = names[0]
        self.add_module(names[0], nn.ModuleList(blocks))

    @property
    def blocks(self) -> nn.ModuleList:
        """The ten blocks, whatever their state-dict key."""
        return getattr(self, self._blocks)

    def forward(self, keypoint: Tensor) -> Tensor:
        self._check(keypoint)
        batch, persons, frames, joints, channels = keypoint.shape
        x = keypoint.permute(0, 1, 3, 4, 2)
        x = self.data_bn(x.reshape(-1, self.data_bn.num_features, frames))
        x = x.view(batch * persons, joints, channels, frames).permute(0, 2, 3, 1).contiguous()
        for block in self.blocks:
            x = block(x)
        return x.view(batch, persons, *x.shape[1:])

    def _check(self, keypoint: Tensor) -> None:
        joints = len(self.skeleton)
        if keypoint.dim() != 5:
            raise ValueError(f"Expected keypoint of shape (N, M, T, V, C). Got {tuple(keypoint.shape)}.")
        if tuple(keypoint.shape[3:]) != (joints, self.in_channels):
            raise ValueError(
                f"Expected keypoint with {joints} joints ({self.skeleton.name}) and {self.in_channels} "
                f"channels. Got {keypoint.shape[3]} and {keypoint.shape[4]}; choose the model's layout "
                "and in_channels to fit the data."
            )
        if 0 in keypoint.shape[1:3]:
            raise ValueError(f"Expected keypoint with at least one person and one frame. Got {tuple(keypoint.shape)}.")
        if self.num_person is not None and keypoint.shape[1] != self.num_person:
            raise ValueError(
                f"Expected keypoint with {self.num_person} persons, which the input norm of this "
                f"backbone fixes. Got {keypoint.shape[1]}; pad the persons with zeros or build the "
                f"model with num_person={keypoint.shape[1]}."
            )


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """Residual inside a spatial unit: the input, or 1 x 1 convolution and norm where the width changes."""
    return nn.Identity() if in_channels == out_channels else pointwise_unit(in_channels, out_channels)


def init_fan_out(module: nn.Module) -> None:
    """He initialisation of every convolution below ``module``: N(0, 2 / fan_out), bias 0 (He et al. 2015)."""
    for conv in module.modules():
        if isinstance(conv, SparseConv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def graph_parameter(adjacency: Tensor) -> nn.Parameter:
    """A trainable copy of the graph."""
    return nn.Parameter(torch.clone(adjacency))
