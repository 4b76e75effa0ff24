"""Compiles every Triton kernel for GPUs that are not here, and asserts what the machine code is made of."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparse_stgcn.kernels.triton import configs  # noqa: E402
from sparse_stgcn.kernels.triton.graph_conv import graph_conv_forward_kernel, precisions  # noqa: E402
from sparse_stgcn.kernels.triton.temporal_conv import temporal_conv_forward_kernel  # noqa: E402
from sparse_stgcn.kernels.triton.temporal_conv_backward import (  # noqa: E402
    temporal_conv_dw_kernel,
    temporal_conv_dw_sum_kernel,
    temporal_conv_dx_kernel,
)

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ELEMENT = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Variant:
    arithmetic: str
    block: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.arithmetic}-{self.block[0]}x{self.block[1]}"

    @property
    def kind(self) -> str:
        return self.arithmetic if ELEMENT[self.arithmetic] == "fp32" else "half"


VARIANTS = [
    *(Variant("bfloat16", block) for block in ((8, 1), (16, 1), (32, 32), (64, 64))),
    Variant("float16", (16, 16)),
    *(Variant("tf32", block) for block in ((8, 1), (32, 1))),
    *(Variant("float32", block) for block in ((8, 1), (16, 16))),
]

BACKWARD = [
    Variant("bfloat16", (8, 1)),
    Variant("float16", (16, 16)),
    Variant("tf32", (32, 32)),
    Variant("float32", (8, 1)),
    Variant("float32", (16, 16)),
]

POINTERS = {
    **dict.fromkeys(("row_ptr", "inputs", "taps", "t_ptr", "t_perm", "t_row"), "*i32"),
    **dict.fromkeys(("scale", "shift", "bias", "partial"), "*fp32"),
    "masked": "*u8",
}
LAST_STRIDES = ("x_v", "r_v", "d_v", "a_w")  # of the vertices: 1, as for every contiguous tensor


def compile_for(capability: int, kernel: Any, config: configs.Config, variant: Variant, **constants: Any) -> Any:
    """The kernel as its launcher would ask for it: contiguous vertices, tensors aligned to 16 bytes."""
    element = f"*{ELEMENT[variant.arithmetic]}"
    names = kernel.arg_names
    values = {
        "BO": variant.block[0], "BI": variant.block[1], "PIXELS": config.pixels, "SLOTS": config.slots,
        "PRECISION": "tf32" if variant.arithmetic == "tf32" else "ieee", **dict.fromkeys(LAST_STRIDES, 1), **constants,
    }  # fmt: skip
    values = {name: value for name, value in values.items() if name in names}
    pointers = {**dict.fromkeys(("x", "values", "adjacency", "y", "residual", "dy", "dx", "dw"), element), **POINTERS}
    pointers = {name: kind for name, kind in pointers.items() if name in names}
    signature = {name: "constexpr" if name in values else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and local memory of the one kernel in a cubin."""
    if not TOOL.exists():
        pytest.skip("this triton ships no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    report = subprocess.run([str(TOOL), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", report)
    assert {name for name, _ in found} == {"REG", "STACK", "LOCAL"}, report
    return {name: int(count) for name, count in found}


