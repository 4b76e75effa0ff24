"""Which tile a kernel runs with: plain data and a pure function, so that nothing is tuned at run time.

A key holds what decides registers and instructions: the architecture's family, the arithmetic and the block's rows.
Never the batch, the frames or the vertices: a new length of clip must not compile a new kernel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """pixels x slots of the gathered input in one step; warps of a program; stages of the software pipeline."""

    pixels: int
    slots: int
    warps: int
    stages: int


FAMILIES = {80: "ampere", 90: "hopper", 100: "blackwell"}
"""The first compute capability of each family; a later one of the same family shares its table."""

ROWS = (8, 16, 32, 64)
"""Output channels of a block that the matrix unit takes as they are."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use, by compute capability."""

# float32 products run on the FMA units, tf32 and 16-bit ones on the matrix unit. Larger tiles spill registers to memory.
_MATRIX = {8: Config(128, 16, 4, 3), 16: Config(128, 16, 4, 3), 32: Config(128, 16, 4, 3), 64: Config(64, 16, 4, 3)}
_FMA = {8: Config(128, 16, 4, 2), 16: Config(64, 16, 4, 2), 32: Config(64, 16, 4, 2), 64: Config(64, 16, 8, 2)}
_Table = dict[tuple[str, str], dict[int, Config]]


def _for_all(matrix: dict[int, Config], fma: dict[int, Config]) -> _Table:
    arithmetics = {"float32": fma, "tf32": matrix, "half": matrix}
    return {(name, arithmetic): rows for name in FAMILIES.values() for arithmetic, rows in arithmetics.items()}


TEMPORAL_CONV_FORWARD: _Table = _for_all(_MATRIX, _FMA)
"""(family, arithmetic) -> rows of a block -> tile."""

TEMPORAL_CONV_DX: _Table = _for_all({1: Config(128, 8, 4, 2), **_MATRIX}, {1: Config(128, 8, 4, 2), **_FMA})
"""(family, arithmetic) -> columns of a block -> tile."""

_MATRIX_DW = {rows: Config(64, 16, 4, 3) for rows in ROWS}
_FMA_DW = {rows: Config(32, 16, 4, 2) for rows in ROWS}
TEMPORAL_CONV_DW: _Table = _for_all(_MATRIX_DW, _FMA_DW)
"""(family, arithmetic) -> rows of a block -> tile."""

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
