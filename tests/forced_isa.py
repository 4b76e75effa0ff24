"""Checks with an instruction set forced, in a process of its own: it is chosen once, when the native module is imported."""
from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress

import pytest

from tests import apart


def run(isa: str, probe: str) -> None:
    """Run the source ``probe``, with {isa!r} in it, under SPARSE_STGCN_ISA=isa: it has to print OK, or SKIP and why."""
    said = apart.call(_execute, isa, probe.format(isa=isa))
    if said.startswith("SKIP"):
        pytest.skip(f"this processor has no {isa}: {said[5:].strip()}")
    assert said.strip() == "OK", said


def _execute(isa: str, source: str) -> str:
    os.environ["SPARSE_STGCN_ISA"] = isa
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        exec(compile(source, "probe", "exec"), {"__name__": "__main__"})
    return said.getvalue()
