"""Compiles the Triton kernels for GPUs that are not here, and asserts what the machine code is made of.

By default a sample of the variants: every kernel in every arithmetic, and over all of them every block shape, width of frames,
kind of adjacency and architecture. SPARSE_STGCN_TEST_EVERY_KERNEL=1 compiles everything that a launch can ask for.
"""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from sparse_stgcn.benchmark.triton_code import (  # noqa: E402
    BLOCKS,
    BYTES,
    CAPABILITIES,
    ELEMENT,
    GRAPH,
    KINDS,
    MATRIX,
    TEMPORAL,
    TOOL,
    Variant,
    compiled,
    config_of,
    every_variant,
)
from sparse_stgcn.benchmark.triton_count import bytes_of_argument  # noqa: E402
from sparse_stgcn.kernels.triton import configs, function  # noqa: E402

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="this triton ships no cuobjdump")
NEWEST = ("temporal_conv_forward", "temporal_conv_dx", "graph_conv_forward", "graph_conv_dx")


def sample() -> list[tuple[Variant, int]]:
    """Each kernel and arithmetic once, the other choices dealt out in turn; and those with the most to keep in registers."""
    chosen = []
    for a, arithmetic in enumerate(ELEMENT):
        for n, kernel in enumerate((*TEMPORAL, *GRAPH)):
            block = BLOCKS[kernel][(a + n) % len(BLOCKS[kernel])]
            per_channel = kernel in GRAPH and (a + n) % 3 == 2
            variant = Variant(kernel, arithmetic, block, wide=(a + n // 2) % 2 == 0, per_channel=per_channel)
            chosen.append((variant, CAPABILITIES[(a + 2 * n) % 3]))
        chosen += [(Variant(kernel, arithmetic), CAPABILITIES[a % 3]) for kernel in ("pad_frames", "sum_parts")]
    tightest = [Variant("graph_conv_dw", "bfloat16", (rows, 8), wide=rows == 8, joints=64) for rows in (8, 16, 64)]
    return chosen + list(zip(tightest, CAPABILITIES, strict=True))


EVERYTHING = os.environ.get("SPARSE_STGCN_TEST_EVERY_KERNEL") == "1"
CHOSEN = [(v, c) for v in every_variant() for c in CAPABILITIES] if EVERYTHING else sample()


@pytest.mark.parametrize(("variant", "capability"), CHOSEN, ids=[f"{v}-sm_{c}" for v, c in CHOSEN])
def test_machine_code(variant: Variant, capability: int) -> None:
    """No spills, little enough shared memory, the promised instructions, 64-bit addresses, and a mask on every access."""
    code = compiled(variant, capability)
    assert code.spilled == 0, "registers spilled to memory"
    assert code.shared <= min(configs.SHARED_BYTES.values())
    assert code.registers * code.warps * 32 <= 65536, "a program does not fit into a multiprocessor"
    offsets = re.findall(r"tt\.addptr .*: tensor<(?:\d+x)+!tt\.ptr<(?!i)\w+>>, tensor<(?:\d+x)+(\w+)>", code.ir)
    of_tiles = re.findall(r"tt\.addptr .*: tensor<(?:\d+x){2,3}!tt\.ptr<\w+>>, tensor<(?:\d+x){2,3}(\w+)>", code.ir)
    assert "i64" in offsets
    assert set(of_tiles) <= {"i64"}, "a tile is addressed with 32 bits"
    accesses = re.findall(r"tt\.(load|store) ([^:{]*?)\s*(?:\{[^}]*\})?\s*: tensor<", code.ir)
    assert len(accesses) >= 2
    for access, operands in accesses:
        assert len(operands.split(",")) == 3, f"a {access} without a mask"
    if variant.kernel in (*TEMPORAL, *GRAPH):
        check_arithmetic(variant, capability)


def check_arithmetic(variant: Variant, capability: int) -> None:
    code, kind = compiled(variant, capability), KINDS[variant.arithmetic]
    if kind == "float32":
        assert "fma.rn.f32" in code.ptx
        assert code.matrix is None, "IEEE float32 was asked for"
    elif variant.kernel in NEWEST:
        assert code.matrix == MATRIX[capability], "pixels on the M side reach the newest matrix instruction"
    else:
        assert code.matrix is not None
    if variant.wide:
        # wgmma and tcgen05 want tf32 with the sums' index innermost, so that tiles are turned around 4 bytes at a time
        turned = kind == "tf32" and code.matrix != "mma.sync"
        assert code.count(r"cp\.async\.c[ag]") > 0 or config_of(variant, capability).stages == 1
        assert bytes_of_argument(code.ptx) == (4 if turned else bytes_of_a_thread(variant, capability))
    elif kind != "half":  # an asynchronous copy takes at least 4 bytes
        assert code.count(r"cp\.async\.c[ag]") > 0


def bytes_of_a_thread(variant: Variant, capability: int) -> int:
    """The widest load there can be: 16 bytes, or a thread's share of the slots and pixels that a program loads at a time."""
    config = config_of(variant, capability)
    pixels = config.pixels if variant.kernel in TEMPORAL else config.frames * min(variant.joints, configs.STRIP)
    return min(16, BYTES[ELEMENT[variant.arithmetic]] * pixels * config.slots // (32 * config.warps))


def test_wide_frames_are_what_makes_loads_wide() -> None:
    narrow, wide = (compiled(Variant("temporal_conv_forward", "bfloat16", (8, 8), w), 80) for w in (False, True))
    assert narrow.wide_copies == narrow.wide_loads == 0
    assert wide.wide_copies > 0
    assert wide.count(r"ld\.global") < narrow.count(r"ld\.global")


def test_every_table_has_every_shape() -> None:
    for capability in configs.SHARED_BYTES:
        for arithmetic in ("float32", "tf32", "half"):
            for rows in configs.ROWS:
                for op in (configs.temporal_conv_forward, configs.temporal_conv_dx, configs.temporal_conv_dw):
                    assert op(capability, arithmetic, rows).slots % 16 == 0
                for joints, per_channel in ((32, False), (64, False), (32, True)):
                    for kernel in GRAPH:
                        assert rows % configs.graph_conv(kernel, capability, arithmetic, rows, joints, per_channel).rows == 0


def test_what_no_table_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute capability 8.0 or later. Got 7.5"):
        configs.temporal_conv_forward(75, "half", 8)
    with pytest.raises(ValueError, match=r"8, 16, 32, 64 output channels. Got 4"):
        configs.temporal_conv_forward(80, "half", 4)


def test_the_package_names_its_functions() -> None:
    from sparse_stgcn.kernels import triton as kernels

    for name in kernels.__all__:
        assert function(name).__name__ == name
