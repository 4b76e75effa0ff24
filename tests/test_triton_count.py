"""The count of the compiled Triton kernels: what it reads in machine code, and that its parts add up to one file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_stgcn import bench
from sparse_stgcn.benchmark import triton_count
from sparse_stgcn.benchmark.triton_count import Count, bytes_of_argument

PTX = """
    ld.param.b64    %rd1, [some_kernel_param_0];
    ld.param.b64    %rd2, [some_kernel_param_1];
    mad.wide.s32    %rd3, %r4, 2, %rd1;
    shl.b64         %rd4, %rd9, 4;
    add.s64         %rd5, %rd4, %rd3;
    add.s64         %rd6, %rd2, %rd4;
    @%p1 ld.global.b16 { %rs1 }, [ %rd5 + 0 ];
    @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd6 + 8 ];
    @%p1 st.global.v4.b32 [ %rd5 + 0 ], { %r1, %r2, %r3, %r4 };
"""
COPY = "    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd6 + 0 ], 0x10, %r8;\n"


def test_width_of_the_loads_from_one_argument() -> None:
    assert bytes_of_argument(PTX) == 2, "neither what is stored, nor what another argument is loaded with"
    assert bytes_of_argument(PTX, 1) == 8
    assert bytes_of_argument(PTX + COPY, 1) == 16
    assert bytes_of_argument(PTX + COPY, 2) == 0


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b"])
def test_a_share_is_refused(text: str) -> None:
    with pytest.raises(bench.UserError, match="--part"):
        bench.main(["--what", "triton-count", "--part", text])


def test_it_stands_alone() -> None:
    with pytest.raises(bench.UserError, match="triton-count alone"):
        bench.main(["--what", "triton-count", "ops"])


def test_parts_add_up_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = pytest.importorskip("sparse_stgcn.benchmark.triton_code", reason="needs triton")
    variants = [code.Variant("sum_parts", "float32"), code.Variant("pad_frames", "bfloat16")]
    monkeypatch.setattr(code, "every_variant", lambda: variants)
    monkeypatch.setattr(code, "CAPABILITIES", (80,))
    out = tmp_path / "count.json"
    for part in ("1/2", "2/2", "2/2"):
        assert bench.main(["--what", "triton-count", "--part", part, "--out", str(out)]) == 0
    rows = triton_count.load(out)
    assert [row.variant for row in rows] == ["pad_frames-bfloat16", "sum_parts-float32"]
    assert all(row.spilled == 0 < row.registers for row in rows)
    assert rows[0].bytes_of_x == 2, "a frame of 25 elements starts anywhere"
    assert out.with_suffix(".md").read_text().startswith("Triton kernels compiled: 2;")
    assert json.loads(out.read_text())["triton"]


def test_the_table_shows_what_spills() -> None:
    row = Count("graph_conv_dw", "bfloat16", "a", 80, 255, 176, 8192, "mma.sync", 3, 16)
    table = triton_count.markdown([row, replace(row, variant="b", spilled=0, matrix=None, bytes_of_x=2)])
    assert "compiled: 2; with registers spilled: 1; with matrix instructions: 1." in table
    assert table.splitlines()[-1] == "| graph_conv_dw | bfloat16 | 80 | 2 | 1 | 255 | 8 | mma.sync: 1 | 2 | 16: 1, 2: 1 |"
