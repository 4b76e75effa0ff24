"""The program of a CTR-GCN: its spatial unit; blocks and temporal units are those of ``multibranch``."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .ctr_inputs import InputProducts
from .multibranch import CTR, CTR_INPUTS, MEANS, BranchedProgram, Rows, bias_of, unit_gain
from .program import Entries, fold, row_length

_CHANNELS = 8  # whose conv3 and graphs exist at a time: ctr_channels in fused_ctr.inl
_TILE = 32  # frames of products with inputs; a multiple of 16, so that tiles of frames are tiles of whole vectors


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
    """Compiles a CTR-GCN.

    A unit has K * C products of frames with graphs, one for each subset and channel. Where few weights live, products of its
    inputs with single maps are fewer, although more convolution follows: the cheaper of the two by count is taken.
    """

    def spatial(self, unit: nn.Module, x: Rows, target: Rows, frames: int) -> None:
        convs, joints, ld = list(unit.convs), self.joints, self.joint_ld
        inputs, channels, rank = convs[0].conv3.in_channels, convs[0].conv3.out_channels, convs[0].conv4.in_channels
        alpha, (gain, shift) = unit.alpha.expand(channels), fold(unit.bn)
        residual = x
        if not isinstance(unit.down, nn.Identity):
            residual = target
            self.pointwise(unit.down[0], *fold(unit.down[1]), x, target, frames)
        means = self.arena.take(inputs * ld), ld
        self.steps.append({"kind": MEANS, "src": x[0], "src_ld": x[1], "src_frames": frames, "rows": inputs,
                           "dst": means[0], "dst_ld": ld})
        x1, x2 = (self.arena.take(len(convs) * rank * ld) for _ in range(2))
        for number, conv in enumerate(convs):
            for part, start in ((conv.conv1, x1), (conv.conv2, x2)):
                self.pointwise(part, *unit_gain(rank), means, (start + number * rank * ld, ld), 1, joints=ld)

        none = torch.zeros(channels)
        values, mixes = [Entries.of(conv.conv3, gain) for conv in convs], [Entries.of(conv.conv4, alpha) for conv in convs]
        biases = [bias_of(conv.conv3, gain, none) for conv in convs]
        constants = [bias_of(conv.conv4, alpha, none) for conv in convs]
        for value in values:
            value.place(x[0] + value.input[0] * x[1])
        live = np.unique(np.concatenate([mix.input[0] + number * rank for number, mix in enumerate(mixes)]))
        for number, mix in enumerate(mixes):
            mix.place(np.searchsorted(live, mix.input[0] + number * rank))
        step: dict[str, Any] = {
            "frames": frames, "subsets": len(convs), "dst": target[0], "dst_ld": target[1], "residual": residual[0],
            "residual_ld": residual[1], "x1": x1, "x2": x2, "joint_ld": ld, "maps": self.arena.take(len(live) * joints * ld),
            "work": self.arena.take(2 * ld), "adjacency": padded_maps(unit.A, ld).numpy(), "live_row": live.astype(np.int32)}
        products = InputProducts.of(values, biases, mixes, constants, joints)
        if products.cheaper_than(len(convs) * channels, values, joints):
            ldp = row_length(_TILE * joints)
            self.steps.append({**step, "kind": CTR_INPUTS, "src": x[0], "src_ld": x[1], "tile": _TILE, "scratch_ld": ldp,
                               "scratch": self.arena.take(len(products.graph) * ldp), "graph": self.arena.take(ld),
                               "made_subset": products.graph, "made_input": products.input, **products.entries(ldp).step(),
                               "bias": (shift + products.bias[:channels]).float().numpy()})
            return
        for mix in mixes:
            mix.offset[0] = mix.offset[0] * joints * ld
        mixed, ldp = stacked(mixes).step(), row_length(frames * joints)
        self.steps.append({**step, "kind": CTR, "coef": shift.numpy(), "scratch": self.arena.take(_CHANNELS * len(convs) * ldp),
                           "scratch_ld": ldp, "graph": self.arena.take(_CHANNELS * len(convs) * joints * ld),
                           "mix_bo": mixed["bo"], "mix_ptr": mixed["row_ptr"], "mix_offset": mixed["offset"],
                           "mix_weight": mixed["weight"], "mix_bias": torch.cat(constants).numpy(),
                           **stacked(values).step(), "rows": channels, "bias": torch.cat(biases).numpy()})
