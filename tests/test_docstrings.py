"""The examples of docstrings run as they stand, in a directory of their own."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import sparse_stgcn

PACKAGE = Path(sparse_stgcn.__file__).parent
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("name", list(map(module_name, WITH_EXAMPLES)))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0


def test_the_main_functions_have_examples() -> None:
    for name in ("create_model", "sparsify", "save", "optimize", "Skeleton", "BlockPattern"):
        assert ">>> " in getattr(sparse_stgcn, name).__doc__, name
