"""The speed table of a card, made on a CPU: every engine is checked before it is timed, and the file names the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_stgcn.benchmark import gpu_speed
from sparse_stgcn.benchmark.gpu_speed import Product
from sparse_stgcn.benchmark.measure import WrongResult
from sparse_stgcn.benchmark.networks import Pattern
from sparse_stgcn.kernels import _native

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
PATTERN = Pattern(0.8, "8x1")


RUNS = [("forward", "tf32"), ("dX", "float32"), ("dX", "half"), ("dW", "float32")]


@pytest.mark.parametrize("op", ["temporal_conv", "graph_conv"])
@pytest.mark.parametrize(("direction", "arithmetic"), RUNS)
def test_every_engine_is_checked_and_timed(op: str, direction: str, arithmetic: str, tmp_path: Path) -> None:
    rows = gpu_speed.measure(Product(op, direction, arithmetic, 16, 6, 2), [PATTERN], "cpu", rounds=1)
    assert [row.engine for row in rows] == ["torch", "torch channels_last", "torch.compile", "sparse_stgcn (native)"]
    assert all(row.seconds > 0 and row.error <= gpu_speed.TOLERANCE[arithmetic] for row in rows)
    assert max(row.speedup for row in rows if row.sparsity is None) == 1
    gpu_speed.write(tmp_path / "bench.json", "cpu", rows)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["card"] == "cpu" and len(written["rows"]) == 4
    assert f"{op} {direction} {arithmetic}" in (tmp_path / "bench.md").read_text()


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "temporal_conv", lambda x, values, pattern: 1.01 * x)
    with pytest.raises(WrongResult):
        gpu_speed.measure(Product("temporal_conv", "forward", "float32", 16, 6, 2), [PATTERN], "cpu", rounds=1)


def test_predictions_stand_beside_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "card_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_speed.gpu_model, "predict", lambda card, problem, backend: type("P", (), {"seconds": card.dram})())
    rows = gpu_speed.measure(Product("temporal_conv", "forward", "float32", 16, 6, 2), [PATTERN], "cpu", rounds=1)
    assert [row.predicted for row in rows] == [None, None, None, 3.35e12]


def test_the_card_gets_every_product() -> None:
    assert len(gpu_speed.products()) == len(set(gpu_speed.products())) == 2 * 3 * 3 * 3
