"""The denominators of the benchmark: plausible, and refused for senseless arguments."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparse_stgcn.benchmark import measure
from sparse_stgcn.benchmark.measure import Candidate, paired
from sparse_stgcn.kernels import _native

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def test_fma_peak_is_what_one_core_can_do():
    """At least a multiply-add of 4 lanes per two cycles of 1 GHz, at most two of 16 lanes per cycle of 6 GHz."""
    assert 4 < _native.module.fma_peak(0.02) < 2 * 16 * 2 * 6.0 + 1


def test_copy_bandwidth_is_plausible_in_cache_and_memory():
    for size in (1 << 14, 1 << 25):
        assert 0.1 < _native.module.copy_bandwidth(size, 0.02) < 2000


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: m.fma_peak(0.0), "seconds"), (lambda m: m.fma_peak(float("nan")), "seconds"),
    (lambda m: m.copy_bandwidth(0, 0.1), "bytes"), (lambda m: m.copy_bandwidth(1024, -1.0), "seconds"),
])
def test_senseless_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(_native.module)


def test_runs_that_settle_are_not_timed_and_precede_each_that_is(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(sleep=lambda _: None, perf_counter=lambda: clock[0]))

    def candidate(name):
        def run():
            order.append(name)
            clock[0] += 100 if order.count(name) % 2 else 1  # the first of two is slow

        return Candidate(name, run, lambda: torch.zeros(1))

    timings = paired([candidate("a"), candidate("b")], rounds=2, warmup=0, settle=1)
    assert "".join(order) == "aabbbbaa"  # every round begins with another one
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": [1, 1], "b": [1, 1]}
