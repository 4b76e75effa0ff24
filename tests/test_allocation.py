"""allocation: budgets, sensitivities, rules, the latency table and the front."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparse_stgcn import checkpoint, create_model
from sparse_stgcn.allocation.budget import Budget
from sparse_stgcn.allocation.costs import HEADER, Costs
from sparse_stgcn.allocation.front import Point, front, to_csv
from sparse_stgcn.allocation.latency import LatencyClass, LatencyTable, measure, measure_network
from sparse_stgcn.allocation.rules import shares
from sparse_stgcn.allocation.search import Allocator
from sparse_stgcn.allocation.sensitivity import sensitivity
from sparse_stgcn.errors import UserError
from sparse_stgcn.kernels import _native
from sparse_stgcn.sparsity import compact, mask_layers, maskable_convs, sparsify, summary

BLOCK = "4x1"


def allocator(latency: bool = False) -> Allocator:
    model = tiny.model()
    layers = mask_layers(model, BLOCK)
    table = None
    if latency:  # each layer costs as many microseconds as it has weights, the first one nothing
        table = LatencyTable(1e-3, tuple(LatencyClass((layer.name,), (layer.grid[0] / layer.num_blocks, 1.0),
                                                      (0.0, 1e-6 * layer.num_weights * (i > 0)))
                                         for i, layer in enumerate(layers)))
    return Allocator.of(Costs.of(model, layers, 8, 1, {"label_names": ["a"]}, table))


def need(costs: Costs) -> dict[str, float]:
    rng = np.random.default_rng(0)
    return {layer.name: float(value) for layer, value in zip(costs.layers, rng.lognormal(0, 2, len(costs.layers)), strict=True)}


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kind", "value"), [
    ("500kB", "bytes", 5e5), ("0.5 MB", "bytes", 5e5), ("1KiB", "bytes", 1024), ("2ms", "seconds", 2e-3),
    ("250us", "seconds", 2.5e-4), ("5%", "weights", 0.05), ("1 point", "points", 0.01), ("1.5 points", "points", 0.015)])
def test_a_budget_is_read(text: str, kind: str, value: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.text) == (kind, text)
    assert budget.value == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "kB", "5 parsec", "-1ms", "0%", "100%", "100 points", "5 %%", "nan ms", "1 2ms"])
def test_a_bad_budget_names_the_flag(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        Budget.parse(text)


@pytest.mark.parametrize("rule", ["uniform", "erk", "weights", "mixed", "latency"])
@pytest.mark.parametrize("text", ["5%", "1%", "30%", "15kB", "45kB", "2ms", "10ms"])
def test_budgets_are_used_up_and_not_overrun(rule: str, text: str) -> None:
    given_to, budget = allocator(latency=True), Budget.parse(text)
    costs = given_to.costs
    share = shares(costs, need(costs))[rule]
    if budget.value < given_to.cost(budget.kind, given_to.lowest):
        with pytest.raises(UserError, match="--budget to leave at least"):
            given_to.within(share, budget)
        return
    counts = given_to.within(share, budget)
    blocks = np.array([layer.num_blocks for layer in costs.layers])
    assert (counts >= given_to.lowest).all()
    assert (counts <= blocks).all()
    spent, largest = given_to.cost(budget.kind, counts), max(layer.block_weights for layer in costs.layers)
    if budget.kind == "weights":
        assert abs(spent - budget.value) * costs.maskable <= largest / 2 + 1e-6
    else:
        one = {"bytes": 4 * largest, "seconds": 1e-6 * largest}[budget.kind]
        assert budget.value - 2 * one <= spent <= budget.value


def test_a_budget_that_buys_the_dense_network_is_an_error() -> None:
    with pytest.raises(UserError, match="--sparsity 0"):
        allocator().within(np.ones(22), Budget.parse("5MB"))


def test_predicted_bytes_are_those_of_the_file(tmp_path: object) -> None:
    model, meta = tiny.model(), {"label_names": ["a"]}
    costs = allocator().costs
    for sparsity in (0.5, 0.9):
        sparse = compact(sparsify(copy.deepcopy(model), sparsity, BLOCK, density="erk"))
        for name, buffer in sparse.named_buffers():
            if "running" in name:  # as after training; equal ones would be stored once
                buffer.normal_()
        counts = np.array([conv.pattern.blocks().sum() for conv in maskable_convs(sparse).values()])
        sparse.mask_recipe = None  # measured densities follow from no seed
        size = checkpoint.save(sparse, f"{tmp_path}/m.safetensors", **meta)
        assert checkpoint.size(sparse, **meta) == size
        assert size <= costs.bytes(counts) <= size + HEADER + 64
        assert costs.weights(counts) == summary(sparse).kept


# ---- sensitivity and rules -------------------------------------------------------------------------------------------


def test_sensitivity_is_the_squared_change_of_each_block() -> None:
    model, (train, _) = tiny.model(), tiny.datasets()
    layers = mask_layers(model, BLOCK)
    batches = [train.batch([0, 1, 2, 3])[:2], train.batch([4, 5, 6, 7])[:2]]
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, layers, batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer, conv = layers[5], maskable_convs(model)[layers[5].name]
    expected = 0.0
    for keypoint, label in batches:
        model.load_state_dict(before)
        model.train().zero_grad()
        F.cross_entropy(model(keypoint), label).backward()
        change = (conv.weight_oik() * conv.as_oik(conv.weight.grad)).detach().double()
        out, inputs, taps = change.shape
        blocks = change.reshape(out // 4, 4, inputs, taps).sum(1)
        expected += 0.5 * 4 * float(blocks.square().sum()) / len(batches)
    assert found[layer.name] == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_rule_for_weights_is_the_minimum(seed: int) -> None:
    costs, rng = COSTS, np.random.default_rng(seed)
    s = need(costs)
    d, sizes = shares(costs, s)["weights"], np.array([layer.num_weights for layer in costs.layers])
    move = rng.normal(size=len(d)) * d * 0.1
    other = d + move - sizes * (sizes @ move) / (sizes @ sizes)  # the same number of weights
    if (other > 0).all():
        values = np.array(list(s.values()))
        assert (values / d).sum() <= (values / other).sum() * (1 + 1e-12)


COSTS = allocator().costs


def test_a_layer_without_influence_has_a_share_all_the_same() -> None:
    s = need(COSTS) | {COSTS.layers[3].name: 0.0}
    for share in shares(COSTS, s).values():
        assert (share > 0).all()
        assert np.isfinite(share).all()


# ---- latency ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(_native.module is None, reason="optimised inference needs the native module")
def test_predicted_latencies_follow_the_measured_ones(one_thread: None) -> None:
    torch.manual_seed(0)
    model = create_model("stgcn", 5, layout=tiny.SKELETON, base_channels=32)
    sittings = []
    while len(sittings) < 3:  # other work on the machine may spoil a sitting, but not what is true of all of them
        table = measure(model, "8x1", 32, 1, rounds=3)
        assert LatencyTable.from_dict(table.to_dict()) == table
        assert sorted(name for kind in table.classes for name in kind.layers) == sorted(maskable_convs(model))
        predicted, measured = [], []
        for sparsity in (0.98, 0.5):
            sparse = compact(sparsify(copy.deepcopy(model), sparsity, "8x1"))
            predicted.append(table.predict({layer.name: layer.kept / layer.total for layer in summary(sparse).layers}))
            measured.append(measure_network(sparse, 32, 1, rounds=7))
        # The dense half takes several times as long; other work may double any figure, the best of some less.
        sittings.append((predicted, measured))
        if predicted[1] > 1.5 * predicted[0] and 1 / 4 < (predicted[1] / predicted[0]) / (measured[1] / measured[0]) < 4:
            return
    pytest.fail(f"Expected predicted seconds to follow the measured ones in one of three sittings. Got {sittings}.")


def test_prediction_interpolates_and_adds() -> None:
    table = LatencyTable(1.0, (LatencyClass(("a", "b"), (0.1, 0.5, 1.0), (0.0, 0.4, 0.9)), LatencyClass(("c",), (0.2, 1.0),
                                                                                                        (0.0, 2.0))))
    assert table.predict({"a": 0.3, "b": 0.75, "c": 0.2}) == pytest.approx(1 + 0.2 + 0.65)
    assert table.predict({"a": 0.1, "b": 0.05, "c": 1.0}) == pytest.approx(3)
    assert table.slopes() == pytest.approx({"a": 1.0, "b": 1.0, "c": 2.5})


# ---- front -----------------------------------------------------------------------------------------------------------

numbers = st.sampled_from([1.0, 2.0, 3.0, 4.0])


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_nothing_beats(values: list[tuple[float, float, float]], timed: bool) -> None:
    points = [Point("r", kept, 0, work, work if timed else None, damage) for kept, work, damage in values]
    best = front(points)
    assert best
    for point in points:
        beaten = any(all(a <= b for a, b in zip(other.costs(), point.costs(), strict=True)) and other.costs() != point.costs()
                     for other in points)
        assert (point in best) != beaten
    assert to_csv(points).count("True") == len(best)
