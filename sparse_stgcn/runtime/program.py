"""What the programs of all backbones are built from: the arena of one person, live columns, folded batch norms, steps."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.base import Block
from ..kernels import BlockPattern, _native
from ..layers import SparseConv2d
from ..recognizer import Recognizer

GRAPH, CONV, SPLIT, POOL, BORDERS = range(5)  # FusedStep::Kind
AA_GRAPH, AA_APPLY, ATTEND = range(8, 11)
SLACK = 12 * 16  # floats that a tile may touch past the last pixel of a row
_Z_BYTES = 512 * 1024  # of products with graphs at a time: beside X and H they must not push one another out of L2


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
    return (-(-(pixels + SLACK) // 16) | 1) * 16


def tile_frames(rows: int, joints: int) -> int:
    """Frames of ``rows`` products with graphs that are made and read at a time: 2 to 16."""
    return max(2, min(16, _Z_BYTES // (4 * rows * joints)))


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
        values = conv.values if conv.values is not None else pattern.gather(conv.as_oik(conv.dense_weight()))
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

    @staticmethod
    def stack(parts: list[Entries]) -> Entries:
        """The lists of several convolutions as one, outputs one after the other, each in whole blocks."""
        if len({part.bo for part in parts}) > 1:
            parts = [part.split() for part in parts]
        made, groups = Entries(0, parts[0].bo), 0
        for part in parts:
            made.row += [row + groups for row in part.row]
            for name in ("input", "tap", "weight", "offset"):
                getattr(made, name).extend(getattr(part, name))
            groups += -(-part.rows // part.bo)
        made.rows = groups * made.bo
        return made

    def split(self) -> Entries:
        """The same entries in blocks of one output."""
        bo, made = self.bo, Entries(self.rows, 1)
        row = np.concatenate(self.row)[:, None] * bo + np.arange(bo)
        keep = row < self.rows
        made.row, made.weight = [row[keep]], [np.concatenate(self.weight)[keep][:, None]]
        for name in ("input", "tap", "offset"):
            getattr(made, name).append(np.broadcast_to(np.concatenate(getattr(self, name))[:, None], row.shape)[keep])
        return made

    def paired(self) -> Entries:
        """The same entries in blocks of two outputs, zeros where one of them has none."""
        parts = self if self.bo == 1 else self.split()
        row, offset, weight = np.concatenate(parts.row), np.concatenate(parts.offset), np.concatenate(parts.weight)[:, 0]
        places, entry = np.unique(np.stack([row // 2, offset]), axis=1, return_inverse=True)
        both = np.zeros((places.shape[1], 2), weight.dtype)
        both[entry.reshape(-1), row % 2] = weight
        return Entries(self.rows, 2, [places[0]], [], [], [both], [places[1]])

    def step(self) -> dict[str, Any]:
        """The arrays of a step, sorted by block row, then by place: taps of an input find its row in L1."""
        row, offset = np.concatenate(self.row), np.concatenate(self.offset)
        order = np.lexsort((offset, row))
        groups = -(-self.rows // self.bo)
        pointers = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=groups))])
        return {"rows": self.rows, "bo": self.bo, "row_ptr": pointers.astype(np.int32),
                "offset": offset[order].astype(np.int32),
                "weight": np.ascontiguousarray(np.concatenate(self.weight)[order], np.float32)}


def fold(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gain and shift per channel of a batch norm in eval mode: y = gain * x + shift."""
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return gain, norm.bias - norm.running_mean * gain


class Program(ABC):
    """Compiles a network for clips of one length into the steps of csrc/cpu/fused.h; a subclass adds its blocks."""

    def __init__(self, model: Recognizer, frames: int) -> None:
        self.backbone, self.frames = model.backbone, frames
        self.joints = len(model.backbone.skeleton)
        self.pixels, self.length = self.joints, frames  # of a frame and frames of a row, as X lies in the arena
        self.arena, self.peak = Arena(), 0
        self.steps: list[dict[str, Any]] = []

    @torch.no_grad()
    def build(self) -> Any:
        """The compiled network, for ``_native.module.fused_run``."""
        assert _native.module is not None
        joints, channels = self.joints, self.backbone.in_channels
        widths = [channels, *(self.width(block) for block in self.backbone.blocks)]
        frames, longest = self.length, self.row_length(self.length * self.pixels)
        x = self.arena.take(max(widths[:-1]) * longest)  # of every block: input and output, in place
        source = (x, longest, frames)
        for block in self.backbone.blocks:
            source = self.block(block, source)
        features = widths[-1]
        self.pool({"src": source[0], "src_ld": source[1], "src_frames": source[2], "rows": features})
        gain, shift = fold(self.backbone.data_bn)
        persons = self.backbone.num_person or 1
        sizes = {"joints": joints, "channels": channels, "frames": self.frames, "input": x, "input_ld": longest,
                 "features": features, "persons": persons, **self.arena_sizes()}
        return _native.module.Fused(sizes, gain.numpy(), shift.numpy(), self.steps)

    def row_length(self, pixels: int) -> int:
        """Floats between rows of so many pixels."""
        return row_length(pixels)

    def pool(self, source: dict[str, Any]) -> None:
        """Append the step that makes the features of X."""
        self.steps.append({"kind": POOL, **source})

    def arena_sizes(self) -> dict[str, int]:
        """The floats of an arena, known when all steps are."""
        return {"arena": self.peak + SLACK}

    @abstractmethod
    def width(self, block: Block) -> int:
        """Output channels of a block."""

    @abstractmethod
    def block(self, block: Block, source: tuple[int, int, int]) -> tuple[int, int, int]:
        """Append the steps of one block, in place over X; returns X after it: (offset, row length, frames)."""
