"""The program of an ST-GCN whose blocks have few outputs, in columns of 16 lanes: csrc/cpu/fused_columns.inl."""
from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from ..backbones.base import Block
from ..kernels import _native
from ..layers import SparseConv2d
from ..recognizer import Recognizer
from ..sparsity import maskable_convs
from .program import BORDERS, Entries
from .stgcn import STGCNProgram

LANES = 16
_Z_BYTES = 160 * 1024  # of X A_k at a time: a share of L2
_PAIRED_ABOVE = 0.3  # live share of a graph convolution: two outputs a load, though zeros are multiplied too
_MOST_STRIPS = 16


def takes_columns(model: Recognizer) -> bool:
    """Whether every live weight serves fewer than four outputs, on a processor whose vectors are a column wide."""
    convs = maskable_convs(model).values()
    return _native.isa.startswith("avx512") and all(
        conv.values is not None and conv.pattern is not None and conv.pattern.block[0] < 4 for conv in convs)


def strips_of(frames: int, joints: int, multiple: int) -> tuple[int, int]:
    """How many strips a clip is cut into, and their frames, a multiple of ``multiple``: the fewest vectors.

    A strip more costs a copy of its borders, about one frame of work.
    """
    def cost(strips: int) -> int:
        return -(-strips * joints // LANES) * (length(strips) + 1)

    def length(strips: int) -> int:
        return -(-frames // (strips * multiple)) * multiple

    best = min(range(1, _MOST_STRIPS + 1), key=cost)
    return best, length(best)


class ColumnProgram(STGCNProgram):
    """An ST-GCN in columns: every block is compiled as if a person had 16 joints and a clip the frames of a strip."""

    def __init__(self, model: Recognizer, frames: int) -> None:
        super().__init__(model, frames)
        shrink = int(np.prod([self._temporal(block).stride for block in self.backbone.blocks]))
        self.clip = frames  # frames of a clip where the length of a strip is at hand
        self.strips, self.length = strips_of(frames, self.joints, shrink)
        self.columns, self.pixels = -(-self.strips * self.joints // LANES), LANES
        self.scratch = 0  # floats that lie behind all columns

    def row_length(self, pixels: int) -> int:
        return (pixels // LANES | 1) * LANES  # a tile never passes the end of a row here

    def arena_sizes(self) -> dict[str, int]:
        column = self.peak
        for step in self.steps:
            step["scratch"] = self.columns * column
        return {"columns": self.columns, "column": column, "strips": self.strips, "strip_frames": self.length,
                "arena": self.columns * column + self.scratch}

    def block(self, block: Block, source: tuple[int, int, int]) -> tuple[int, int, int]:
        made = super().block(block, source)
        self.clip = -(-self.clip // self._temporal(block).stride)
        return made

    def spatial(self, unit: nn.Module, source: dict[str, Any], targets: list[dict[str, Any]]) -> None:
        step = self._graph_step(unit)
        self.scratch = max(self.scratch, (step.pop("zrows") + 1) * step["scratch_ld"])  # one row for X
        self.steps += [{**step, **target} for target in targets]

    def between(self, unit: nn.Module, hidden: dict[str, Any]) -> None:
        self.steps.append({"kind": BORDERS, **hidden, "trail": hidden["lead"], "src_frames": self.clip})

    def pool(self, source: dict[str, Any]) -> None:
        self.scratch = max(self.scratch, source["rows"] * LANES)
        super().pool({**source, "frames": self.clip})

    def grouped(self, entries: Entries, rows: int) -> Entries:
        dense = sum(map(len, entries.row)) * entries.bo > _PAIRED_ABOVE * entries.rows * rows
        return entries.paired() if dense else entries

    def _graph_step(self, unit: nn.Module) -> dict[str, Any]:
        step = super()._graph_step(unit)
        lanes, rows = self.columns * LANES, step["zrows"]
        tile = max(1, min(self.length, _Z_BYTES // (4 * rows * lanes)))
        scratch_ld = (tile * self.columns + 2 | 1) * LANES  # the adjacency reads up to two vectors past a frame
        joint, exists = np.arange(lanes) % self.joints, np.arange(lanes) < self.strips * self.joints
        graph = unit.graph().numpy()
        main = graph * np.eye(self.joints, dtype=np.float32)
        step |= {"diagonal": (graph == main).all((1, 2)).astype(np.int32),
                 "lane_coef": np.ascontiguousarray(np.where(exists, main.sum(1)[:, joint], 0), np.float32)}
        bias = np.where(exists, step["bias"][:, joint], np.float32(0))
        offset = step["offset"] // step["scratch_ld"] * np.int32(scratch_ld)
        return {**step, "tile": tile, "scratch_ld": scratch_ld, "offset": offset,
                "bias": np.ascontiguousarray(bias, np.float32), "bias_ld": lanes}

    @staticmethod
    def _temporal(block: Block) -> SparseConv2d:
        return getattr(block, block.names[1]).conv