def check_code(compiled: Any, capability: int, arithmetic: str, folder: Path, *, matrix: bool, copies: bool) -> None:
    """No spills, little enough shared memory, the promised instructions, 64-bit addresses, and a mask on every access."""
    ptx, ir = compiled.asm["ptx"], compiled.asm["ttir"]
    used = usage(compiled.asm["cubin"], folder)
    assert used["STACK"] == used["LOCAL"] == 0, "registers spilled to memory"
    assert compiled.metadata.shared <= min(configs.SHARED_BYTES.values())
    if matrix and arithmetic != "float32":
        assert MATRIX[capability] in ptx or (capability > 80 and MATRIX[80] in ptx)
    else:
        assert "fma.rn.f32" in ptx
        assert not any(instruction in ptx for instruction in MATRIX.values()), "IEEE float32 was asked for"
    if copies:
        assert "cp.async.c" in ptx
    offsets = re.findall(r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(\w+)>", ir)
    assert offsets
    assert set(offsets) == {"i64"}, "a tile is addressed with 32 bits"
    accesses = re.findall(r"tt\.(?:load|store) ([^:{]*?)\s*(?:\{[^}]*\})?\s*: tensor<", ir)
    assert len(accesses) >= 4
    assert all(len(operands.split(",")) == 3 for operands in accesses), "an access without a mask"


CAPABILITY = pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")


@CAPABILITY
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_temporal_conv_forward(variant: Variant, capability: int, tmp_path: Path) -> None:
    config = configs.temporal_conv_forward(capability, variant.kind, variant.block[0])
    compiled = compile_for(capability, temporal_conv_forward_kernel, config, variant, RELU=True)
    # 16 x 8 weights of 16 bits are less than the 4 bytes per thread that an asynchronous copy takes at least
    copies = variant.kind != "half" or variant.block[0] > 8
    check_code(compiled, capability, variant.arithmetic, tmp_path, matrix=True, copies=copies)
    if variant.kind != "float32":
        assert MATRIX[capability] in compiled.asm["ptx"], "pixels on the M side reach the newest matrix instruction"


@CAPABILITY
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
def test_temporal_conv_dx(variant: Variant, capability: int, tmp_path: Path) -> None:
    config = configs.temporal_conv_dx(capability, variant.kind, variant.block[1])
    compiled = compile_for(capability, temporal_conv_dx_kernel, config, variant)
    check_code(compiled, capability, variant.arithmetic, tmp_path, matrix=variant.block[1] > 1, copies=False)


@CAPABILITY
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
def test_temporal_conv_dw(variant: Variant, capability: int, tmp_path: Path) -> None:
    config = configs.temporal_conv_dw(capability, variant.kind, variant.block[0])
    compiled = compile_for(capability, temporal_conv_dw_kernel, config, variant)
    check_code(compiled, capability, variant.arithmetic, tmp_path, matrix=True, copies=False)


@CAPABILITY
def test_second_pass_of_dw(capability: int, tmp_path: Path) -> None:
    variant, config = Variant("bfloat16", (8, 1)), configs.Config(0, 0, 4, 3)
    compiled = compile_for(capability, temporal_conv_dw_sum_kernel, config, variant, PER_BLOCK=8, COUNT=256)
    used = usage(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert "i64" in re.findall(r"tt\.addptr .*: tensor<256x!tt\.ptr<f32>>, tensor<256x(\w+)>", compiled.asm["ttir"])


@CAPABILITY
@pytest.mark.parametrize("joints", [16, 32, 64])
@pytest.mark.parametrize("variant", BACKWARD[:1] + BACKWARD[2:4], ids=str)
def test_graph_conv_forward(variant: Variant, joints: int, capability: int, tmp_path: Path) -> None:
    config = configs.graph_conv_forward(capability, variant.kind, variant.block[0], joints)
    shape = {"FRAMES": config.pixels // joints, "JOINTS": joints, "RELU": True, **precisions(variant.kind)}
    compiled = compile_for(capability, graph_conv_forward_kernel, config, variant, **shape)
    check_code(compiled, capability, variant.arithmetic, tmp_path, matrix=True, copies=False)


def test_every_table_has_every_shape() -> None:
    for capability in configs.SHARED_BYTES:
        for arithmetic in ("float32", "tf32", "half"):
            for rows in configs.ROWS:
                config = configs.temporal_conv_forward(capability, arithmetic, rows)
                assert config.slots % 16 == 0
                assert config.pixels >= 64


def test_what_no_table_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="compute capability 8.0 or later. Got 7.5"):
        configs.temporal_conv_forward(75, "half", 8)
    with pytest.raises(ValueError, match="8, 16, 32, 64 output channels. Got 4"):
        configs.temporal_conv_forward(80, "half", 4)
