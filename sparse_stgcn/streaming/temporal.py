"""The temporal units of a stream, exactly: every branch waits for the frames that it reads, then for the other branches."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.multibranch import BranchedTemporal, MixedTemporal
from ..kernels import spread_mean
from ..layers import SparseConv2d, TemporalUnit
from ..runtime.program import fold
from .frames import Join
from .unit import StreamedConv, StreamedPool, StreamedUnit

__all__ = ["temporal_unit"]


def temporal_unit(unit: nn.Module) -> StreamedUnit:
    """The streamed form of a temporal unit in eval mode."""
    if isinstance(unit, TemporalUnit):
        return StreamedConv(unit.conv, unit.bn)
    if isinstance(unit, BranchedTemporal):
        return Branched(unit)
    if isinstance(unit, MixedTemporal):
        return Mixed(unit)
    raise TypeError(f"Expected a temporal unit of one of the four backbones. Got {type(unit).__name__}.")


class Chain(StreamedUnit):
    """A branch: a 1 x 1 convolution, norm and ReLU, then pooling or a convolution over frames with its norm; or 1 x 1 alone."""

    def __init__(self, branch: nn.Module) -> None:
        parts: list[Any] = list(branch) if isinstance(branch, nn.Sequential) else [branch]  # type: ignore[call-overload]
        following = parts[1] if len(parts) > 1 else None
        self.first = StreamedConv(parts[0], following)
        self.relu = len(parts) > 2
        self.units: list[StreamedUnit] = []
        self.norm: tuple[Tensor, Tensor] | None = None  # behind the pooling, which it cannot be folded into
        for part in parts[3:]:
            if isinstance(part, TemporalUnit):
                self.units.append(StreamedConv(part.conv, part.bn))
            elif isinstance(part, nn.MaxPool2d):
                self.units.append(StreamedPool(part.stride[0]))  # type: ignore[index]
            elif isinstance(part, nn.BatchNorm2d):
                gain, shift = fold(part)
                self.norm = gain.detach()[:, None, None], shift.detach()[:, None, None]
        self.delay = self.first.delay + sum(unit.delay for unit in self.units)
        self.stride = self.first.stride * (self.units[-1].stride if self.units else 1)

    def push(self, x: Tensor, end: bool) -> Tensor:
        y = self.first.push(x, end)
        y = y.relu_() if self.relu else y
        for unit in self.units:
            y = unit.push(y, end)
        return y if self.norm is None else y * self.norm[0] + self.norm[1]


class _Branches(StreamedUnit):
    def __init__(self, branches: nn.ModuleList) -> None:
        self.branches = [Chain(branch) for branch in branches]
        self.join = Join(len(self.branches))
        self.delay, self.stride = max(branch.delay for branch in self.branches), self.branches[0].stride

    def parts(self, x: Tensor, end: bool) -> list[Tensor]:
        """What all branches have ready."""
        return self.join.push(*(branch.push(x, end) for branch in self.branches))


class Branched(_Branches):
    """CTR-GCN's unit."""

    def __init__(self, unit: BranchedTemporal) -> None:
        super().__init__(unit.branches)

    def push(self, x: Tensor, end: bool) -> Tensor:
        return torch.cat(self.parts(x, end), 1).relu_()


class Mixed(_Branches):
    """DG-STGCN's unit; the mean over joints, which passes through the branches too, is one of each frame."""

    def __init__(self, unit: MixedTemporal) -> None:
        super().__init__(unit.branches)
        norm, _, conv = unit.transform
        assert isinstance(conv, SparseConv2d)
        gain, shift = fold(norm)
        self.gain, self.shift = gain.detach()[:, None, None], shift.detach()[:, None, None]
        self.transform = StreamedConv(conv, unit.bn)
        self.coefficients = unit.add_coeff.detach() if unit.joint_mean else None

    def push(self, x: Tensor, end: bool) -> Tensor:
        if self.coefficients is None:
            y = torch.cat(self.parts(x, end), 1)
        else:
            parts = self.parts(torch.cat([x, x.mean(3, keepdim=True)], 3), end)
            if not parts[0].shape[2]:
                return torch.cat(parts, 1)[..., :x.shape[3]]
            y = spread_mean(parts, self.coefficients[:x.shape[3]])
        return self.transform.push(F.relu(y * self.gain + self.shift), end)
