"""Blocks with multi-branch temporal units: branch by branch through one small hidden buffer, residual and ReLU at the store."""
from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.base import Block
from ..backbones.multibranch import BranchedTemporal
from ..layers import SparseConv2d, TemporalUnit
from .program import CONV, SPLIT, Entries, Program, fold, row_length

MEANS, CTR, DG, MAX, JOINT_MEAN, JOINT_ADD, CTR_INPUTS = range(16, 23)  # FusedStep::Kind
Rows = tuple[int, int]  # offset of the first row in the arena, floats from row to row


def bias_of(conv: SparseConv2d, gain: Tensor, shift: Tensor) -> Tensor:
    """The bias of a convolution with gain * y + shift behind it."""
    return shift if conv.bias is None else shift + conv.bias * gain


def unit_gain(channels: int) -> tuple[Tensor, Tensor]:
    """Gain and shift that change nothing."""
    return torch.ones(channels), torch.zeros(channels)


class BranchedProgram(Program):
    """Compiles networks whose blocks are a spatial unit, ``spatial``, and a BranchedTemporal or MixedTemporal.

    A strided block sorts the frames of its input first, even ones, then odd ones: a spatial unit does not mind the order of
    frames, and every later read at a stride becomes one of consecutive frames.
    """

    @property
    def joint_ld(self) -> int:
        """Floats of a row of joints, whole vectors of every instruction set."""
        return -(-self.joints // 16) * 16

    @abstractmethod
    def spatial(self, unit: nn.Module, x: Rows, target: Rows, frames: int) -> None:
        """Append the steps of a spatial unit, from ``x`` to ``target``."""

    def width(self, block: Block) -> int:
        return getattr(block, block.names[0]).bn.num_features

    def block(self, block: Block, source: tuple[int, int, int]) -> tuple[int, int, int]:
        x, ldx, frames = source
        unit, temporal = (getattr(block, name) for name in block.names)
        last = temporal.branches[-1]
        stride = (last if isinstance(last, SparseConv2d) else last[0]).stride
        out, base, joints = -(-frames // stride), self.arena.size, self.joints
        split = target = x, ldx
        if isinstance(block.residual, TemporalUnit):
            target = x, row_length(out * joints)
            channels, plane = block.residual.conv.in_channels, out * joints
            split = self._rows(channels, stride * plane)
            self.steps.append({"kind": SPLIT, "src": x, "src_ld": ldx, "src_frames": frames, "dst": split[0],
                               "dst_ld": split[1], "planes": stride, "plane_ld": plane, "frames": out, "rows": channels})
        hidden = self._rows(self.width(block), frames * joints)
        kept = self.arena.size
        self.spatial(unit, split, hidden, frames)
        self.peak = max(self.peak, self.arena.size)
        self.arena.size = kept  # what the spatial unit needed besides is free: the less memory, the more of it stays in L2
        if isinstance(temporal, BranchedTemporal):
            self._branched(temporal, block.residual, hidden, split, target, frames, stride)
        else:
            self._mixed(temporal, block.residual, hidden, split, target, frames, stride)
        self.peak = max(self.peak, self.arena.size)
        self.arena.size = base  # the next block's buffers take the same place
        return *target, out

    def _rows(self, rows: int, pixels: int) -> Rows:
        ld = row_length(pixels)
        return self.arena.take(rows * ld), ld

    def pointwise(self, conv: SparseConv2d, gain: Tensor, shift: Tensor, source: Rows, target: Rows, frames: int,
                  **more: Any) -> None:
        """Append a 1 x 1 convolution over consecutive frames.

        Rows of joints are one frame of ``joints=joint_ld``: what lies past the last joint is read by the maps, and must not
        be left over from another person.
        """
        entries = Entries.of(conv, gain)
        entries.place(source[0] + entries.input[0] * source[1])
        self.steps.append({"kind": CONV, "dst": target[0], "dst_ld": target[1], "frames": frames, **entries.step(),
                           "bias": bias_of(conv, gain, shift).numpy(), **more})

    def _branched(self, unit: BranchedTemporal, residual: nn.Module | None, source: Rows, shortcut: Rows, target: Rows,
                  frames: int, stride: int) -> None:
        """relu(relu(branches) + residual), every branch with a batch norm of its own."""
        out = -(-frames // stride)
        if isinstance(residual, TemporalUnit):
            self.pointwise(residual.conv, *fold(residual.bn), shortcut, target, out)
        norms = [fold(branch[-1].bn if isinstance(branch[-1], TemporalUnit) else branch[-1]) for branch in unit.branches]
        self._branches(unit.branches, norms, source, target, frames, stride, self.joints, {"relu": 1} if residual is None else
                       {"relu": 2, "residual": target[0], "residual_ld": target[1]})

    def _mixed(self, unit: nn.Module, residual: nn.Module | None, source: Rows, shortcut: Rows, target: Rows, frames: int,
               stride: int) -> None:
        """relu(BN(transform(relu(BN(branches)))) + residual); with a mean joint, that is one more joint of the branches."""
        norm, _, conv = unit.transform
        (gain, shift), out = fold(norm), -(-frames // stride)
        channels, joints = norm.num_features, self.joints + int(unit.joint_mean)
        branches = self._rows(channels, out * joints)
        wide = source
        if unit.joint_mean:
            wide = self._rows(channels, frames * joints)
            self.steps.append({"kind": JOINT_MEAN, "src": source[0], "src_ld": source[1], "src_frames": frames,
                               "rows": channels, "dst": wide[0], "dst_ld": wide[1]})
        norms, first = [], 0
        for branch in unit.branches:
            width = (branch if isinstance(branch, SparseConv2d) else branch[0]).out_channels
            part = slice(first, first + width)
            norms.append((gain[part], torch.zeros(width) if unit.joint_mean else shift[part]))
            first += width
        self._branches(unit.branches, norms, wide, branches, frames, stride, joints, {"relu": 0 if unit.joint_mean else 1})
        if unit.joint_mean:
            coef = torch.zeros(self.joint_ld)
            coef[:self.joints] = unit.add_coeff[:self.joints]
            self.steps.append({"kind": JOINT_ADD, "src": branches[0], "src_ld": branches[1], "frames": out, "rows": channels,
                               "dst": source[0], "dst_ld": source[1], "coef": coef.numpy(), "bias": shift.numpy()})
            branches = source
        gain, shift = fold(unit.bn)
        merged, bias = Entries.of(conv, gain), bias_of(conv, gain, shift)
        merged.place(branches[0] + merged.input[0] * branches[1])
        step: dict[str, Any] = {"kind": CONV, "dst": target[0], "dst_ld": target[1], "frames": out, "relu": 1}
        if isinstance(residual, nn.Identity):
            step |= {"residual": target[0], "residual_ld": target[1]}
        elif residual is not None:
            gain, shift = fold(residual.bn)
            direct = Entries.of(residual.conv, gain)
            merged = merged + direct.place(shortcut[0] + direct.input[0] * shortcut[1])
            bias = bias + bias_of(residual.conv, gain, shift)
        self.steps.append({**step, **merged.step(), "bias": bias.numpy()})

    def _branches(self, branches: nn.ModuleList, norms: list[tuple[Tensor, Tensor]], source: Rows, target: Rows, frames: int,
                  stride: int, joints: int, epilogue: dict[str, Any]) -> None:
        """Append all branches, their outputs one below the other; ``norms`` are gain and shift at the end of each."""
        out = -(-frames // stride)
        convs = [branch[3].conv for branch in branches if not isinstance(branch, SparseConv2d) and len(branch) > 3
                 and isinstance(branch[3], TemporalUnit)]
        padding = max([1, *((conv.kernel_size - 1) // 2 * conv.dilation for conv in convs)])
        plane_frames = out + 2 * padding // stride
        plane_ld = row_length(plane_frames * joints)
        ldh = stride * plane_ld
        widest = max(branch[0].out_channels for branch in branches if not isinstance(branch, SparseConv2d))
        hidden = self.arena.take(widest * ldh)
        row = 0

        def at(tap: Any) -> Any:
            """Where output frame 0 finds the frame ``tap`` of the padded input, in the planes of one row."""
            return tap % stride * plane_ld + tap // stride * joints

        for branch, (gain, shift) in zip(branches, norms, strict=True):
            first = branch if isinstance(branch, SparseConv2d) else branch[0]
            to = target[0] + row * target[1], target[1]
            step = {"frames": out, "joints": joints, **epilogue}
            if "residual" in epilogue:
                step["residual"] = epilogue["residual"] + row * epilogue["residual_ld"]
            row += first.out_channels
            if isinstance(branch, SparseConv2d) or len(branch) <= 2:
                self.pointwise(first, gain, shift, source, to, **step)
                continue
            for plane in range(stride):
                count, lead = -(-(frames - plane) // stride), (plane + padding) // stride
                self.pointwise(first, *fold(branch[1]), (source[0] + plane * out * joints, source[1]),
                               (hidden + at(plane + padding), ldh), count, joints=joints, relu=1, lead=lead,
                               trail=plane_frames - lead - count)
            if isinstance(branch[3], TemporalUnit):
                conv = branch[3].conv
                entries = Entries.of(conv, gain)
                tap = (entries.tap[0] - (conv.kernel_size - 1) // 2) * conv.dilation + padding
                entries.place(hidden + entries.input[0] * ldh + at(tap))
                self.steps.append({"kind": CONV, "dst": to[0], "dst_ld": to[1], **step, **entries.step(),
                                   "bias": bias_of(conv, gain, shift).numpy()})
            else:
                taps = hidden + at(np.arange(-1, 2) + padding)
                self.steps.append({"kind": MAX, "dst": to[0], "dst_ld": to[1], **step, "rows": first.out_channels,
                                   "src_ld": ldh, "offset": taps.astype(np.int32),
                                   "coef": gain.contiguous().numpy(), "bias": shift.contiguous().numpy()})
