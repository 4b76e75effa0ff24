"""Checks with an instruction set forced, in a process of its own: it is chosen once, when the native module is imported."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(isa: str, probe: str) -> None:
    """Run the source ``probe``, with {isa!r} in it, under SPARSE_STGCN_ISA=isa: it has to print OK, or SKIP and why."""
    done = subprocess.run([sys.executable, "-c", probe.format(isa=isa)], env={**os.environ, "SPARSE_STGCN_ISA": isa},
                          capture_output=True, text=True, timeout=300)
    if done.stdout.startswith("SKIP"):
        pytest.skip(f"this processor has no {isa}: {done.stdout[5:].strip()}")
    assert done.returncode == 0 and done.stdout.strip() == "OK", done.stdout + done.stderr
