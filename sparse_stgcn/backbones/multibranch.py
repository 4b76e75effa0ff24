"""Temporal units with parallel branches: those of CTR-GCN and of DG-STGCN."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch_norms import normalise
from ..joins import joined
from ..kernels import again, append_mean, share, spans, split, spread_mean
from ..layers import SparseConv2d, TemporalUnit, Units, as_maps, normed, pointwise_unit, run_units

__all__ = ["BranchedTemporal", "MixedTemporal"]

# A branch is (kernel, dilation), "max" (pooling over 3 frames) or "1x1".
BranchSpec = tuple[int, int] | str
_CTR_BRANCHES: tuple[BranchSpec, ...] = ((5, 1), (5, 2), "max", "1x1")
_MIXED_BRANCHES: tuple[BranchSpec, ...] = ((3, 1), (3, 2), (3, 3), (3, 4), "max", "1x1")


def _branch(spec: BranchSpec, in_channels: int, width: int, stride: int, norm: bool) -> nn.Module:
    """1 x 1 convolution to ``width`` and what follows it; ``norm`` ends every branch with a batch norm.

    (N, I, T, V) -> (N, width, ceil(T / stride), V); positions in the sequences are PYSKL's state-dict keys.
    """
    if spec == "1x1":
        conv = SparseConv2d(in_channels, width, stride=stride)
        return Units(conv, nn.BatchNorm2d(width)) if norm else conv
    branch = pointwise_unit(in_channels, width).append(nn.ReLU(inplace=True))
    if isinstance(spec, str):
        branch.append(nn.MaxPool2d((3, 1), (stride, 1), (1, 0)))
        return branch.append(nn.BatchNorm2d(width)) if norm else branch
    kernel, dilation = spec
    return branch.append(TemporalUnit(width, width, kernel, stride, dilation, norm=norm))


class _Branches(NamedTuple):
    """Branches, all but the last of which begin with a 1 x 1 convolution of stride 1, norm and ReLU, taken apart.

    convs, norms: of these; modules: the convolution or pooling behind each; single: the convolution of the last branch; ends:
    the batch norms at the ends of all branches (Identity where a branch has none).
    """

    convs: list[Any]
    norms: list[nn.Module]
    modules: list[nn.Module]
    single: Any
    ends: list[nn.Module]

    @classmethod
    def of(cls, branches: Any) -> _Branches:
        *wide, single = branches
        modules, ends = zip(*map(_behind_norm, wide), strict=True)
        last, end = single if isinstance(single, nn.Sequential) else (single, nn.Identity())
        return cls([branch[0] for branch in wide], [branch[1] for branch in wide], list(modules), last, [*ends, end])

    def begin(self, xs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The 1 x 1 convolutions, as one where they agree: what the norms take, and what the last branch gives.

        xs: the input for each branch, see ``kernels.share``.
        """
        if self.single.stride == 1:
            *narrow, last = joined([*self.convs, self.single], xs)
            return narrow, last
        return list(joined(self.convs, xs[:-1])), self.single(xs[-1])

    def where(self) -> list[tuple[int, int]]:
        """The channels of each but the last branch, one after the other."""
        return spans(conv.out_channels for conv in self.convs)

    def one_by_one(self, narrow: Sequence[Tensor]) -> list[Tensor]:
        """Norm, ReLU and what follows them, of all branches but the last."""
        hidden = normalise(self.norms, narrow, relu=True)
        with again(hidden):  # it is made once for all branches
            return [run_units([module], y) for module, y in zip(self.modules, split(hidden, self.where()), strict=True)]


def _behind_norm(branch: Any) -> tuple[nn.Module, nn.Module]:
    """The convolution or pooling behind a branch's first norm and ReLU, and the batch norm at the end of the branch."""
    module = branch[3]
    if isinstance(module, TemporalUnit):
        return module.conv, module.bn
    return module, branch[4] if len(branch) > 4 else nn.Identity()


class BranchedTemporal(nn.Module):
    """CTR-GCN's temporal unit: four branches with batch norms of their own, concatenated, ReLU.

    Branches have C // 4 channels, the 1 x 1 branch takes the remainder.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = out_channels // len(_CTR_BRANCHES)
        rest = out_channels - width * (len(_CTR_BRANCHES) - 1)
        self.branches = nn.ModuleList(
            _branch(spec, in_channels, rest if spec == "1x1" else width, stride, norm=True)
            for spec in _CTR_BRANCHES
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(unit(x) + residual)."""
        parts = _Branches.of(self.branches)
        maps = as_maps(parts.norms, x, parts.modules)
        narrow, last = parts.begin(share(x, len(self.branches)))
        outputs = parts.one_by_one(narrow) if maps is None else split(normed(parts.norms, narrow, maps), parts.where())
        return normalise(parts.ends, [*outputs, last], residual, relu, relu_before=True)


class MixedTemporal(nn.Module):
    """DG-STGCN's temporal unit: six branches, concatenated, then norm, ReLU, 1 x 1 convolution, norm.

    The first branch has the remainder of C // 6. With ``joint_mean`` (PYSKL's ``dgmstcn``, otherwise
    ``mstcn``) the mean over the joints passes through the branches as one more joint and is added to joint v
    times ``add_coeff[v]``, which has 25 entries in PYSKL's checkpoints whatever V is; here it has more where
    V > 25.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, joint_mean: bool = True,
                 num_joints: int = 25) -> None:
        super().__init__()
        width = out_channels // len(_MIXED_BRANCHES)
        rest = out_channels - width * (len(_MIXED_BRANCHES) - 1)
        widths: Sequence[int] = (rest, *(width,) * (len(_MIXED_BRANCHES) - 1))
        if joint_mean:
            self.add_coeff = nn.Parameter(torch.zeros(max(25, num_joints)))
        self.joint_mean = joint_mean
        self.branches = nn.ModuleList(_branch(spec, in_channels, size, stride, norm=False)
                                      for spec, size in zip(_MIXED_BRANCHES, widths, strict=True))
        self.transform = Units(nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True),
                               SparseConv2d(out_channels, out_channels))
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(unit(x) + residual)."""
        return normalise(self.bn, self.transform(self._mix(x)), residual, relu)

    def _mix(self, x: Tensor) -> Tensor:
        """The branches, concatenated: (N, I, T, V) -> (N, O, ceil(T / stride), V)."""
        parts, count = _Branches.of(self.branches), len(self.branches)
        coef = self.add_coeff[:x.shape[3]] if self.joint_mean else None
        maps = as_maps(parts.norms, x, parts.modules)
        if maps is not None:
            # The mean over joints is taken behind the first convolutions, which commute with it.
            narrow, last = parts.begin(share(x, count))
            return normed(parts.norms, narrow, maps, [last], coef)
        narrow, last = parts.begin(share(x, count) if coef is None else append_mean(x, count))
        outputs = [*parts.one_by_one(narrow), last]
        return torch.cat(outputs, 1) if coef is None else spread_mean(outputs, coef)
