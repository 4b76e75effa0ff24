"""README and docs say what is so: their tables are those of the committed results, and README's example runs."""
from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "results" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results(tables):
    shown = set()
    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        shown |= {match[2] for match in tables.MARKED.finditer(text)}
        assert tables.render(text) == text, f"{page} is behind its results: python results/tables.py"
    assert shown == set(tables.TABLES)


def test_a_table_of_wrong_outputs_is_refused(tables, monkeypatch):
    row = {**tables.read("bench_ops")["rows"][0], "error": float("nan")}
    monkeypatch.setattr(tables, "read", lambda name: {"rows": [row]})
    with pytest.raises(ValueError, match="Expected rows whose error is below"):
        tables.rows("bench_ops")


def test_example_runs():
    code = re.search(r"## Six lines\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("torch.randn(8, 2, 100", "torch.randn(1, 2, 16"), names)
    assert names["logits"].shape == (1, 60)


def test_commands_named_in_it_exist():
    from sparse_stgcn.cli import VERBS

    verbs = set(re.findall(r"python -m sparse_stgcn\.(\w+)", README))
    assert {"train", "evaluate"} <= verbs <= set(VERBS)
