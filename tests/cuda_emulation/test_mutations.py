"""Deliberately broken kernels, each compiled from a patched source and caught by a test of this suite, named beside it.

A few run by default; SPARSE_STGCN_MUTANTS=all runs the whole list.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SUITE = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cuda"
UNITS = ("bindings.cpp", "plan.cu", "temporal_conv.cu", "weight_gradient.cu", "adjacency.cu", "outer.cu", "graph_conv.cu")
FLAGS = ["-std=c++17", "-O0", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-w", "-x", "c++"]
ENTRY = """#include "cuda/device.h"
extern "C" __attribute__((visibility("default"))) void emulate_order(int order, unsigned seed) {
    emu::order = emu::Order(order), emu::seed = seed;
}
"""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    caught_by: str  # file::test[parameters]
    units: tuple[str, ...] = ()  # that include the file; a .cu is its own
    default: bool = False


GATHER = ("temporal_conv.cu",)
GRAPH = ("graph_conv.cu",)
FORWARD = "test_temporal_conv.py::test_matches_the_reference"
BACKWARD = "test_temporal_conv_backward.py::test_matches_autograd_of_the_reference"
GROUPS = "test_groups.py::test_temporal_conv"
GRAPH_FORWARD = "test_graph_conv.py::test_matches_the_reference"
GRAPH_BACKWARD = "test_graph_conv.py::test_gradients_match_autograd_of_the_reference"

MUTANTS = [
    Mutant("no barrier before the panel is staged again", "gather_kernel.h",
           "                __syncthreads();\n                stage(", "                stage(",
           f"{FORWARD}[chunks of channels-float32]", GATHER, True),
    Mutant("no barrier after staging", "gather_kernel.h",
           "origin, channels);\n                __syncthreads();\n                if", "origin, channels);\n                if",
           f"{FORWARD}[plain 9x1-float32]", GATHER),
    Mutant("no wait for the copies", "gather_kernel.h", "cp_async_wait_all();", "", f"{FORWARD}[plain 9x1-tf32]", GATHER),
    Mutant("the row of zeros is not cleared", "gather_kernel.h", "panel[a.tile.zero_row * a.tile.pitch + i] = T{};", ";",
           f"{FORWARD}[plain 9x1-bfloat16]", GATHER),
    Mutant("the piece before a plane is not cleared", "panel.h", "if (origin >= start) return;", "return;",
           f"{FORWARD}[T odd, unaligned-float16]", GATHER),
    Mutant("the halo is one frame off", "plan.cu", "return at - a.first_frame;", "return at - a.first_frame + (at > 0);",
           f"{FORWARD}[plain 9x1-float32]"),
    Mutant("a wide store at a ragged end", "panel.h", "} else if (hi - lo == PIECE &&", "} else if (hi > lo &&",
           f"{FORWARD}[T odd, unaligned-bfloat16]", GATHER),
    Mutant("interleaved frames past the end", "panel.h", "if (frame < out.frames) to_storage", "to_storage",
           f"{BACKWARD}[stride 2, T odd-float32]", GATHER),
    Mutant("the transposed index without its permutation", "plan.cu",
           "const int j = f + i / size, block = a.perm ? a.perm[j] : j,", "const int j = f + i / size, block = j,",
           f"{BACKWARD}[plain 9x1-float32]"),
    Mutant("the mirrored tap", "plan.cu", "(phase - at) / a.phases - a.first_frame", "(phase + at) / a.phases - a.first_frame",
           f"{BACKWARD}[several tiles-tf32]"),
    Mutant("taps of another phase", "plan.cu", "(phase - at) % a.phases ? -1 : ", "",
           f"{BACKWARD}[stride 2, T odd-bfloat16]"),
    Mutant("the tail of the pixels is not cleared", "weight_gradient.cu", "if (valid < RUN)", "if (false)",
           f"{BACKWARD}[shares of several tiles-bfloat16]", (), True),
    Mutant("no barrier before the next tile", "weight_gradient.cu",
           "            __syncthreads();\n            if (GRAPH && chunk", "            if (GRAPH && chunk",
           f"{BACKWARD}[shares of several tiles-float32]"),
    Mutant("a share starts from nothing at every tile", "weight_gradient.cu", "tile == tile0, x", "true, x",
           f"{BACKWARD}[shares of several tiles-float32]"),
    Mutant("the second pass leaves out a share", "weight_gradient.cu", "s < a.shares; s +=", "s + 1 < a.shares; s +=",
           f"{BACKWARD}[several tiles-bfloat16]"),
    Mutant("the second pass reads the shares of its neighbour", "weight_gradient.cu", "from[s * step + at]",
           "from[s * step + (at ^ 1)]", f"{BACKWARD}[plain 9x1-float32]"),
    Mutant("lanes keep the halves that they give away", "weight_gradient.cu", "(upper ? sum[i + HALF] : sum[i]) + given",
           "(upper ? sum[i] : sum[i + HALF]) + given", f"{BACKWARD}[plain 9x1-float32]"),
    Mutant("the lasso is left out", "weight_gradient.cu", "if (a.masked && a.masked[i / a.block_size])", "if (false)",
           "test_temporal_conv_backward.py::test_the_lasso_term_is_added_once_to_masked_blocks[float32]"),
    Mutant("the lasso reaches kept blocks", "weight_gradient.cu", "if (a.masked && a.masked[i / a.block_size])",
           "if (a.masked)",
           "test_temporal_conv_backward.py::test_the_lasso_term_is_added_once_to_masked_blocks[bfloat16]"),
    Mutant("the group's cover forgets its second block", "plan.cu", "const int q = ((g + 1) * a.rows - 1) / a.tb;",
           "const int q = g * a.rows / a.tb;", f"{FORWARD}[(4, 1)-float32]"),
    Mutant("no barrier after the adjacency product", "gather_kernel.h",
           "frames, lead, a.x.channel);\n                    __syncthreads();", "frames, lead, a.x.channel);",
           f"{GRAPH_FORWARD}[plain-bfloat16]", GRAPH),
    Mutant("the adjacency transposed", "adjacency_panel.h", "v * a.from.from + w * a.from.to",
           "w * a.from.from + v * a.from.to",
           f"{GRAPH_FORWARD}[plain-tf32]", GRAPH),
    Mutant("every sample with the first one's adjacency", "adjacency_panel.h", "+ n * a.from.batch;", ";",
           f"{GRAPH_FORWARD}[per sample-float32]", GRAPH),
    Mutant("joints past the last are multiplied", "adjacency_panel.h", "f[i] = word_of(row[i % 2] + v, v < V, v + 1 < V);",
           "f[i] = word_of(row[i % 2] + v, true, true);", "test_graph_conv.py::test_nan_in_a_frame_stays_there[bfloat16]",
           GRAPH),
    Mutant("rows of one subset only are made", "plan.cu", "a.K + tap) * a.chunk", "a.K + 0) * a.chunk",
           f"{GRAPH_FORWARD}[plain-float32]"),
    Mutant("live rows of the transposed index without its permutation", "plan.cu",
           "tap = a.tap[a.perm ? a.perm[j] : j], channel", "tap = a.tap[j], channel",
           f"{GRAPH_BACKWARD}[few of many rows-float32]"),
    Mutant("dx with the adjacency as it is", "graph_conv.cu", "run_gather<true>(g, back,", "run_gather<true>(g, adjacency,",
           f"{GRAPH_BACKWARD}[plain-tf32]", (), True),
    Mutant("dw reads rows before they are made", "weight_gradient.cu",
           "frames, lead, a.x.channel);\n                __syncthreads();", "frames, lead, a.x.channel);",
           f"{GRAPH_BACKWARD}[plain-bfloat16]"),
    Mutant("dw keeps the adjacency of a share's first sample", "weight_gradient.cu",
           "(tile == tile0 || (a.graph.from.batch && tile % a.tile.tiles == 0))", "tile == tile0",
           f"{GRAPH_BACKWARD}[a share of several samples-float32]"),
    Mutant("the sum of dy starts from nothing at every tile", "weight_gradient.cu", "row0 * a.V, tile == tile0,",
           "row0 * a.V, true,",
           f"{BACKWARD}[shares of several tiles-float32]"),
    Mutant("the bias counts joints from the warp's first", "panel.h", "(first + i) % V", "i % V",
           f"{GRAPH_FORWARD}[plain-float16]", GRAPH),
    Mutant("every channel with the first one's adjacency", "adjacency.cu", " + c0 * m.adjacency.channel;", ";",
           f"{GRAPH_FORWARD}[per channel-float32]"),
    Mutant("dA of the first subset of rows only", "outer.cu", "for (int s = 0; s < Math::subsets(V); ++s) sum",
           "for (int s = 0; s < 1; ++s) sum", f"{GRAPH_BACKWARD}[plain-float32]"),
    Mutant("dA takes the rows of a fragment's upper half from its lower one", "outer.cu", "d[i * 4 * pitch(0) + n * 8]",
           "d[n * 8]", f"{GRAPH_BACKWARD}[plain-tf32]"),
    Mutant("rows past the last are not cleared", "outer.cu", "r < rows && v < V ?", "v < V ?",
           f"{GRAPH_BACKWARD}[plain-bfloat16]"),
    Mutant("slots of the groups before are not counted", "plan.cu", "(blocks < units ? blocks : units)",
           "(blocks < units ? 0 : units)", f"{GROUPS}[vectors at 0.05-float32-forward]", (), True),
    Mutant("a key's slots are counted in the first part only", "plan.cu", "total += count[p * keys + i];",
           "total += p ? 0 : count[p * keys + i];", f"{GROUPS}[vectors at 0.5-bfloat16-forward]"),
]  # fmt: skip


def compile_unit(folder: Path, unit: str, include: Path) -> Path:
    import pybind11

    target = folder / f"{unit}.o"
    headers = [f"-I{include}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    source = include / "cuda" / unit
    command = ["g++", *FLAGS, *headers, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean())
    assert done.returncode == 0, done.stderr
    return target


def clean() -> dict[str, str]:
    """The environment without the sanitizers that this process runs under: they are not for the compiler."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@pytest.fixture(scope="session")
