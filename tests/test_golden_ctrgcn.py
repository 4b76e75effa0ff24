"""ctrgcn: values of the public PYSKL modules; see golden_harness.py."""
from __future__ import annotations

from pathlib import Path

import pytest
from golden_harness import CHECKS, Golden


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return Golden(shared, "CTRGCN")


@pytest.mark.parametrize("check", [*CHECKS, "graph_built"])
def test_golden(golden: Golden, check: str) -> None:
    golden.check(check)
