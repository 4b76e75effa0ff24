"""Builds the CUDA sources for the CPU and runs tests/cuda_emulation under AddressSanitizer and UBSan."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "cuda_emulation"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def sanitizer(name: str) -> str:
    """Path of a sanitizer's runtime library; skips where there is no g++ or no such library."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"needs {name}")
    return path


def build(source: Path, *flags: str) -> Path:
    """Compile one file that includes the CUDA sources; kept in build/emulation until a source changes."""
    sources = [source, *sorted((ROOT / "csrc" / "cuda").iterdir())]
    key = hashlib.sha256(repr((FLAGS, SANITIZERS, flags, sys.version)).encode())
    for file in sources:
        key.update(file.read_bytes())
    folder = ROOT / "build" / "emulation"
    target = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{source.stem}-*"):
            old.unlink()
        command = ["g++", *FLAGS, *SANITIZERS, f"-I{ROOT / 'csrc'}", *flags, str(source), "-o", f"{target}.part"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path(f"{target}.part").replace(target)
    return target


def test_the_emulator_keeps_its_promises() -> None:
    sanitizer("libasan.so")
    program = build(SUITE / "test_emulator.cpp")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") >= 20


def test_the_kernels_under_sanitizers() -> None:
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11 to build the emulated module")
    preload = f"{sanitizer('libasan.so')} {sanitizer('libubsan.so')}"
    headers = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    module = build(SUITE / "emulated.cpp", "-fPIC", "-shared", "-fvisibility=hidden", *headers)
    environment = {
        **os.environ,
        "SPARSE_STGCN_EMULATED": str(module),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    # A sanitizer writes its report to file descriptor 2 and ends the process: pytest must not hold that back.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", str(SUITE)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout, done.stdout[-2000:]