def objects() -> Path:
    """The sound units, compiled once until a source changes."""
    key = hashlib.sha256(repr((FLAGS, ENTRY, sys.version)).encode())
    for file in sorted(SOURCES.iterdir()):
        key.update(file.read_bytes())
    folder = ROOT / "build" / "emulation" / f"units-{key.hexdigest()[:16]}"
    if not (folder / "complete").exists():
        for old in folder.parent.glob("units-*"):
            shutil.rmtree(old)
        (folder / "include" / "cuda").mkdir(parents=True, exist_ok=True)
        (folder / "include" / "cuda" / "entry.cpp").write_text(ENTRY)
        for file in SOURCES.iterdir():
            (folder / "include" / "cuda" / file.name).write_bytes(file.read_bytes())
        for unit in (*UNITS, "entry.cpp"):
            compile_unit(folder, unit, folder / "include")
        (folder / "complete").touch()
    return folder


def chosen() -> list[Mutant]:
    everything = os.environ.get("SPARSE_STGCN_MUTANTS") == "all"
    return [mutant for mutant in MUTANTS if mutant.default or everything]


@pytest.mark.parametrize("mutant", chosen(), ids=lambda m: m.name)
def test_a_broken_kernel_is_caught(mutant: Mutant, objects: Path, tmp_path: Path) -> None:
    include = tmp_path / "include"
    (include / "cuda").mkdir(parents=True)
    for file in SOURCES.iterdir():
        text = file.read_text()
        if file.name == mutant.file:
            assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
            text = text.replace(mutant.old, mutant.new)
        (include / "cuda" / file.name).write_text(text)
    patched = mutant.units or (mutant.file,)
    # the patched ones first: of a template that several units have, the linker takes the first
    parts = [str(compile_unit(tmp_path, unit, include)) for unit in patched]
    parts += [str(objects / f"{unit}.o") for unit in (*UNITS, "entry.cpp") if unit not in patched]
    module = tmp_path / "mutant.so"
    subprocess.run(["g++", "-shared", *parts, "-o", str(module)], check=True, env=clean())

    child = os.fork()
    if child == 0:  # everything is imported already, and a broken kernel may take the process with it
        os.environ["SPARSE_STGCN_EMULATED"] = str(module)
        with open(os.devnull, "w") as sys.stdout:
            os._exit(pytest.main(["-q", "-p", "no:cacheprovider", "--capture=no", "--tb=no", str(SUITE / mutant.caught_by)]))
    _, status = os.waitpid(child, 0)
    failed = os.WIFEXITED(status) and os.WEXITSTATUS(status) == pytest.ExitCode.TESTS_FAILED
    assert failed or os.WIFSIGNALED(status), f"{mutant.caught_by} does not catch it (status {status})"
