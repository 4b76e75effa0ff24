"""The static performance model of the GPU kernels: its arithmetic, its committed tables, and what dispatch makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from sparse_stgcn import bench
from sparse_stgcn.benchmark import gpu_model
from sparse_stgcn.benchmark.gpu_cards import CARDS, Launch, Problem
from sparse_stgcn.benchmark.gpu_cuda import Cuda
from sparse_stgcn.kernels import cuda, preference

RESULTS = Path(__file__).resolve().parent.parent / "results"
FAMILY = {"h100": "hopper", "a100": "ampere"}
H100, A100 = CARDS["h100"], CARDS["a100"]
PROBLEM = Problem("temporal_conv", "forward", "half", 128, 64, 64, 100, 25, 9, 8, 1, 0.95)


@pytest.fixture(params=list(CARDS))
def committed(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return request.param, json.loads((RESULTS / f"gpu_model_{request.param}.json").read_text())


def test_the_committed_tables_say_that_they_are_predictions(committed: tuple[str, dict]) -> None:
    name, report = committed
    assert "nothing in this table was measured" in report["basis"]
    assert "prediction" in (RESULTS / f"gpu_model_{name}.md").read_text().split("\n")[0]
    rows = gpu_model.load(report)
    assert len(rows) == 2 * report["products"] == 2 * 2 * 3 * 3 * 3 * 5 * 5
    assert report["within"] == sum(row.ratio <= 2 for row in gpu_model.dispatched(rows)) > 0


def test_dispatch_prefers_what_the_tables_predict(committed: tuple[str, dict]) -> None:
    name, report = committed
    preferred = gpu_model.preferred(gpu_model.load(report))
    assert len(preferred) == 2 * 3 * 3 * 3 * 3
    listed = {key[1:] for key in preference.TRITON if key[0] == FAMILY[name]}
    assert {key for key, backend in preferred.items() if backend == "triton"} == listed


def test_no_prediction_beats_its_floor_and_no_floor_the_dense_one(committed: tuple[str, dict]) -> None:
    for row in gpu_model.load(committed[1]):
        assert row.seconds > row.floor > 0, row
        assert row.dense >= row.floor * 0.999, row
        assert row.ratio == pytest.approx(row.seconds / row.floor, rel=1e-2)


def test_the_floor_is_bytes_or_multiply_adds() -> None:
    tensors = 2 * 128 * 64 * 100 * 25 * 2
    assert gpu_model.floor(H100, PROBLEM) == pytest.approx(tensors / 3.35e12, rel=1e-3)
    dense = gpu_model.floor(H100, replace(PROBLEM, arithmetic="float32", sparsity=0.0))
    assert dense == pytest.approx(2 * 64 * 64 * 9 * 128 * 100 * 25 / 66.9e12)
    assert gpu_model.floor(A100, PROBLEM) > gpu_model.floor(H100, PROBLEM)


def test_occupancy_follows_registers_shared_memory_and_threads() -> None:
    launch = Launch("x", 1e6, threads=256, registers=128)
    assert launch.resident(H100) == 2
    assert replace(launch, registers=255).resident(H100) == 1
    assert replace(launch, registers=32).resident(H100) == 8
    assert replace(launch, shared=100 << 10).resident(H100) == 2
    assert replace(launch, shared=100 << 10).resident(A100) == 1


def test_a_launch_takes_as_long_as_its_slowest_unit() -> None:
    copy = Launch("copy", dram=3.35e9, programs=132 * 8 * 100)
    assert copy.seconds(H100) == pytest.approx(1e-3 / 0.92 + H100.launch, rel=1e-6)
    assert copy.bound(H100) == "DRAM"
    product = replace(copy, flops=989.4e9 * 2, arithmetic="half")
    assert product.seconds(H100) == pytest.approx(2e-3 + H100.launch, rel=1e-6)
    assert replace(product, mma=True).seconds(H100) > product.seconds(H100) * 1.5
    assert replace(product, overlaps=False).seconds(H100) > product.seconds(H100)
    assert replace(copy, flying=16).seconds(H100) > copy.seconds(H100) * 10
    assert replace(copy, programs=1).seconds(H100) > copy.seconds(H100) * 50


@pytest.mark.skipif(cuda.module is None, reason=f"the CUDA module: {cuda.reason}")
@pytest.mark.parametrize("op", list(gpu_model.OPS))
@pytest.mark.parametrize("direction", gpu_model.DIRECTIONS)
def test_fewer_live_weights_never_take_longer_on_cuda(op: str, direction: str) -> None:
    times, sparser = [], []
    for sparsity in gpu_model.LEVELS:
        launches = Cuda(H100).launches(replace(PROBLEM, op=op, direction=direction, K=gpu_model.OPS[op], sparsity=sparsity))
        assert launches
        times.append(sum(launch.seconds(H100) for launch in launches))
        if (op, direction) == ("graph_conv", "dX"):  # what follows is the gradient of the adjacency, whose tensors are dense
            launches = launches[: [launch.name for launch in launches].index("gather") + 1]
        sparser.append(sum(launch.seconds(H100) for launch in launches))
    assert all(later <= earlier * 1.15 for earlier, later in pairwise(times)), times
    assert times[-1] < times[0]
    assert sparser[-1] < sparser[0] / 1.2


def test_one_row_of_triton_is_made_from_compiled_kernels() -> None:
    pytest.importorskip("triton", reason="needs triton")
    row = gpu_model.predict(A100, PROBLEM, "triton")
    assert row is not None
    assert row.seconds > row.floor
    assert row.resident >= 1


def test_the_command_writes_a_file_of_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    rows = gpu_model.load(json.loads((RESULTS / "gpu_model_h100.json").read_text()))[:20]
    monkeypatch.setattr(gpu_model, "predictions", lambda card: rows)
    assert bench.main(["--gpu-model", "h100", "--out", str(tmp_path / "model.json")]) == 0
    assert "prediction" in capsys.readouterr().out
    assert gpu_model.load(json.loads((tmp_path / "model.json").read_text())) == rows
    assert "| temporal_conv |" in (tmp_path / "model.md").read_text()
    with pytest.raises(bench.UserError, match="h100"):
        bench.main(["--gpu-model", "v100"])
    monkeypatch.setattr(gpu_model, "predictions", lambda card: [])
    with pytest.raises(bench.UserError, match="triton"):
        bench.main(["--gpu-model", "h100"])
