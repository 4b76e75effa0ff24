"""The benchmark: nothing unchecked becomes a row, and what is derived from rows is right."""
from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch

from sparse_stgcn import bench
from sparse_stgcn.benchmark import networks, prediction, suite
from sparse_stgcn.benchmark.measure import WrongResult
from sparse_stgcn.benchmark.networks import Pattern, Setting, ensemble, inference, training, warmup
from sparse_stgcn.benchmark.peers import candidate
from sparse_stgcn.benchmark.suite import Entrant
from sparse_stgcn.benchmark.table import OURS, Row, break_even, markdown, pivot
from sparse_stgcn.errors import UserError
from sparse_stgcn.kernels import _native
from sparse_stgcn.kernels import stgcn_block as stgcn


@pytest.fixture(autouse=True)
def torch_is_the_only_engine(monkeypatch):
    """The other engines bring thread pools of their own, which the tests that follow in this process need not meet."""
    monkeypatch.setitem(sys.modules, "onnx", None)


native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def row(sparsity, speedup, block="8x1", what="inference"):
    name = "torch" if sparsity is None else OURS
    return Row(what, "stgcn", name, 8, 2, sparsity, block if sparsity is not None else None,
               "uniform" if sparsity is not None else None, 1 / speedup, speedup, None, 100.0, 0.5, None, None, 1e-6)


def series(*pairs):
    return [row(*pair) for pair in pairs]


@pytest.mark.parametrize("rows, expected", [
    (series((0.0, 1.2), (0.95, 16.0)), 0.0),  # faster without a zero
    (series((0.8, 1.2), (0.95, 16.0)), 0.8),  # the lowest level is all that can be said
    (series((0.0, 0.5), (0.9, 0.8)), None),  # never
    (series((0.0, 0.5), (0.5, 1.0), (0.9, 5.0)), 0.5),  # exactly at a level
    (series((0.8, 2.0), (0.0, 0.5)), 0.8 * (2 - 1) / (2 - 0.5)),  # between levels, in any order
    ([], None),
])
def test_break_even(rows, expected):
    assert break_even(rows) == (pytest.approx(expected) if expected is not None else None)


def test_tables_show_losing_cells_and_every_pattern():
    rows = [row(None, 1.0), *series((0.0, 0.8), (0.95, 9.0)), row(0.95, 0.5, block="1x1")]
    table = pivot(rows)
    assert "0.80x" in table and "9.00x" in table and "0.50x" in table and "never" in table
    assert len(markdown(rows).splitlines()) == len(rows) + 2


def entrant(output, sparsity=None):
    x = torch.tensor([1.0, 2.0])
    return Entrant(candidate(f"e{sparsity}", lambda: output), lambda: x.double(), 10, 10, sparsity, "8x1", "uniform")


@native
@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_a_wrong_output_is_an_error_and_not_a_row(wrong):
    with pytest.raises(WrongResult, match="stgcn inference: e0.5"):
        suite.compare("inference", "stgcn", 1, 1, [entrant(torch.tensor([1.0, 2.0])), entrant(wrong, 0.5)], 2, 1e-3)


@native
def test_rows_of_a_comparison():
    right = torch.tensor([1.0, 2.0])
    rows = suite.compare("inference", "stgcn", 1, 1, [entrant(right), entrant(right, 0.0), entrant(right, 0.5)], 3, 1e-6)
    assert [r.sparsity for r in rows] == [None, 0.0, 0.5]
    assert rows[0].own is None and rows[1].own == 1 and rows[1].speedup > 0
    assert all(0 < r.fma < 1 and r.error == 0 for r in rows)


@native
@pytest.mark.parametrize("backbone", ["stgcn", *(pytest.param(name, marks=pytest.mark.slow)
                                                 for name in ("aagcn", "ctrgcn", "dgstgcn"))])
