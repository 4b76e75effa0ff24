"""Which tile a kernel runs with: plain data and a pure function, so that nothing is tuned at run time.

A key holds what decides registers and instructions: the architecture's family, the arithmetic and the block's rows.
Never the batch, the frames or the vertices: a new length of clip must not compile a new kernel.
"""

from __future__ import annotations

from dataclasses import dataclass


class _Launch:
    warps: int
    stages: int

    def options(self) -> dict[str, int | bool]:
        """How the kernel is compiled. Without a limit of its own ptxas spills a few bytes to fit one more program."""
        registers = min(255, 65536 // (32 * self.warps))
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Config(_Launch):
    """pixels x slots of the gathered input in one step; warps of a program; stages of the software pipeline."""

    pixels: int
    slots: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GraphConfig(_Launch):
    """Rows (of a block) x frames of a program; slots of the gathered input in one step; warps; stages."""

    rows: int
    frames: int
    slots: int
    warps: int
    stages: int


FAMILIES = {80: "ampere", 90: "hopper", 100: "blackwell"}
"""The first compute capability of each family; a later one of the same family shares its table."""

ARITHMETIC = ("float32", "tf32", "half")

DEPTH = 16
"""The least number of terms of a product, K of tl.dot: Triton 3.6 and 3.7 take no fewer, of whatever dtype."""

ROWS = (8, 16, 32, 64)
"""Output channels of a block that the matrix unit takes as they are."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use, by compute capability."""

_Rows = dict[int, Config]
_Table = dict[tuple[str, str], _Rows]


def _for_all(*, half: _Rows, tf32: _Rows, float32: _Rows) -> _Table:
    arithmetics = {"float32": float32, "tf32": tf32, "half": half}
    return {(name, arithmetic): rows for name in FAMILIES.values() for arithmetic, rows in arithmetics.items()}


# float32 products run on the FMA units, tf32 and 16-bit ones on the matrix unit. These are the largest tiles (of a few
# that were compiled) whose registers do not spill to memory on any family.
_MATRIX = {8: Config(128, 16, 4, 3), 16: Config(128, 16, 4, 3), 32: Config(128, 16, 4, 3), 64: Config(64, 16, 8, 3)}
_FMA = {8: Config(128, 16, 4, 2), 16: Config(64, 16, 4, 2), 32: Config(64, 16, 4, 2), 64: Config(64, 16, 8, 2)}

TEMPORAL_CONV_FORWARD: _Table = _for_all(half=_MATRIX, tf32=_MATRIX, float32=_FMA)
"""(family, arithmetic) -> rows of a block -> tile."""

_MATRIX_DX = _MATRIX | {32: Config(64, 16, 4, 3)}
TEMPORAL_CONV_DX: _Table = _for_all(half=_MATRIX_DX, tf32=_MATRIX_DX, float32=_FMA | {64: Config(32, 16, 8, 2)})
"""(family, arithmetic) -> columns of a block -> tile."""

TEMPORAL_CONV_DW: _Table = _for_all(
    half={8: Config(64, 16, 4, 3), 16: Config(128, 16, 4, 3), 32: Config(64, 16, 4, 3), 64: Config(32, 16, 4, 3)},
    tf32=dict.fromkeys(ROWS, Config(32, 16, 4, 3)),
    float32={8: Config(16, 16, 4, 2), 16: Config(16, 16, 4, 2), 32: Config(16, 16, 4, 2), 64: Config(16, 16, 4, 2)},
)
"""(family, arithmetic) -> rows of a block -> tile."""

JOINTS = (32, 64)
"""Vertices of a frame as a tile holds them; more than 64 have no kernel."""

STRIP = 32
"""Joints that graph_conv_dw brings through the graph at once: three TF32 products of a (64, 64) adjacency, and what they
multiply, do not fit into the registers of a program."""

_Graph = dict[int, GraphConfig]


def _graph(at_8: GraphConfig, at_16: GraphConfig, at_32: GraphConfig) -> _Graph:
    return {8: at_8, 16: at_16, 32: at_32, 64: at_32}  # 64 channels are two programs


_4 = (16, 4, 2)  # slots, warps, stages
_8 = (16, 8, 2)
_NARROW = _graph(GraphConfig(8, 4, *_4), GraphConfig(16, 4, *_4), GraphConfig(32, 2, *_4))
_NARROW_8 = _graph(GraphConfig(8, 4, *_8), GraphConfig(16, 4, *_4), GraphConfig(32, 2, *_8))
_NARROW_FMA = _NARROW | {16: GraphConfig(16, 4, *_8)}
_NARROW_DW = _graph(GraphConfig(8, 2, *_8), GraphConfig(16, 2, *_4), GraphConfig(16, 2, *_4))
_BROAD = _graph(GraphConfig(8, 2, *_8), GraphConfig(16, 1, *_8), GraphConfig(16, 1, *_8))
_BROAD_DW = _graph(GraphConfig(8, 1, 16, 8, 1), GraphConfig(16, 1, 16, 8, 1), GraphConfig(16, 1, 16, 8, 1))

GRAPH_CONV: dict[tuple[str, int, str], _Graph] = {
    **{(kernel, 32, a): _NARROW for kernel in ("graph_conv_forward", "graph_conv_dadjacency") for a in ("tf32", "half")},
    **{(kernel, 32, "float32"): _NARROW_FMA for kernel in ("graph_conv_forward", "graph_conv_dadjacency")},
    ("graph_conv_dx", 32, "float32"): _NARROW,
    ("graph_conv_dx", 32, "tf32"): _NARROW,
    ("graph_conv_dx", 32, "half"): _NARROW_8,
    ("graph_conv_dw", 32, "float32"): _graph(GraphConfig(8, 2, *_8), GraphConfig(16, 2, *_8), GraphConfig(16, 2, *_8)),
    ("graph_conv_dw", 32, "tf32"): _NARROW_DW | {8: GraphConfig(8, 2, *_4), 16: GraphConfig(16, 2, *_8)},
    ("graph_conv_dw", 32, "half"): _NARROW_DW,
    **{("graph_conv_forward", 64, arithmetic): _BROAD for arithmetic in ARITHMETIC},
    **{("graph_conv_dadjacency", 64, arithmetic): _BROAD for arithmetic in ARITHMETIC},
    **{("graph_conv_dx", 64, arithmetic): _BROAD for arithmetic in ARITHMETIC},
    **{("graph_conv_dw", 64, arithmetic): _BROAD_DW for arithmetic in ARITHMETIC},
}
"""(kernel, joints, arithmetic) -> rows (for dx: columns) of a block -> tile, for an adjacency that channels share."""

GRAPH_CONV_PER_CHANNEL: dict[str, GraphConfig] = {
    "graph_conv_forward": GraphConfig(8, 16, 16, 8, 2),
    "graph_conv_dx": GraphConfig(8, 8, 16, 8, 2),
    "graph_conv_dw": GraphConfig(8, 4, 16, 8, 1),
    "graph_conv_dadjacency": GraphConfig(8, 16, 16, 8, 1),
}
"""kernel -> tile, for an adjacency per channel and 32 joints: 8 matrices at once leave no registers for 64 joints."""

NEVER = float("inf")
PACK_FROM = {
    ("ampere", "half"): 12.0, ("ampere", "tf32"): 21.0, ("ampere", "float32"): 43.0,
    ("hopper", "half"): 20.0, ("hopper", "tf32"): NEVER, ("hopper", "float32"): 39.0,
    ("blackwell", "half"): 20.0, ("blackwell", "tf32"): NEVER, ("blackwell", "float32"): 39.0,
}  # fmt: skip
"""(family, arithmetic) -> loads of every element from which on a copy with padded frames pays; counted in README.md."""

PROGRAMS_OF_DW = 1024
"""About how many programs share the pixels of dw: enough for any GPU, and a workspace of this many partial rows."""


def family(capability: int) -> str:
    """The table's name for a compute capability such as 80, 86, 89, 90, 100 or 120.

    Raises:
        ValueError: the GPU is older than compute capability 8.0.
    """
    known = [first for first in FAMILIES if first <= capability]
    if not known:
        raise ValueError(f"Expected a GPU of compute capability 8.0 or later. Got {capability // 10}.{capability % 10}.")
    return FAMILIES[max(known)]


def _tile(table: _Table, capability: int, arithmetic: str, size: int, what: str) -> Config:
    sizes = table[family(capability), arithmetic]
    if size not in sizes:
        raise ValueError(f"Expected blocks of {', '.join(map(str, sizes))} {what} channels. Got {size}.")
    return sizes[size]


def temporal_conv_forward(capability: int, arithmetic: str, rows: int) -> Config:
    """The tile for `arithmetic` ("float32", "tf32", "half") and blocks of `rows` output channels.

    Raises:
        ValueError: there is no entry for `rows`, or the GPU is too old.
    """
    return _tile(TEMPORAL_CONV_FORWARD, capability, arithmetic, rows, "output")


def temporal_conv_dx(capability: int, arithmetic: str, columns: int) -> Config:
    """The tile for blocks of `columns` input channels; errors as temporal_conv_forward."""
    return _tile(TEMPORAL_CONV_DX, capability, arithmetic, columns, "input")


def temporal_conv_dw(capability: int, arithmetic: str, rows: int) -> Config:
    """The tile for blocks of `rows` output channels; errors as temporal_conv_forward."""
    return _tile(TEMPORAL_CONV_DW, capability, arithmetic, rows, "output")


def graph_conv(kernel: str, capability: int, arithmetic: str, rows: int, joints: int, per_channel: bool) -> GraphConfig:
    """The tile of a kernel of graph_conv, the same for every family.

    kernel: "graph_conv_" and "forward", "dx", "dw" or "dadjacency"; rows: output (for dx: input) channels of a block;
    joints: padded vertices, one of JOINTS. Errors as temporal_conv_forward.
    """
    family(capability)
    if per_channel:
        return GRAPH_CONV_PER_CHANNEL[kernel]
    return GRAPH_CONV[kernel, joints, arithmetic][rows]
