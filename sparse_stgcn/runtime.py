"""optimize(): the fused inference runtime. One person's clip passes through the whole network inside one core's cache."""
from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbones.base import Block
from .backbones.stgcn import STGCN
from .kernels import BlockPattern, _native
from .layers import SparseConv2d
from .recognizer import Recognizer

__all__ = ["FusedRecognizer", "optimize"]

_GRAPH, _CONV, _SPLIT, _POOL = range(4)
_SLACK = 12 * 16  # floats that a tile may touch past the last pixel of a row
_TILE = 16  # frames for which X A_k is made at a time


def optimize(model: Recognizer, example: Tensor | None = None) -> nn.Module:
    """A network for inference with the same call signature as the model: keypoint (N, M, T, V, C) -> logits.

    Batch norm is folded into the live weights; graph and temporal convolutions run with bias, residual and ReLU at the store,
    one person per task; persons that are entirely zero are computed once. Weights are packed once per clip length (at the
    first call, or here with ``example``); later calls allocate their output only. Exact up to float32 rounding.

    Networks without a fused program (all but ST-GCN), other devices and other dtypes run as they are, in eval mode.

    Raises:
        TypeError: model is not a Recognizer.
    """
    if not isinstance(model, Recognizer):
        raise TypeError(f"Expected model to be a Recognizer, as create_model gives. Got {type(model).__name__}.")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = next(model.parameters())
    if _native.module is None or not isinstance(model.backbone, STGCN) or parameter.device.type != "cpu" \
            or parameter.dtype != torch.float32:
        return model
    fused = FusedRecognizer(model)
    if example is not None:
        fused(example)
    return fused


class FusedRecognizer(nn.Module):
    """A Recognizer compiled for inference on the CPU; made by ``optimize``."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model
        self._programs: dict[int, Any] = {}

    @torch.inference_mode()
    def forward(self, keypoint: Tensor) -> Tensor:
        self.model.backbone._check(keypoint)
        if keypoint.dtype != torch.float32 or keypoint.device.type != "cpu":
            raise TypeError(f"Expected keypoint to be float32 on the CPU. Got {keypoint.dtype} on {keypoint.device}.")
        batch, persons, frames = keypoint.shape[:3]
        if frames not in self._programs:
            self._programs[frames] = Program(self.model, frames).build()
        head = self.model.cls_head.fc_cls
        features = torch.empty(batch, persons, head.in_features)
        self._programs[frames].run(batch, persons, keypoint.data_ptr(), keypoint.stride(), features.data_ptr(),
                                   torch.get_num_threads())
        return head(features.mean(1))


@dataclass
class Arena:
    """Offsets of the buffers of one person, in floats, each on a cache line."""

    size: int = 0

    def take(self, floats: int) -> int:
        start = self.size
        self.size += -(-floats // 16) * 16
        return start


def row_length(pixels: int) -> int:
    """Floats between rows: an odd number of cache lines, so that rows do not share the sets of the cache."""
    return (-(-(pixels + _SLACK) // 16) | 1) * 16


@dataclass
class Entries:
    """Live columns of a sparse convolution, block row by block row: input row, tap, bo weights."""

    rows: int
    bo: int
    row: list[np.ndarray] = field(default_factory=list)
    input: list[np.ndarray] = field(default_factory=list)
    tap: list[np.ndarray] = field(default_factory=list)
    weight: list[np.ndarray] = field(default_factory=list)
    offset: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, conv: SparseConv2d, gain: Tensor) -> Entries:
        """The entries of a convolution whose output channels are multiplied by ``gain``."""
        pattern = conv.pattern if conv.values is not None else BlockPattern.full(conv.shape_oik, (8, 1))
        assert pattern is not None
        values = conv.values if conv.values is not None else pattern.gather(conv.weight_oik())
        (out, inputs, _), (bo, bi) = pattern.shape, pattern.block
        gains = torch.zeros(-(-out // bo) * bo, dtype=values.dtype)
        gains[:out] = gain
        values = values * gains.view(-1, bo)[pattern.rows][:, None, :]
        channel = (pattern.input.long() * bi)[:, None] + torch.arange(bi)
        inside = channel < inputs  # the ragged edge's columns are 0
        shape = channel.shape
        made = cls(out, bo)
        made.row.append(pattern.rows[:, None].expand(shape)[inside].numpy())
        made.input.append(channel[inside].numpy())
        made.tap.append(pattern.tap.long()[:, None].expand(shape)[inside].numpy())
        made.weight.append(values[inside].numpy())
        return made

    def place(self, offset: np.ndarray) -> Entries:
        """Set the offset of every entry."""
        self.offset = [offset]
        return self

    def __add__(self, other: Entries) -> Entries:
        """Both lists in one: outputs are the sums."""
        a, b = (self, other) if self.bo == other.bo else (self.split(), other.split())
        return Entries(a.rows, a.bo, *([*getattr(a, n), *getattr(b, n)] for n in ("row", "input", "tap", "weight", "offset")))

    def split(self) -> Entries:
        """The same entries in blocks of one output."""
        bo, made = self.bo, Entries(self.rows, 1)
        row = np.concatenate(self.row)[:, None] * bo + np.arange(bo)
        keep = row < self.rows
        made.row, made.weight = [row[keep]], [np.concatenate(self.weight)[keep][:, None]]
        for name in ("input", "tap", "offset"):
            getattr(made, name).append(np.broadcast_to(np.concatenate(getattr(self, name))[:, None], row.shape)[keep])
        return made

    def step(self) -> dict[str, Any]:
        """The arrays of a step, sorted by block row, entries in their own order."""
        row, offset = np.concatenate(self.row), np.concatenate(self.offset)
        order = np.argsort(row, kind="stable")
        groups = -(-self.rows // self.bo)
        pointers = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=groups))])
        return {"rows": self.rows, "bo": self.bo, "row_ptr": pointers.astype(np.int32),
                "offset": offset[order].astype(np.int32),
                "weight": np.ascontiguousarray(np.concatenate(self.weight)[order], np.float32)}


def fold(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gain and shift per channel of a batch norm in eval mode: y = gain * x + shift."""
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return gain, norm.bias - norm.running_mean * gain


