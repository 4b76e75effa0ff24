"""The program of a DG-STGCN: its spatial unit; blocks and temporal units are those of ``multibranch``."""
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .ctrgcn import padded_maps
from .multibranch import DG, MEANS, BranchedProgram, Rows, bias_of, unit_gain
from .program import CONV, Entries, fold, row_length

_CHANNELS = 8  # of pre(x) that exist at a time: dg_channels in fused_dg.inl


class DGSTGCNProgram(BranchedProgram):
    """Compiles a DG-STGCN."""

    def spatial(self, unit: nn.Module, x: Rows, target: Rows, frames: int) -> None:
        joints, ld = self.joints, self.joint_ld
        inner, inputs = unit.pre[0].out_channels, unit.pre[0].in_channels
        products = self._rows(inner, frames * joints)
        means = self.arena.take(inputs * ld), ld
        self.steps.append({"kind": MEANS, "src": x[0], "src_ld": x[1], "src_frames": frames, "rows": inputs,
                           "dst": means[0], "dst_ld": ld})
        x1, x2 = (self.arena.take(inner * ld) for _ in range(2))
        for part, start in ((unit.conv1, x1), (unit.conv2, x2)):
            self.pointwise(part, *unit_gain(inner), means, (start, ld), 1, joints=ld)
        post = unit.post.live_pattern
        read = None if post is None else post.inputs_read()
        gain, shift = fold(unit.pre[1])
        entries, ldp = Entries.of(unit.pre[0], gain), row_length(frames * joints)
        entries.place(x[0] + entries.input[0] * x[1])
        self.steps.append({
            "kind": DG, "frames": frames, "subsets": unit.subsets, **entries.step(),
            "bias": bias_of(unit.pre[0], gain, shift).numpy(), "dst": products[0], "dst_ld": products[1],
            "scratch": self.arena.take(_CHANNELS * ldp), "scratch_ld": ldp, "x1": x1, "x2": x2, "joint_ld": ld,
            "read": np.zeros(inner, np.int32) if read is None else read.numpy(), "maps": self.arena.take(joints * ld),
            "graph": self.arena.take(joints * ld), "work": self.arena.take(2 * ld),
            "adjacency": padded_maps(unit.A, ld).numpy(), "scale": torch.stack([unit.alpha[0], unit.beta[0]]).numpy()})
        gain, shift = fold(unit.bn)
        merged, bias = Entries.of(unit.post, gain), bias_of(unit.post, gain, shift)
        merged.place(products[0] + merged.input[0] * products[1])
        step: dict[str, int] = {"kind": CONV, "dst": target[0], "dst_ld": target[1], "frames": frames, "relu": 1}
        if isinstance(unit.down, nn.Identity):
            step |= {"residual": x[0], "residual_ld": x[1]}
        else:
            gain, shift = fold(unit.down[1])
            direct = Entries.of(unit.down[0], gain)
            merged, bias = merged + direct.place(x[0] + direct.input[0] * x[1]), bias + bias_of(unit.down[0], gain, shift)
        self.steps.append({**step, **merged.step(), "bias": np.ascontiguousarray(bias)})
