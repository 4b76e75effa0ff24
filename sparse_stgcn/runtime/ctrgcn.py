"""The program of a CTR-GCN: its spatial unit; blocks and temporal units are those of ``multibranch``."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import SparseConv2d
from .multibranch import CTR, MEANS, BranchedProgram, Rows, bias_of, unit_gain
from .program import Entries, fold, row_length

_CHANNELS = 8  # whose conv3 and graphs exist at a time: ctr_channels in fused_ctr.inl


def stacked(parts: list[Entries]) -> Entries:
    """Convolutions with equally many outputs one below the other, each beginning with a block row of its own."""
    if len({part.bo for part in parts}) > 1:
        parts = [part.split() for part in parts]
    groups = -(-parts[0].rows // parts[0].bo)
    made = Entries(len(parts) * groups * parts[0].bo, parts[0].bo)
    for number, part in enumerate(parts):
        made.row.extend(row + number * groups for row in part.row)
        for name in ("input", "tap", "weight", "offset"):
            getattr(made, name).extend(getattr(part, name))
    return made


def padded_maps(maps: Tensor, ld: int) -> Tensor:
    """(K, V, V) -> (K, V, ld); what lies past the last joint repeats the joints of the last 16 lanes."""
    joints = maps.shape[-1]
    base, lane = (joints - 1) // 16 * 16, torch.arange(ld)
    return maps[..., torch.where(lane < joints, lane, base + (lane - base) % (joints - base))].contiguous()


class CTRGCNProgram(BranchedProgram):
    """Compiles a CTR-GCN."""

    def spatial(self, unit: nn.Module, x: Rows, target: Rows, frames: int) -> None:
        convs, joints, ld = list(unit.convs), self.joints, self.joint_ld
        subsets, inputs, channels, rank = len(convs), convs[0].conv3.in_channels, convs[0].conv3.out_channels, convs[0].conv4.in_channels
        alpha, (gain, shift) = unit.alpha, fold(unit.bn)
        if isinstance(unit.down, nn.Identity):
            residual = x
        else:
            residual = target
            self.pointwise(unit.down[0], *fold(unit.down[1]), x, target, frames)
        means = self.arena.take(inputs * ld), ld
        self.steps.append({"kind": MEANS, "src": x[0], "src_ld": x[1], "src_frames": frames, "rows": inputs, "dst": means[0], "dst_ld": ld})
        x1, x2 = (self.arena.take(subsets * rank * ld) for _ in range(2))
        for number, conv in enumerate(convs):
            for part, start in ((conv.conv1, x1), (conv.conv2, x2)):
                self.pointwise(part, *unit_gain(rank), means, (start + number * rank * ld, ld), 1)

        mixes = [Entries.of(conv.conv4, alpha.expand(channels)) for conv in convs]
        keys = np.concatenate([mix.input[0] + number * rank for number, mix in enumerate(mixes)])
        live = np.unique(keys)
        for number, mix in enumerate(mixes):
            mix.place(np.searchsorted(live, mix.input[0] + number * rank) * joints * ld)
        mixed = stacked(mixes).step()
        ldp = row_length(frames * joints)
        step: dict[str, Any] = {
            "kind": CTR, "frames": frames, "subsets": subsets, "dst": target[0], "dst_ld": target[1], "residual": residual[0],
            "residual_ld": residual[1], "coef": shift.numpy(), "scratch": self.arena.take(_CHANNELS * subsets * ldp),
            "scratch_ld": ldp, "x1": x1, "x2": x2, "joint_ld": ld, "maps": self.arena.take(len(live) * joints * ld),
            "graph": self.arena.take(_CHANNELS * subsets * joints * ld), "work": self.arena.take(2 * ld),
            "adjacency": padded_maps(unit.A, ld).numpy(), "live_row": live.astype(np.int32), "mix_bo": mixed["bo"],
            "mix_ptr": mixed["row_ptr"], "mix_offset": mixed["offset"], "mix_weight": mixed["weight"],
            "mix_bias": torch.cat([bias_of(conv.conv4, alpha.expand(channels), torch.zeros(channels)) for conv in convs]).numpy()}
        values = stacked([self._values(conv.conv3, gain, x) for conv in convs]).step()
        bias = torch.cat([bias_of(conv.conv3, gain, torch.zeros(channels)) for conv in convs])
        self.steps.append({**step, **values, "rows": channels, "bias": bias.numpy()})

    @staticmethod
    def _values(conv: SparseConv2d, gain: Tensor, x: Rows) -> Entries:
        entries = Entries.of(conv, gain)
        return entries.place(x[0] + entries.input[0] * x[1])
