"""kernels.ctr_unit against the two ops that it stands for, and in CTR-GCN's unit."""
from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparse_stgcn import BlockPattern, compact, create_model, sparsify
from sparse_stgcn.backbones import ctrgcn
from sparse_stgcn.kernels import _native
from sparse_stgcn.kernels import ctr_unit as module
from sparse_stgcn.kernels.ctr_unit import ctr_unit
from sparse_stgcn.kernels.dispatch import forced_backend
from tests import unit_cases
from tests.kernel_cases import STRIDES, integers, normal, random_pattern, strided
from tests.unit_cases import trains_alike

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (N, K, C, R, I, T, V), the block, and the share that lives
CASES = {
    "ntu": ((3, 3, 16, 8, 8, 7, 25), (8, 1), 0.4),
    "rows_over_groups": ((2, 2, 6, 4, 5, 9, 5), (4, 1), 0.5),
    "single": ((2, 3, 8, 8, 16, 5, 17), (1, 1), 0.25),
    "square": ((2, 3, 32, 16, 16, 6, 25), (16, 16), 0.6),
    "one_pixel": ((1, 1, 11, 3, 7, 1, 1), (8, 1), 0.5),
    "more_samples_than_ranges": ((19, 2, 8, 4, 8, 3, 4), (8, 1), 0.5),
    "no_sample": ((0, 3, 8, 8, 8, 4, 25), (8, 1), 0.5),
    "nothing_lives": ((2, 3, 8, 8, 8, 4, 25), (8, 1), 0.0),
}


def arguments(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous", live4: bool = True, make=normal
              ) -> tuple[list[Tensor], BlockPattern, list[BlockPattern] | None]:
    (batch, subsets, channels, rank, inputs, frames, joints), block, density = CASES[case]
    draw = lambda seed, *shape: make(*shape, seed=seed).to(dtype)
    pattern = random_pattern((subsets * channels, inputs, 1), block, density)
    patterns = [random_pattern((channels, rank, 1), block, 0.5, seed=k) for k in range(subsets)] if live4 else None
    dense = [draw(10 + k, channels, rank, 1) for k in range(subsets)]
    return [strided(draw(1, batch, inputs, frames, joints), kind), draw(2, batch, subsets, 2, rank, joints),
            pattern.gather(draw(3, *pattern.shape)), draw(4, subsets * channels), draw(5, 1),
            draw(6, subsets, joints, joints),
            *(w[..., 0] if patterns is None else p.gather(w) for w, p in zip(dense, patterns or dense, strict=True)),
            *(draw(20 + k, channels) for k in range(subsets))], pattern, patterns


def run(given: list[Tensor], pattern: BlockPattern, patterns: list[BlockPattern] | None, dy: Tensor, bias: bool = True
        ) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    x, embedded, values, b, alpha, A, *rest = leaves
    half = len(rest) // 2
    y = ctr_unit(embedded, x, values, pattern, b if bias else None, rest[:half], rest[half:], alpha, A, patterns)
    wanted = [leaf for leaf in leaves if bias or leaf is not leaves[3]]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def gradient(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous", make=normal) -> Tensor:
    (batch, _, channels, _, _, frames, joints), *_ = CASES[case]
    return strided(make(batch, channels, frames, joints, seed=40).to(dtype), kind)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("live4", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, live4: bool, bias: bool) -> None:
    unit_cases.against_the_reference(sys.modules[__name__], case, live4=live4, bias=bias)


@native
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["ntu", "rows_over_groups", "single", "square"])
def test_channels_without_gradient(case: str, kind: str) -> None:
    """They send nothing, whole groups of eight of them as well as single ones."""
    given, *patterns = arguments(case)
    dy = gradient(case, kind=kind)
    dy[:, ::2] = 0
    dy[0, :8] = 0
    got = run(given, *patterns, dy)
    with forced_backend("reference"):
        for a, e in zip(got, run(given, *patterns, dy), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12 * max(1.0, float(e.abs().max())))


@native
@pytest.mark.parametrize("case", ["ntu", "single", "square"])
def test_small_integers_are_exact(case: str) -> None:
    """With alpha = 0 the graph is A, and y, dx, dW3, db3 and dA are sums of products of small integers."""
    given, *patterns = arguments(case, torch.float32, make=integers)
    given[4] = torch.zeros(1)
    dy = gradient(case, torch.float32, make=integers)
    got = run(given, *patterns, dy)
    with forced_backend("reference"):
        want = run([tensor.double() for tensor in given], *patterns, dy.double())
    for index in (0, 1, 3, 4, 6):
        assert torch.equal(got[index].double(), want[index]), index


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
def test_any_strides(kind: str, dy_kind: str) -> None:
    unit_cases.any_strides(sys.modules[__name__], "ntu", kind, dy_kind)


def test_gradcheck() -> None:
    given, pattern, patterns = arguments("rows_over_groups")
    leaves = [tensor.detach().requires_grad_() for tensor in given]

    def op(x, embedded, values, b, alpha, A, *rest):
        return ctr_unit(embedded, x, values, pattern, b, rest[:2], rest[2:], alpha, A, patterns)

    assert torch.autograd.gradcheck(op, leaves)


