"""Builds the two native modules with ninja: `_native` (CPU, always) and `_cuda` (where nvcc is found).

Neither needs torch, a GPU or a driver to be compiled or imported. Environment: CXX, MAX_JOBS, CUDA_HOME,
SPARSE_STGCN_CUDA (0: leave the CUDA part out; 1: fail if it cannot be built; unset: build it when nvcc is found, and go
on without it when that fails), TORCH_CUDA_ARCH_LIST (default "8.0;9.0;10.0+PTX": code for 8.0 runs on 8.6, 8.7 and 8.9 as it
is, so that theirs would only cost time to build; PTX serves what comes after 10.0).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0;10.0+PTX"
# Fused multiply-adds are part of the kernels' arithmetic, so they are asked for by name.
CXX_FLAGS = ["-std=c++17", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DNDEBUG"]


class BuildError(RuntimeError):
    """A module could not be built; the text says why in one line."""


def cuda_compiler() -> str:
    """Path of nvcc, or BuildError with the reason why the CUDA part is left out."""
    if os.environ.get("SPARSE_STGCN_CUDA") == "0":
        raise BuildError("left out by SPARSE_STGCN_CUDA=0 when the package was installed")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return found
    raise BuildError("nvcc was not found (on PATH or in CUDA_HOME) when the package was installed")


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode flags of TORCH_CUDA_ARCH_LIST, or of those default architectures that this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    names = [name for name in re.split(r"[;,\s]+", (wanted or ARCHITECTURES).lower()) if name]
    numbers = [re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+ptx)?", name) for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None:
            raise BuildError(f"Expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX'. Got '{name}' in it")
    pairs = [(m[1] + m[2] + m[3], bool(m[4])) for m in numbers if m]
    if not wanted:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        pairs = [(arch, ptx) for arch, ptx in pairs if f"compute_{arch}" in known]
        if not pairs:
            raise BuildError(f"{nvcc} knows none of the architectures {ARCHITECTURES}")
        pairs[-1] = (pairs[-1][0], True)
    flags = []
    for arch, ptx in pairs:
        code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
        flags.append(f"-gencode=arch=compute_{arch},code={code}")
    return flags


def ninja_path(path: str | Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def ninja_command(*words: str) -> str:
    """A shell command with ninja's own $in and $out left in place."""
    return " ".join(word if word.startswith("$") else shlex.quote(word).replace("$", "$$") for word in words)