def test_networks_small(backbone):
    setting = Setting(backbone, batch=2, threads=1, persons=1, frames=16, classes=5, width=16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        patterns = [Pattern(0.0), Pattern(0.95), Pattern(0.95, density="erk")]
        rows = inference(setting, patterns, rounds=1, compile=False)
        steps = training(setting, patterns[1:2], rounds=1, compile=False, memory=False)
        dense = warmup(setting, patterns[1], rounds=1, compile=False)
        together = ensemble(setting, [Pattern(0.0), Pattern(0.8), Pattern(0.95)], rounds=1, compile=False)
    finally:
        torch.set_num_threads(before)
    assert {"torch", "torch channels_last", OURS} <= {r.name for r in rows}
    assert [r.density for r in rows if r.name == OURS] == ["uniform", "uniform", "erk"]
    assert {r.what for r in steps + dense} == {"training step", "warm-up step"}
    assert {r.what for r in together} == {"ensemble of 2"}
    assert [r.sparsity for r in together if r.name == OURS] == [pytest.approx(1 - 0.25, abs=0.02)]


@native
def test_a_step_whose_backward_pass_is_wrong_is_an_error_and_not_a_row(monkeypatch):
    """The classifier's gradient depends on the forward pass alone: it is right in all of these."""
    setting = Setting("stgcn", batch=2, threads=1, persons=1, frames=16, classes=5, width=16)
    step = partial(training, setting, [Pattern(0.95)], rounds=1, compile=False, memory=False)
    dense = partial(warmup, setting, Pattern(0.95), rounds=1, compile=False)
    backward, penalty = stgcn._Block.backward, networks._penalty

    def weaker(ctx, *given):
        of_x, *others = backward(ctx, *given)
        return None if of_x is None else 0.8 * of_x, *others

    with monkeypatch.context() as patch:
        patch.setattr(stgcn._Block, "backward", staticmethod(weaker))
        with pytest.raises(WrongResult, match=r"training step: ours 0.95 8x1 uniform, input norm: relative error"):
            step()
    scaled = lambda own, by: lambda: by * own()
    for factor in (0.0, 0.5):
        monkeypatch.setattr(networks, "_penalty", lambda model, by=factor: scaled(penalty(model), by))
        with pytest.raises(WrongResult, match=r"warm-up step: ours 0.95 8x1 uniform, block 0: relative error"):
            dense()


@native
def test_a_gradient_that_rounding_decides_is_held_to_what_torch_reaches():
    """At this width many channels of a sparse DG-STGCN hardly vary, and PyTorch's step is further off float64 than THROUGH."""
    setting = Setting("dgstgcn", batch=2, threads=1, persons=1, frames=16, classes=5, width=16)
    model = networks.sparse_network(setting.network(), Pattern(0.95))
    expected = networks._expected(model, setting.example(), torch.arange(2))
    assert expected.tolerance > networks.THROUGH
    assert list(expected.outputs) == ["classifier", "input norm", *(f"block {number}" for number in range(10))]
    wide = networks._expected(setting.network(), setting.example(), torch.arange(2))
    assert wide.tolerance == networks.THROUGH


@native
def test_command_writes_after_every_setting(tmp_path, capsys):
    out = tmp_path / "new" / "ops.json"
    bench.main(["--what", "ops", "--blocks", "8x1", "--levels", "0.95", "--batches", "1", "--persons", "1", "--frames", "8",
                "--threads", "1", "--rounds", "1", "--out", str(out)])
    rows = [Row(**r) for r in json.loads(out.read_text())["rows"]]
    assert {r.what for r in rows} == {"temporal_conv forward", "temporal_conv dX", "temporal_conv dW", "graph_conv forward"}
    assert out.with_suffix(".md").read_text().strip() in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--what", "everything"], "--what"), (["--levels", "1.0"], "--levels"), (["--blocks", "8by1"], "--blocks"),
    (["--batches", "0"], "--batches"), (["--backbones", "resnet"], "--backbones"), (["--rounds", "0"], "--rounds"),
    (["--what", "ops", "inference", "--density", "erk"], "uniform, the only one of --what ops. Got erk"),
    (["--what", "ensemble", "warmup", "--density", "erk"], "uniform, the only one of --what ensemble warmup"),
    (["--what", "ensemble", "--levels", "0"], "one above 0, as --what ensemble"),
    (["--what", "warmup", "training", "--levels", "0"], "one above 0, as --what warmup")])
