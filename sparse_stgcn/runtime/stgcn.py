"""The program of an ST-GCN: X A_k, graph convolution, temporal convolution, residual and ReLU in three kinds of steps."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..backbones.base import Block
from .program import CONV, GRAPH, SPLIT, Entries, Program, fold, row_length, tile_frames


class STGCNProgram(Program):
    """Compiles an ST-GCN, or another network whose temporal unit is its 9 x 1 convolution: ``spatial`` makes the rest."""

    def width(self, block: Block) -> int:
        return getattr(block, block.names[1]).conv.out_channels

    def block(self, block: Block, source: tuple[int, int, int]) -> tuple[int, int, int]:
        """The steps of one block, in place over X; returns X after it: (offset, row length, frames)."""
        x, ldx, frames = source
        unit, temporal = (getattr(block, name) for name in block.names)
        conv, pixels, stride = temporal.conv, self.pixels, temporal.conv.stride
        out = -(-frames // stride)
        reach = (conv.kernel_size - 1) * conv.dilation
        planes, padding = (stride if stride > 1 else 1), reach // 2
        channels, wide = conv.in_channels, self.inputs(unit)
        # H, between the two convolutions: padded frames in `planes` planes, so that every tap is one fixed offset.
        plane_frames = out + reach // stride
        plane_ld = self.row_length(plane_frames * pixels)
        ldh = planes * plane_ld
        base = self.arena.size
        hidden = self.arena.take(channels * ldh)
        if planes > 1:
            ldp = planes * self.row_length(out * pixels)
            split = self.arena.take(wide * ldp)
            self.steps.append({"kind": SPLIT, "src": x, "src_ld": ldx, "src_frames": frames, "dst": split, "dst_ld": ldp,
                               "planes": planes, "plane_ld": ldp // planes, "frames": out, "rows": wide})
        else:
            split, ldp = x, ldx
        source_rows = {"src": split, "src_ld": ldp, "src_frames": frames, "planes": planes, "plane_ld": ldp // planes}
        targets = []
        for q in range(planes):
            count = -(-(frames - q) // planes)
            lead = (q + padding) // stride
            start = hidden + (q + padding) % stride * plane_ld + lead * pixels
            targets.append({"src": split + q * (ldp // planes), "src_ld": ldp, "dst": start, "dst_ld": ldh, "frames": count,
                            "lead": lead, "trail": plane_frames - lead - count})
        self.spatial(unit, source_rows, targets)
        self.between(unit, {"dst": hidden, "dst_ld": ldh, "frames": frames, "lead": padding, "planes": planes,
                            "plane_ld": plane_ld, "rows": channels})
        gain, shift = fold(temporal.bn)
        bias = shift if conv.bias is None else shift + conv.bias * gain
        merged = Entries.of(conv, gain)
        tap = merged.tap[0] * conv.dilation
        merged.place(hidden + merged.input[0] * ldh + tap % stride * plane_ld + tap // stride * pixels)
        step: dict[str, Any] = {"kind": CONV, "dst": x, "dst_ld": ldx, "frames": out, "relu": 1}
        if isinstance(block.residual, nn.Identity):
            step |= {"residual": x, "residual_ld": ldx}
        elif block.residual is not None:
            gain, shift = fold(block.residual.bn)
            shortcut = Entries.of(block.residual.conv, gain)
            merged = merged + shortcut.place(split + shortcut.input[0] * ldp)
            bias = bias + shift if block.residual.conv.bias is None else bias + shift + block.residual.conv.bias * gain
        self.steps.append({**step, **merged.step(), "bias": bias.numpy()})
        self.peak = max(self.peak, self.arena.size)
        self.arena.size = base  # the next block's buffers take the same place
        return x, ldx, out

    def inputs(self, unit: nn.Module) -> int:
        """Channels that a spatial unit reads."""
        return unit.conv.in_channels

    def spatial(self, unit: nn.Module, source: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        """Append the steps of a spatial unit: X lies in the planes of ``source``, each of which has a target in H."""
        step = self._graph_step(unit)
        scratch = self.arena.take(step.pop("zrows") * step["scratch_ld"])
        self.steps += [{**step, **target, "scratch": scratch} for target in targets]

    def between(self, unit: nn.Module, hidden: dict[str, Any]) -> None:
        """Append steps over all frames of H, before the temporal convolution; none here."""

    def grouped(self, entries: Entries, rows: int) -> Entries:
        """The entries of a graph convolution over ``rows`` rows of Z, in the blocks that it runs in."""
        return entries

    def _graph_step(self, unit: nn.Module) -> dict[str, Any]:
        """relu(BN(sum_k W_k X A_k + bias)), but for where it reads and writes."""
        conv, graph, joints = unit.conv, unit.graph(), self.joints
        gain, shift = fold(unit.bn)
        entries, subsets = Entries.of(conv, gain), graph.shape[0]
        key = entries.input[0] * subsets + entries.tap[0]
        made, row = np.unique(key, return_inverse=True)
        tile = tile_frames(len(made), joints)
        scratch_ld = row_length(tile * joints)
        entries.place(row.reshape(-1) * scratch_ld)
        # The bias passes through the adjacency, so it differs from joint to joint: a map of period V along the pixels.
        bias = shift[:, None].expand(-1, joints)
        if conv.bias is not None:
            bias = bias + gain[:, None] * torch.einsum("ko,kw->ow", conv.bias.view(subsets, -1), graph.sum(1))
        wide = conv.out_channels % 8 == 0 and entries.bo % 8 == 0  # then a tile is at most 3 vectors wide
        bias_ld = -(-(joints + 16 * (3 if wide else 12)) // 16) * 16
        where = (graph != 0).transpose(1, 2)
        k, w, v = where.nonzero(as_tuple=True)
        counts = torch.bincount(k * joints + w, minlength=subsets * joints)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return {
            **self.grouped(entries, len(made)).step(), "kind": GRAPH, "subsets": subsets, "tile": tile,
            "scratch_ld": scratch_ld, "zrows": len(made), "relu": 1,
            "made_input": (made // subsets).astype(np.int32), "made_subset": (made % subsets).astype(np.int32),
            "ptr": pointers.int().numpy(), "source": v.int().numpy(), "coef": graph[k, v, w].contiguous().numpy(),
            "bias": bias[:, torch.arange(bias_ld) % joints].contiguous().numpy(), "bias_ld": bias_ld}
