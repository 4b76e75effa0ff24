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
KINDS = ("unit", "strided", "graph")  # stride 1, any stride, the adjacency's product first
PER_MULTIPROCESSOR = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10}


@lru_cache
def dump(*options: str) -> str:
    if not TOOL.exists():
        pytest.skip("this triton ships no cuobjdump")
    return subprocess.run([str(TOOL), *options, cuda.module.__file__], capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    return re.findall(r"\.(sm_\d+\w?)\.cubin", dump("-lelf"))


def short(mangled: str) -> str:
    """`gather Half<bf16, 8> 0` of a kernel's name as the compiler writes it."""
    mangled = re.sub(r"^_ZN12sparse_stgcn4cuda(\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8})?", "", mangled)
    gather = r"13gather_kernelINS0_\d+(?:HalfI\d(b?f16)|(Tf32|Exact)I)Li(\d+)EEELNS0_4KindE(\d)EEE"
    weights = r"22weight_gradient_kernelINS1_\d+(?:OnMatrixUnitI(?:\d(b?f16)|f)E|(InFloat32))ELi(\d)ELNS0_4KindE(\d)EEE"
    if found := re.match(gather, mangled):
        return f"gather {found[1] or found[2]} {found[3]} {KINDS[int(found[4])]}"
    if found := re.match(weights, mangled):
        return f"weights {found[1] or ('Exact' if found[2] else 'Tf32')} {found[3]} {KINDS[int(found[4])]}"
    if found := re.match(r"12outer_kernelINS1_\d+Outer(OnFma|OnMatrixUnit)E(?:\d(b?f16)|f)E", mangled):
        return f"outer {found[1]} {found[2] or 'float'}"
    if found := re.match(r"\d+(mix_kernel|sum_shares|sum_splits)I(?:\d(b?f16)|f)E", mangled):
        return f"{found[1]} {found[2] or 'float'}"
    return next((name for name in ("plan_slots", "plan_live_rows") if name in mangled), mangled)


GATHERS = {
    f"gather {a} {rows} {kind}"
    for a in ("bf16", "f16", "Tf32", "Exact")
    for rows in (8, 16, 32)
    for kind in KINDS
}
EIGHTS = {"bf16": (1, 2, 4), "f16": (1, 2, 4), "Tf32": (1, 2), "Exact": (1,)}  # of rows, that a task takes at a time
WEIGHTS = {f"weights {a} {eights} {kind}" for a in EIGHTS for eights in EIGHTS[a] for kind in KINDS}
SIMPLE = {f"{name} {t}" for name in ("mix_kernel", "sum_shares", "sum_splits") for t in ("float", "bf16", "f16")}
OUTER = {f"outer {unit} {t}" for unit in ("OnFma", "OnMatrixUnit") for t in ("float", "bf16", "f16")}
EXPECTED = GATHERS | WEIGHTS | OUTER | SIMPLE | {"plan_slots", "plan_live_rows"}


def test_default_architectures_are_in_it() -> None:
    assert set(architectures()) >= {"sm_80", "sm_90"} or len(architectures()) == 1


def test_registers_and_spills() -> None:
    report, seen = dump("-res-usage"), 0
    for part in report.split("Fatbin elf code:")[1:]:
        usage = {
            short(name): {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            for name, line in re.findall(r"Function (\S+?):\n\s*(.*)", part)
        }
        if not usage:
            continue
        assert set(usage) <= EXPECTED
        for name, used in usage.items():
            assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills registers to memory"
            # two blocks of 256 threads on a multiprocessor of 65536 registers; 64 sums a lane leave no room for two
            assert used["REG"] <= (168 if name.startswith("weights Exact") else 128), name
        seen += len(usage)
    assert seen == len(EXPECTED) * len(set(architectures())) > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_instructions(architecture: str) -> None:
    if architecture not in architectures():
        pytest.skip(f"built for {', '.join(architectures())}")
    kernels = re.split(r"\n\s*Function : ", dump("-sass", "-arch", architecture))[1:]
    code = {short(k.split("\n", 1)[0]): re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", k) for k in kernels}
    assert set(code) == EXPECTED
    for name in EXPECTED:

        def count(pattern: str, text: list[str] = code[name]) -> int:
            return sum(bool(re.search(pattern, line)) for line in text)

        assert count(r"\b(LDL|STL)") == 0, f"{name} touches local memory"
        assert len(code[name]) < 6000, f"{name} outgrows the instruction cache"
        # addresses are 64 bit wide: products of 32-bit sizes go to a pair of registers
        assert count(r"\b(IMAD\.WIDE|LEA\.HI\.X|UIMAD\.WIDE|IADD\.64|IMAD\.X|IADD3\.X)") > 0, name
        if name in GATHERS | WEIGHTS:
            matrix = {"Tf32": r"\bHMMA\.1688\.F32\.TF32", "bf16": r"\bHMMA\.16816\.F32\.BF16", "f16": r"\bHMMA\.16816\.F32\s"}
            kind = name.split()[1]
            assert count(matrix[kind]) > 0 if kind in matrix else count(r"\bHMMA") == 0 and count(r"\bFFMA") >= 32, name
            assert count(r"\bLDGSTS\.\S*128") > 0, f"{name} does not stage its input by 16-byte asynchronous copies"
        if name in OUTER:
            assert (count(r"\bHMMA\.1688\.F32\.TF32") > 0) == ("OnMatrixUnit" in name), name
        if name in GATHERS:
            assert count(r"\bSTG\.E\.128") > 0, f"{name} does not store 16 bytes at once"
            assert count(r"\bLDG\.E\.(128|64)") > 0, f"{name} reads neither slots nor residual by 16 bytes"


LAYERS = [(64, 64, 100, 1), (64, 128, 100, 2), (128, 128, 50, 1), (128, 256, 50, 2), (256, 256, 25, 1)]


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize("op", ["TemporalConv", "GraphConv"])
@pytest.mark.parametrize("architecture", [80, 86, 90], ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "bfloat16"])
def test_tiles_of_st_gcn_fit(architecture: int, arithmetic: str, op: str, product: str) -> None:
    """The network's own layers at batch 64 with two persons: every one has a tile, and most let two blocks live together."""
    device = cuda.module.Device(SHARED_BYTES[architecture], PER_MULTIPROCESSOR[architecture], 108)
    together = 0
    for inputs, outputs, frames, stride in LAYERS:
        temporal = op == "TemporalConv"
        taps, more = (9, {"stride": stride, "dilation": 1}) if temporal else (3, {"adjacency_dims": 3})
        blocks = inputs * outputs * taps // 8 // 20
        launch = getattr(cuda.module, op)(
            arithmetic, N=128, I=inputs, T=frames, V=25, O=outputs, K=taps, bo=8, bi=1, blocks=blocks, device=device,
            product=product, **more,
        )  # fmt: skip
        assert launch.reason is None
        tile = launch.tile
        assert tile["shared_bytes"] <= SHARED_BYTES[architecture]
        made = -(-frames // stride) if temporal else frames
        assert tile["frames"] * tile["tiles"] >= made > tile["frames"] * (tile["tiles"] - 1)
        assert launch.scratch < 4 << 30
        assert tile["splits"] > 1 if product == "weight_gradient" else tile["chunks"] * tile["chunk_channels"] >= inputs
        together += 2 * (tile["shared_bytes"] + 1024) <= PER_MULTIPROCESSOR[architecture]
    assert together >= 4 or product != "forward" or op == "GraphConv"


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
    assert re.match(r"CUDA device 64 cannot be used: \w+", done.stdout), "the runtime's own reason is passed on"
