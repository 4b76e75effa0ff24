"""Compiles Triton kernels for GPUs that are not here, as their launchers would, and reports what their code is made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_stgcn.kernels.triton import configs

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
CAPABILITIES = tuple(MATRIX)
ELEMENT = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
KINDS = {"float32": "float32", "tf32": "tf32", "bfloat16": "half", "float16": "half"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FILES = {
    "temporal_conv_forward": "temporal_conv", "temporal_conv_dx": "temporal_conv_backward",
    "temporal_conv_dw": "temporal_conv_backward", "graph_conv_forward": "graph_conv", "graph_conv_dx": "graph_conv_backward",
    "graph_conv_dw": "graph_conv_backward", "graph_conv_dadjacency": "graph_conv_adjacency",
    "pad_frames": "launch", "sum_parts": "launch",
}  # fmt: skip
INDEX = ("row_ptr", "channels", "taps", "place", "column_ptr", "entry_row", "entry_tap", "entry_slot")
ELEMENTS = ("x", "weights", "values", "adjacency", "y", "residual", "gate", "dy", "dx", "out", "bias", "scale", "shift")
LAST_STRIDES = ("x_v", "r_v", "d_v", "g_v", "a_w")  # of the vertices: 1, as for every contiguous tensor


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel. block: rows and columns of the plan; wide: frames that start at 16 bytes."""

    kernel: str
    arithmetic: str
    block: tuple[int, int] = (8, 8)
    wide: bool = True
    joints: int = 32
    per_channel: bool = False
    cover: bool = False

    def __str__(self) -> str:
        parts = [self.kernel, self.arithmetic]
        if self.kernel in GRAPH + TEMPORAL:
            parts += [f"{self.block[0]}x{self.block[1]}" + ("-cover" if self.cover else ""), "wide" if self.wide else "narrow"]
        if self.kernel in GRAPH:
            parts += [f"{self.joints}-joints", "per-channel" if self.per_channel else "shared"]
        return "-".join(parts)


TEMPORAL = tuple(name for name in FILES if name.startswith("temporal"))
GRAPH = tuple(name for name in FILES if name.startswith("graph"))
BLOCKS = {
    "temporal_conv_forward": [(rows, 8) for rows in configs.ROWS],
    "temporal_conv_dx": [(8, 8), (16, 8), (32, 8), (16, 16), (32, 32), (64, 64)],
    "temporal_conv_dw": [(rows, 8) for rows in configs.ROWS],
    "graph_conv_forward": [(rows, 8) for rows in configs.ROWS],
    "graph_conv_dx": [(8, 8), (16, 8), (32, 8), (16, 16), (32, 32), (64, 64)],
    "graph_conv_dw": [(rows, 8) for rows in configs.ROWS],
    "graph_conv_dadjacency": [(rows, 8) for rows in configs.ROWS],
}
"""(rows, columns) of the plans of blocks (8,1), (16,1), (32,1), (16,16), (32,32), (64,64); a kernel sees no other size."""


def every_variant() -> Iterator[Variant]:
    """All that a launch can ask for, but for choices that change no more than a factor of an address or the name of the
    matrix instruction: float16 is compiled for wide frames only (it is bfloat16's code otherwise), and an adjacency per
    channel (8 rows at a time, whatever the block) and 64 joints with the smallest and the largest block."""
    for arithmetic in ELEMENT:
        for kernel in (*TEMPORAL, *GRAPH):
            for block in BLOCKS[kernel]:
                for wide in (False, True) if arithmetic != "float16" else (True,):
                    yield Variant(kernel, arithmetic, block, wide)
            for block in BLOCKS[kernel][::len(BLOCKS[kernel]) - 1] if kernel in GRAPH else ():
                yield Variant(kernel, arithmetic, block, wide=block[0] == 8, per_channel=True)
                if arithmetic != "float16":
                    yield Variant(kernel, arithmetic, block, wide=block[0] == 8, joints=64)
            if kernel.endswith("_dw"):
                yield Variant(kernel, arithmetic, (8, 8), True, cover=True)
        yield Variant("pad_frames", arithmetic)
        yield Variant("sum_parts", arithmetic)