class NinjaBuild(build_ext):
    """Compiles in parallel and only what changed, headers included; a failing CUDA part is noted and left out."""

    cuda_note = ""

    def build_extensions(self) -> None:
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            self.write_rules(folder)
            complete, log = run_ninja(folder)
            native, log_of_native = (True, log) if complete else run_ninja(folder, "_native.so")
        if not complete:
            if not native:
                raise BuildError(f"The CPU kernels do not compile.\n{log_of_native}")
            first = next((line.strip() for line in log.splitlines() if "error" in line.lower()), "see the log")
            self.cuda_note = f"nvcc failed when the package was installed: {first}"
        if self.cuda_note and os.environ.get("SPARSE_STGCN_CUDA") == "1":
            raise BuildError(f"SPARSE_STGCN_CUDA=1 asks for the CUDA kernels, but {self.cuda_note}\n{log}")
        if self.cuda_note:
            print(f"sparse_stgcn: built without the CUDA kernels: {self.cuda_note}", file=sys.stderr)
            self.extensions = [e for e in self.extensions if not e.name.endswith("._cuda")]
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{extension.name.rpartition('.')[2]}.so", target)
        self.write_note(Path(self.build_lib) / "sparse_stgcn")

    def write_rules(self, folder: Path) -> None:
        lines = ["ninja_required_version = 1.5"]
        lines += self.native_rules(folder)
        try:
            lines += self.cuda_rules(folder, cuda_compiler())
        except BuildError as error:
            self.cuda_note = str(error)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")

    def copy_extensions_to_source(self) -> None:
        for stale in (ROOT / "sparse_stgcn").glob("_cuda.*.so"):
            stale.unlink()
        super().copy_extensions_to_source()
        self.write_note(ROOT / "sparse_stgcn")

    def write_note(self, package: Path) -> None:
        """What sparse_stgcn.kernels.backends() tells of a missing CUDA part."""
        package.mkdir(parents=True, exist_ok=True)
        (package / "_cuda_build.txt").write_text((self.cuda_note or "built") + "\n")

    def native_rules(self, folder: Path) -> list[str]:
        cxx = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
        mac = sys.platform == "darwin"
        link = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared", "-s"]
        flags = [*CXX_FLAGS, *self.include_flags(folder)]
        compile_ = ninja_command(*cxx, *flags, "$level", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out")
        link_ = ninja_command(*cxx, *link, "$in", "-o", "$out")
        lines = ["rule cxx", f"  command = {compile_}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {link_}"]
        sources = [*sorted((ROOT / "csrc").glob("bindings*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        return lines + self.module_rules("_native", "link", sources, folder)

    def cuda_rules(self, folder: Path, nvcc: str) -> list[str]:
        kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        if not kernels:
            raise BuildError("this source tree has no csrc/cuda")
        host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
        flags = [*NVCC_FLAGS, *host, *architecture_flags(nvcc), f"-I{ROOT / 'csrc'}"]
        compile_ = ninja_command(nvcc, *flags, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out")
        link_ = ninja_command(
            nvcc, *host, "-shared", "-nodlink", "-cudart=static", "-Xlinker=--exclude-libs,ALL,-s", "$in", "-o", "$out"
        )
        lines = ["rule nvcc", f"  command = {compile_}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule nvlink", f"  command = {link_}"]
        sources = [ROOT / "csrc" / "cuda" / "bindings.cpp", *kernels]
        return lines + self.module_rules("_cuda", "nvlink", sources, folder)

    def include_flags(self, folder: Path) -> list[str]:
        # pip has pybind11 at another place at every call, and to ninja another command is another object: minutes of compiling
        headers = folder / f"pybind11-{pybind11.__version__}"
        shutil.copytree(pybind11.get_include(), headers, dirs_exist_ok=True)
        return [f"-I{ROOT / 'csrc'}", f"-isystem{headers}", f"-isystem{sysconfig.get_path('include')}"]

    def module_rules(self, name: str, link: str, sources: list[Path], folder: Path) -> list[str]:
        lines, objects = [], []
        for source in sources:
            out = f"{name}/{source.relative_to(ROOT / 'csrc')}.o"
            (folder / out).parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {out}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {ninja_path(source)}")
            if source.suffix == ".cpp":
                lines.append(f"  level = {self.level_of(source)}")
            objects.append(out)
        lines.append(f"build {name}.so: {link} {' '.join(objects)}")
        return lines

    def level_of(self, source: Path) -> str:
        """-O3; less where nothing is gained but minutes: calls from Python, and the vectors of processors before AVX2."""
        old = source.name == "baseline.cpp" and self.plat_name.endswith(("x86_64", "amd64"))
        return "-O2" if old or source.name.startswith("bindings") else "-O3"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two installations of one checkout write the same objects: the second waits, and finds them made."""
    with (folder / "lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_ninja(folder: Path, *targets: str) -> tuple[bool, str]:
    """Build the targets (all without one), going on after a failure; whether it succeeded, and the log."""
    try:
        from ninja import BIN_DIR

        ninja = str(Path(BIN_DIR) / "ninja")
    except ImportError:
        ninja = "ninja"
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [ninja, "-C", str(folder), "-k", "0", *jobs, *targets]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    return done.returncode == 0, done.stdout


setup(
    ext_modules=[
        Extension("sparse_stgcn._native", sources=["csrc/bindings.cpp"]),
        Extension("sparse_stgcn._cuda", sources=["csrc/cuda/bindings.cpp"]),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
