"""Temporal units with parallel branches: those of CTR-GCN and of DG-STGCN."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..joins import joined
from ..kernels import again, append_mean, share, spans, split, spread_mean
from ..layers import SparseConv2d, TemporalUnit, Units, normalise, normed, pointwise_unit, run_units

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


def _run_branches(branches: Any, xs: Sequence[Tensor]) -> tuple[list[Tensor], list[nn.Module]]:
    """What the batch norms at the ends of the branches take, and these norms (Identity where a branch has none).

    All branches but the last begin with a 1 x 1 convolution of stride 1, norm and ReLU: these run as one each, and in the
    fine-tuning stage norm, ReLU and what follows them. xs: the input for each branch, see ``kernels.share``.
    """
    *wide, single = branches
    convs, norms = [branch[0] for branch in wide], [branch[1] for branch in wide]
    alike: Any = single[0] if isinstance(single, nn.Sequential) else single
    if alike.stride == 1:
        *narrow, last = joined([*convs, alike], xs)
    else:
        narrow, last = list(joined(convs, xs[:-1])), alike(xs[-1])
    modules, ends = zip(*map(_behind_norm, wide), strict=True)
    where = spans(conv.out_channels for conv in convs)
    whole = normed(norms, narrow, modules)
    if whole is not None:
        return [*split(whole, where), last], [*ends, _end(single)]
    hidden = normalise(norms, narrow, relu=True)
    with again(hidden):  # it is made once for all branches
        outputs = [run_units([module], y) for module, y in zip(modules, split(hidden, where), strict=True)]
    return [*outputs, last], [*ends, _end(single)]


def _behind_norm(branch: Any) -> tuple[nn.Module, nn.Module]:
    """The convolution or pooling behind a branch's first norm and ReLU, and the batch norm at the end of the branch."""
    module = branch[3]
    if isinstance(module, TemporalUnit):
        return module.conv, module.bn
    return module, branch[4] if len(branch) > 4 else nn.Identity()


def _end(single: Any) -> nn.Module:
    """The batch norm at the end of the 1 x 1 branch."""
    return single[1] if isinstance(single, nn.Sequential) else nn.Identity()


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
        xs, norms = _run_branches(self.branches, share(x, len(self.branches)))
        return normalise(norms, xs, residual, relu, relu_before=True)


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
        joints, count = x.shape[3], len(self.branches)
        outputs, _ = _run_branches(self.branches, append_mean(x, count) if self.joint_mean else share(x, count))
        y = spread_mean(outputs, self.add_coeff[:joints]) if self.joint_mean else torch.cat(outputs, 1)
        return normalise(self.bn, self.transform(y), residual, relu)