@dataclass(frozen=True)
class Code:
    """What a compiled kernel is made of."""

    variant: Variant
    capability: int
    ir: str
    ptx: str
    shared: int
    registers: int
    spilled: int
    warps: int

    @property
    def matrix(self) -> str | None:
        """The newest matrix instruction in the code, or None."""
        found = [name for name in MATRIX.values() if name in self.ptx]
        return found[-1] if found else None

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    @property
    def wide_copies(self) -> int:
        """Asynchronous copies of 16 bytes."""
        return self.count(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10")

    @property
    def wide_loads(self) -> int:
        return self.count(r"ld\.global\S*\.v4\.b32")


def config_of(variant: Variant, capability: int) -> Any:
    kind, (rows, columns) = KINDS[variant.arithmetic], variant.block
    if variant.kernel in TEMPORAL:
        return getattr(configs, variant.kernel)(capability, kind, columns if variant.kernel.endswith("_dx") else rows)
    size = columns if variant.kernel.endswith("_dx") else rows
    return configs.graph_conv(variant.kernel, capability, kind, size, variant.joints, variant.per_channel)


def constants_of(variant: Variant, config: Any) -> dict[str, Any]:
    from sparse_stgcn.kernels.triton.launch import precisions

    element = ELEMENT[variant.arithmetic]
    values = {
        "BO": variant.block[0], "COLUMNS": variant.block[1], "ALIGN": 16 // BYTES[element] if variant.wide else 1,
        "JOINTS": variant.joints, "PER_CHANNEL": variant.per_channel, "RELU": True, "PER_BLOCK": 8,
        "COUNT": 32 if variant.kernel == "sum_parts" else 1024, "AT_ONCE": 16,
        **precisions(KINDS[variant.arithmetic]), **dict.fromkeys(LAST_STRIDES, 1),
    }  # fmt: skip
    if variant.kernel in TEMPORAL:
        values |= {"PIXELS": config.pixels, "SLOTS": config.slots}
    if variant.kernel in GRAPH:
        values |= {"FRAMES": config.frames, "SLOTS": config.slots, "PART": config.rows, "STRIP": configs.STRIP}
        values["ROWS"] = 8 if variant.kernel == "graph_conv_dx" else config.rows
    if variant.kernel.endswith("_dw") and not variant.cover:
        values["place"] = None
    return values


@cache
def compiled(variant: Variant, capability: int, config: Any = None) -> Code:
    """The kernel as its launcher would ask for it: contiguous vertices, tensors aligned to 16 bytes."""
    kernel = getattr(import_module(f"sparse_stgcn.kernels.triton.{FILES[variant.kernel]}"), f"{variant.kernel}_kernel")
    if config is None and variant.kernel in (*TEMPORAL, *GRAPH):
        config = config_of(variant, capability)
    names = kernel.arg_names
    values = {name: value for name, value in constants_of(variant, config).items() if name in names}
    pointers = {
        **dict.fromkeys(ELEMENTS, f"*{ELEMENT[variant.arithmetic]}"), **dict.fromkeys(INDEX, "*i32"),
        "partial": "*fp32", "masked": "*u8",
    }  # fmt: skip
    signature = {name: "constexpr" if name in values else pointers.get(name, "i32") for name in names}
    signature = {name: "i64" if name == "total" and kind == "i32" else kind for name, kind in signature.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    options = config.options() if config else {"num_warps": 4, "enable_fp_fusion": True}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = usage(done.asm["cubin"])
    return Code(variant, capability, done.asm["ttir"], done.asm["ptx"], done.metadata.shared, used["REG"],
                used["STACK"] + used["LOCAL"], options["num_warps"])  # fmt: skip


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        report = subprocess.run([str(TOOL), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"Expected cuobjdump to report registers and local memory. Got:\n{report}")
    return found