class Program:
    """Compiles an ST-GCN for clips of one length into the steps of csrc/cpu/fused.h."""

    def __init__(self, model: Recognizer, frames: int) -> None:
        self.backbone, self.frames = model.backbone, frames
        self.joints = len(model.backbone.skeleton)
        self.arena, self.peak = Arena(), 0
        self.steps: list[dict[str, Any]] = []

    @torch.no_grad()
    def build(self) -> Any:
        assert _native.module is not None
        joints, channels = self.joints, self.backbone.in_channels
        widths = [channels, *(self._graph(block).out_channels for block in self.backbone.blocks)]
        frames, longest = self.frames, row_length(self.frames * joints)
        x = self.arena.take(max(widths[:-1]) * longest)  # of every block: input and output, in place
        source = (x, longest, frames)
        for block in self.backbone.blocks:
            source = self._block(block, source)
        features = widths[-1]
        self.steps.append({"kind": _POOL, "src": source[0], "src_ld": source[1], "src_frames": source[2], "rows": features})
        gain, shift = fold(self.backbone.data_bn)
        persons = self.backbone.num_person or 1
        sizes = {"joints": joints, "channels": channels, "frames": frames, "input": x, "input_ld": longest,
                 "features": features, "arena": self.peak + _SLACK, "persons": persons}
        return _native.module.Fused(sizes, gain.numpy(), shift.numpy(), self.steps)

    @staticmethod
    def _graph(block: Block) -> SparseConv2d:
        return getattr(block, block.names[0]).conv

    def _block(self, block: Block, source: tuple[int, int, int]) -> tuple[int, int, int]:
        """The steps of one block, in place over X; returns X after it: (offset, row length, frames)."""
        x, ldx, frames = source
        unit, temporal = (getattr(block, name) for name in block.names)
        conv, joints, stride = temporal.conv, self.joints, temporal.conv.stride
        out = -(-frames // stride)
        reach = (conv.kernel_size - 1) * conv.dilation
        planes, padding = (stride if stride > 1 else 1), reach // 2
        # H, between the two convolutions: padded frames in `planes` planes, so that every tap is one fixed offset.
        plane_frames = out + reach // stride
        plane_ld = row_length(plane_frames * joints)
        ldh = planes * plane_ld
        base = self.arena.size
        hidden = self.arena.take(unit.conv.out_channels * ldh)
        if planes > 1:
            ldp = planes * row_length(out * joints)
            split = self.arena.take(unit.conv.in_channels * ldp)
            self.steps.append({"kind": _SPLIT, "src": x, "src_ld": ldx, "src_frames": frames, "dst": split, "dst_ld": ldp,
                               "planes": planes, "plane_ld": ldp // planes, "frames": out, "rows": unit.conv.in_channels})
        else:
            split, ldp = x, ldx
        entries, arrays = self._graph_step(unit)
        scratch = self.arena.take(arrays.pop("zrows") * arrays["scratch_ld"])
        for q in range(planes):
            count = -(-(frames - q) // planes)
            lead = (q + padding) // stride
            start = hidden + (q + padding) % stride * plane_ld + lead * joints
            self.steps.append({**arrays, **entries, "src": split + q * (ldp // planes), "src_ld": ldp, "dst": start,
                               "dst_ld": ldh, "frames": count,
                               "lead": lead, "trail": plane_frames - lead - count, "scratch": scratch})
        gain, shift = fold(temporal.bn)
        bias = shift if conv.bias is None else shift + conv.bias * gain
        merged = Entries.of(conv, gain)
        tap = merged.tap[0] * conv.dilation
        merged.place(hidden + merged.input[0] * ldh + tap % stride * plane_ld + tap // stride * joints)
        step: dict[str, Any] = {"kind": _CONV, "dst": x, "dst_ld": ldx, "frames": out, "relu": 1}
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

    def _graph_step(self, unit: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """Entries over Z, and the rest of a graph step: relu(BN(sum_k W_k X A_k + bias))."""
        conv, graph, joints = unit.conv, unit.graph(), self.joints
        gain, shift = fold(unit.bn)
        entries, subsets = Entries.of(conv, gain), graph.shape[0]
        key = entries.input[0] * subsets + entries.tap[0]
        made, row = np.unique(key, return_inverse=True)
        scratch_ld = row_length(_TILE * joints)
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
        return entries.step(), {
            "kind": _GRAPH, "subsets": subsets, "tile": _TILE, "scratch_ld": scratch_ld, "zrows": len(made), "relu": 1,
            "made_input": (made // subsets).astype(np.int32), "made_subset": (made % subsets).astype(np.int32),
            "ptr": pointers.int().numpy(), "source": v.int().numpy(), "coef": graph[k, v, w].contiguous().numpy(),
            "bias": bias[:, torch.arange(bias_ld) % joints].contiguous().numpy(), "bias_ld": bias_ld}
