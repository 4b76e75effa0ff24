"""README says what is so: its tables are those of the committed results, and its example runs."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparse_stgcn.benchmark.table import Row, pivot

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bench_networks", "bench_training", "bench_ops"])
def test_tables_are_those_of_the_results(name):
    marked = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert marked, f"README has no table marked {name}"
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert marked[1].strip() == pivot([Row(**row) for row in result["rows"]])
    assert all(row["error"] < 1e-3 for row in result["rows"])


def test_example_runs():
    code = re.search(r"## Six lines\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("torch.randn(8, 2, 100", "torch.randn(1, 2, 16"), names)
    assert names["logits"].shape == (1, 60)


def test_commands_named_in_it_exist():
    from sparse_stgcn.cli import VERBS

    verbs = set(re.findall(r"python -m sparse_stgcn\.(\w+)", README))
    assert {"train", "evaluate"} <= verbs <= set(VERBS)