@native
@pytest.mark.parametrize("case", ["ntu", "one_pixel", "more_samples_than_ranges"])
def test_bit_equal_over_runs_and_threads(case: str) -> None:
    unit_cases.bit_equal_over_threads(sys.modules[__name__], case)


@native
def test_stale_workspaces_do_not_leak() -> None:
    given, *patterns = arguments("ntu", torch.float32)
    dy, (larger, *others) = gradient("ntu", torch.float32), arguments("square", torch.float32)
    clean = run(given, *patterns, dy)
    run([torch.full_like(tensor, float("nan")) for tensor in larger], *others, gradient("square", torch.float32) * float("nan"))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(given, *patterns, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_gradient_beyond_the_ragged_edge_is_zero() -> None:
    given, pattern, patterns = arguments("one_pixel")
    given[2] = torch.ones_like(given[2])
    dvalues = run(given, pattern, patterns, gradient("one_pixel"))[3]
    inside = pattern.gather(torch.ones(pattern.shape, dtype=torch.float64)).bool()
    assert dvalues[inside].all() and not dvalues[~inside].any()


@native
def test_nothing_but_the_arguments_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    (given, pattern, patterns), stored = arguments("ntu", torch.float32), []
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    x, embedded, values, b, alpha, A, *rest = leaves
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        ctr_unit(embedded, x, values, pattern, b, rest[:3], rest[3:], alpha, A, patterns)
    assert max(tensor.numel() for tensor in stored) == x.numel()  # x3 would be six times as large


@native
def test_opcheck_and_fullgraph() -> None:
    given, pattern, patterns = arguments("ntu", torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in given]

    def loss(x, embedded, values, b, alpha, A, *rest):
        return ctr_unit(embedded, x, values, pattern, b, rest[:3], rest[3:], alpha, A, patterns).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)
    x, embedded, values, b, alpha, A, *rest = given
    raw = (embedded, x, values, b, torch.cat([w.flatten() for w in rest[:3]]), torch.stack(rest[3:]), alpha, A,
           torch.stack([p.row_ptr for p in patterns]), torch.cat([p.input for p in patterns]), pattern.row_ptr, pattern.input,
           pattern.tap, [p.num_blocks for p in patterns], [16, 8, 1], [8, 1], list(pattern.shape), [8, 1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.ctr_unit, raw, test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.ctr_unit_backward, (gradient("ntu", torch.float32), *raw), test_utils=tests)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(2, 5, 6, 25)}, ValueError, "x of shape"),
    ({"embedded": torch.zeros(2, 3, 1, 4, 25)}, ValueError, "embedded of shape"),
    ({"embedded": torch.zeros(2, 5, 2, 4, 25)}, ValueError, r"pattern of shape \(K C, I, 1\)"),
    ({"pattern": BlockPattern.full((24, 8, 3))}, ValueError, r"pattern of shape \(K C, I, 1\)"),
    ({"bias": torch.zeros(8)}, ValueError, "bias of shape"),
    ({"values": torch.zeros(24, 1, 8, dtype=torch.float64)}, TypeError, "values to have the dtype of x"),
    ({"conv4_biases": [torch.zeros(8)]}, ValueError, "of 3 subsets"),
])
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    given = {"embedded": torch.zeros(2, 3, 2, 4, 25), "x": torch.zeros(2, 8, 6, 25), "values": torch.zeros(24, 1, 8),
             "pattern": BlockPattern.full((24, 8, 1)), "bias": torch.zeros(24), "conv4_weights": [torch.zeros(8, 4)] * 3,
             "conv4_biases": [torch.zeros(8)] * 3, "alpha": torch.zeros(1), "A": torch.zeros(3, 25, 25), **change}
    with pytest.raises(error, match=message):
        ctr_unit(**given)


@native
@pytest.mark.parametrize(("block", "level", "calls"), [((8, 1), 0.6, 1), ((1, 1), 0.9, 1), ((1, 1), 0.6, 0), ((4, 4), 0.8, 1)])
def test_the_unit_takes_it_in_training(block: tuple[int, int], level: float, calls: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = compact(sparsify(create_model("ctrgcn", 5, base_channels=16, num_person=1), level, block)).double().train()
    block_of_net = model.backbone.net[1]
    unit, x, made = getattr(block_of_net, block_of_net.names[0]), normal(2, 16, 6, 25, seed=1).double(), []
    real = torch.ops.sparse_stgcn.ctr_unit
    monkeypatch.setattr(module, "_ops", SimpleNamespace(ctr_unit=lambda *a: made.append(1) or real(*a),
                                                        ctr_unit_backward=torch.ops.sparse_stgcn.ctr_unit_backward))
    trains_alike(unit, x, "convs.1.conv3", ctrgcn, made, calls, monkeypatch)


@native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    unit_cases.on_an_instruction_set(isa, "test_ctr_unit")