def test_bad_flags(flags, message, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        bench.main(flags)


@pytest.mark.parametrize(("density", "blocks"), [
    (("uniform", "erk"), ["8x1 uniform", "1x1 uniform", "8x1 erk"]),
    (("erk", "uniform"), ["8x1 uniform", "1x1 uniform", "8x1 erk"]), (("erk",), ["8x1 erk", "1x1 erk"])])
def test_every_block_is_timed_whatever_the_order_of_the_densities(density, blocks):
    config = bench.BenchConfig(what=("inference",), levels=(0.5,), blocks=("8x1", "1x1"), density=density)
    config.validate()
    assert [f"{p.block} {p.density}" for p in config.patterns()] == blocks


@native
def test_growth_of_the_cost(tmp_path):
    from sparse_stgcn.benchmark import scaling

    rows = scaling.network(Setting("stgcn", 1, 1, 1, 16, classes=5, width=8), Pattern(0.5), rounds=1)
    assert [(r.axis, r.size) for r in rows] == [(a, s) for a, first in (("N", 4), ("M", 1), ("T", 4)) for s in
                                                (first, 4 * first, 16 * first)]
    assert all(r.proportional == 1 for r in rows[::3]) and all(r.seconds > 0 for r in rows)
    dense = scaling.live_blocks(1, rounds=1, channels=16, frames=8, samples=2)
    assert dense[-1].size == 1 and dense[0].floor > 0 and len(scaling.markdown(dense).splitlines()) == len(dense) + 2


@native
def test_the_calls_that_a_ratio_is_of_stand_beside_it(monkeypatch):
    """Calls in a row and calls in turn with another engine differ: the median of one does not belong to the other's ratio."""
    def engines(model, clip, threads, compile):
        yield candidate("ONNX Runtime", lambda: model(clip).detach())

    monkeypatch.setattr(prediction, "dense_engines", engines)
    call = prediction.latency(Setting("stgcn", 1, 1, persons=1, frames=16, classes=4, width=8), calls=5, rounds=1)
    assert call.dense / call.turn == pytest.approx(call.ratio) and call.turn != call.median
    old = {key: value for key, value in asdict(call).items() if key != "turn"}
    for shown, cell in ((call, f"| {1e3 * call.turn:.2f} |"), (prediction.Latency(**old), "|  |")):
        table = prediction.markdown(prediction.Waits([shown], prediction.Start(1.0, 0.5, 0.25, 2.0, 1.75), []))
        head, line = table.splitlines()[0], table.splitlines()[2]
        assert head.count("|") == line.count("|") and f"{cell} {1e3 * call.dense:.1f} | {call.ratio:.1f} |" in line


@native
def test_what_a_user_waits_for_is_measured():
    setting = Setting("stgcn", 1, 1, persons=1, frames=16, classes=4, width=16)
    call = prediction.latency(setting, calls=20, rounds=2)
    assert 0 < call.median <= call.p99 and call.dense is None  # no ONNX here, see above
    rows = prediction.streams(setting, frames=40)
    assert [row.chunk for row in rows] == [1, 4, 16] and all(row.error <= 1e-5 and row.rate > 0 for row in rows)
    waits = prediction.Waits([call], prediction.Start(1.0, 0.5, 0.25, 2.0, 1.75), rows)
    table = prediction.markdown(waits)
    assert "| seconds | 1.00 | 0.50 | 0.25 | 2.00 | 1.75 |" in table and table.count("| stgcn 0.95 |") == 3
