"""What nvcc made of csrc/cuda: the module that was installed is taken apart, for every architecture in it.

Needs no GPU and no driver. tests/cuda_emulation shows that the same sources compute the right thing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from sparse_stgcn.kernels import cuda

if cuda.module is None:
    pytest.skip(f"the CUDA module: {cuda.reason}", allow_module_level=True)
triton = pytest.importorskip("triton", reason="its wheel brings cuobjdump")

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
PER_MULTIPROCESSOR = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10}


@lru_cache
def dump(*options: str) -> str:
    if not TOOL.exists():
        pytest.skip("this triton ships no cuobjdump")
    return subprocess.run([str(TOOL), *options, cuda.module.__file__], capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    return re.findall(r"\.(sm_\d+\w?)\.cubin", dump("-lelf"))


def short(mangled: str) -> str:
    """`Half<bf16, 8> stride 1` of a kernel's name as the compiler writes it."""
    found = re.search(r"kernelINS1_\d+(?:(Half)I\d(b?f16)|(Tf32|Exact)I)Li(\d+)EEELb([01])", mangled)
    if not found:
        return "plan_slots" if "plan_slots" in mangled else mangled
    kind = f"Half<{found[2]}, " if found[1] else f"{found[3]}<"
    return f"{kind}{found[4]}> stride {'1' if found[5] == '1' else 'any'}"


EXPECTED = {
    f"{kind}{rows}> stride {stride}"
    for kind in ("Half<bf16, ", "Half<f16, ", "Tf32<", "Exact<")
    for rows in (8, 16, 32)
    for stride in ("1", "any")
}


def test_default_architectures_are_in_it() -> None:
    assert set(architectures()) >= {"sm_80", "sm_90"} or len(architectures()) == 1


def test_registers_and_spills() -> None:
    report, seen = dump("-res-usage"), 0
    for part in report.split("Fatbin elf code:")[1:]:
        usage = {
            short(name): {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            for name, line in re.findall(r"Function (\S+?):\n\s*(.*)", part)
        }
        assert set(usage) == EXPECTED | {"plan_slots"}
        for name, used in usage.items():
            assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills registers to memory"
            # two blocks of 256 threads on a multiprocessor of 65536 registers
            assert used["REG"] <= 128, name
        seen += 1
    assert seen == len(architectures()) > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_instructions(architecture: str) -> None:
    if architecture not in architectures():
        pytest.skip(f"built for {', '.join(architectures())}")
    kernels = re.split(r"\n\s*Function : ", dump("-sass", "-arch", architecture))[1:]
    code = {short(k.split("\n", 1)[0]): re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", k) for k in kernels}
    assert set(code) == EXPECTED | {"plan_slots"}
    for name in EXPECTED:

        def count(pattern: str, text: list[str] = code[name]) -> int:
            return sum(bool(re.search(pattern, line)) for line in text)

        kind = name.split("<")[0]
        assert count(r"\bHMMA\.1688\.F32\.TF32") > 0 if kind == "Tf32" else True, name
        assert count(r"\bHMMA\.16816\.F32") > 0 if kind == "Half" else True, name
        assert count(r"\bHMMA") == 0 and count(r"\bFFMA") >= 64 if kind == "Exact" else True, name
        assert count(r"\bLDGSTS\.\S*128") > 0, f"{name} does not stage its input by 16-byte asynchronous copies"
        assert count(r"\bSTG\.E\.128") > 0, f"{name} does not store 16 bytes at once"
        assert count(r"\b(LDL|STL)") == 0, f"{name} touches local memory"
        assert len(code[name]) < 4000, f"{name} outgrows the instruction cache"


@pytest.mark.parametrize("architecture", [80, 86, 90], ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "bfloat16"])
def test_tiles_of_st_gcn_fit(architecture: int, arithmetic: str) -> None:
    """The network's own layers at batch 64 with two persons: every one has a tile, and most let two blocks live together."""
    device = cuda.module.Device(SHARED_BYTES[architecture], PER_MULTIPROCESSOR[architecture], 108)
    together = 0
    layers = [(64, 64, 100, 1), (64, 128, 100, 2), (128, 128, 50, 1), (128, 256, 50, 2), (256, 256, 25, 1)]
    for inputs, outputs, frames, stride in layers:
        blocks = inputs * outputs * 9 // 8 // 20
        conv = cuda.module.TemporalConv(
            arithmetic, N=128, I=inputs, T=frames, V=25, O=outputs, K=9, bo=8, bi=1, blocks=blocks, stride=stride,
            dilation=1, device=device,
        )  # fmt: skip
        assert conv.reason is None
        tile = conv.tile
        assert tile["shared_bytes"] <= SHARED_BYTES[architecture]
        assert tile["frames"] * tile["tiles"] >= -(-frames // stride) > tile["frames"] * (tile["tiles"] - 1)
        assert tile["chunks"] * tile["chunk_channels"] >= inputs
        together += 2 * (tile["shared_bytes"] + 1024) <= PER_MULTIPROCESSOR[architecture]
    assert together >= 4


def test_it_imports_without_torch_or_a_driver() -> None:
    """Nothing but the system's libraries is needed, and asking for a device that is not there says so."""
    needed = subprocess.run(["ldd", cuda.module.__file__], capture_output=True, text=True).stdout
    assert "libcuda" not in needed
    assert "torch" not in needed
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cuda', {cuda.module.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "try: module.Device(64)\n"
        "except RuntimeError as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "there is no CUDA device 64"
