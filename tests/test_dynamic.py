"""kernels.dynamic: the aggregations against their formulas, and what they keep for the backward pass."""
from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from sparse_stgcn import BlockPattern
from sparse_stgcn.kernels import _native
from sparse_stgcn.kernels.ctr import ctr_aggregate, ctr_aggregate_sum
from tests import forced_isa
from tests.dynamic_cases import CASES, FORMULA, NAMES, OPS, OURS, C, K, N, R, T, X, check, ctr, draw, run, sizes
from tests.kernel_cases import BLOCKS, STRIDES, integers, normal, random_pattern

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_matches_the_formula_in_float32(op: str, case: str) -> None:
    check(op, sizes(op, **CASES[case]))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(24, 16, 1), (21, 11, 1)], ids=str)
def test_ctr_with_live_blocks(shape: tuple[int, int, int], block: tuple[int, int]) -> None:
    check("ctr", sizes("ctr", 25, channels=shape[0], rank=shape[1]), pattern=random_pattern(shape, block, 0.3))


@pytest.mark.parametrize("joints", [1, 5, 17, 25, 40])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_forward_and_backward_follow_the_formula(backend: str, op: str, joints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and _native.module is None:
        pytest.skip("the native module is not built")
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", backend)
    arguments = draw(sizes(op, joints))
    probe = normal(*sizes(op, joints)[X[op]], seed=20, dtype=torch.float64)
    for mine, theirs in zip(run(OURS[op], arguments, probe), run(FORMULA[op], arguments, probe), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str) -> None:
    assert torch.autograd.gradcheck(OURS[op], draw(sizes(op, 4)))


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
@pytest.mark.parametrize("op", OPS)
def test_any_strides_of_the_arguments_and_of_dy(op: str, kind: str, dy_kind: str) -> None:
    check(op, sizes(op, 25, frames=7), kind, dy_kind)
    check(op, sizes(op, 17, frames=4), kind, dy_kind)


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradient(op: str) -> None:
    """loss.sum() hands a gradient of stride 0."""
    arguments = draw(sizes(op, 25), torch.float32)
    ones = torch.ones(()).expand(sizes(op, 25)[X[op]])
    assert not any(ones.stride())
    for a, b in zip(run(OURS[op], arguments, ones), run(OURS[op], arguments, ones.contiguous()), strict=True):
        assert torch.equal(a, b)


@native
@pytest.mark.parametrize("joints", [1, 17, 25, 40])
@pytest.mark.parametrize("op", OPS)
def test_small_integers_are_exact(op: str, joints: int) -> None:
    """With alpha = beta = 0 the graph is A, and result, dx and dA are sums of products of integers."""
    shapes = sizes(op, joints, batch=3, channels=9, frames=14)
    arguments = [integers(*shape, seed=seed) * (shape != (1,)) for seed, shape in enumerate(shapes)]
    dy = integers(*shapes[X[op]], seed=20)
    got, want = run(OURS[op], arguments, dy), run(FORMULA[op], [a.double() for a in arguments], dy.double())
    for index in (0, 1 + X[op], -1):
        assert torch.equal(got[index].double(), want[index])


def tanh_maps(x1: Tensor, x2: Tensor) -> Tensor:
    """tanh(x1[v] - x2[w]) as ctr_aggregate makes it: unit frames, unit weights, and nothing else."""
    batch, rank, joints = x1.shape
    unit = torch.eye(joints, dtype=x1.dtype).expand(batch, rank, joints, joints)
    zero, one = torch.zeros(rank, dtype=x1.dtype), torch.ones(1, dtype=x1.dtype)
    return ctr_aggregate(x1, x2, unit, torch.eye(rank, dtype=x1.dtype), zero, one, torch.zeros(joints, joints, dtype=x1.dtype))


@native
@pytest.mark.parametrize("centre", [0.0, 100.0])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 5.0, 9.0, 15.0, 40.0, 1e3])
def test_tanh_of_differences(spread: float, centre: float) -> None:
    """Within 3 eps in float32, close together and far apart: one exp a joint and one exp a pair."""
    for joints in (17, 25, 40):
        x1, x2 = (normal(20, 8, joints, seed=seed) * spread + centre for seed in (1, 2))
        exact = torch.tanh(x1.double()[..., :, None] - x2.double()[..., None, :])
        error = (tanh_maps(x1, x2).double() - exact).abs().max().item()
        assert error <= 3 * torch.finfo(torch.float32).eps
        x1, x2 = x1.double(), x2.double()
        # torch's own tanh and the difference add 1.5 eps in float64
        assert (tanh_maps(x1, x2) - exact).abs().max().item() <= 4.5 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
def test_small_and_large_embeddings(op: str, spread: float) -> None:
    check(op, sizes(op, 25, channels=8, rank=4), spread=spread)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("joint", [0, 7, 24])
@pytest.mark.parametrize("op", OPS)
def test_nan_stays_where_it_belongs(op: str, joint: int, value: float) -> None:
    arguments = [argument.detach() for argument in draw(sizes(op, 25), torch.float32)]
    embedded = {"aa": 1, "ctr": 0, "dg": 1}[op]
    arguments[embedded][0, 1, ..., joint] = value
    got, want = OURS[op](*arguments), FORMULA[op](*arguments)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, equal_nan=True)


@native
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("op", OPS)
def test_bit_equal_over_runs_and_threads(op: str, batch: int) -> None:
    shapes = sizes(op, 25, batch=batch, channels=40, rank=9, frames=30, groups=3)
    arguments, dy = draw(shapes, torch.float32), normal(*shapes[X[op]], seed=20)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            results.append(run(OURS[op], arguments, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(["y", *NAMES[op]], results[0], other, strict=True):
            assert torch.equal(a, b), name


@native
@pytest.mark.parametrize("op", OPS)
def test_stale_workspaces_do_not_leak(op: str) -> None:
    shapes, larger = sizes(op, 25), sizes(op, 40, frames=50, channels=30, rank=12)
    arguments, dy = draw(shapes, torch.float32), normal(*shapes[X[op]], seed=20)
    clean = run(OURS[op], arguments, dy)
    run(OURS[op], [torch.full(shape, float("nan")) for shape in larger], torch.full(larger[X[op]], float("nan")))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(OURS[op], arguments, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_batch_of_zero(op: str) -> None:
    shapes = sizes(op, 25, batch=0)
    y, *gradients = run(OURS[op], draw(shapes), torch.zeros(shapes[X[op]], dtype=torch.float64))
    assert y.shape == shapes[X[op]]
    assert [gradient.shape for gradient in gradients] == [torch.Size(shape) for shape in shapes]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("op", ["ctr", "dg"])
def test_activations_are_widened_under_autocast(op: str) -> None:
    """Activations in bfloat16, parameters in float32: the float32 kernel runs on what they are, without a fallback."""
    arguments = [argument.detach().float() for argument in draw(sizes(op, 5))]
    mixed = [(a.bfloat16() if i in (0, 1, 2) else a).requires_grad_() for i, a in enumerate(arguments)]
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = OURS[op](*mixed)
    got.sum().backward()
    assert torch.equal(got, OURS[op](*[a.detach().float() for a in mixed]))
    assert all(argument.grad.dtype == argument.dtype for argument in mixed)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ctr_takes_live_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and _native.module is None:
        pytest.skip("the native module is not built")
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", backend)
    x1, x2, x3, w4, b4, alpha, A = draw(sizes("ctr", 5))
    live = torch.tensor([[[True], [False], [True]], [[False], [True], [False]]])
    pattern = BlockPattern.from_blocks(live, (C, R, 1), (2, 1))
    values = pattern.gather(w4.detach()[..., None]).requires_grad_()
    got = ctr_aggregate(x1, x2, x3, values, b4, alpha, A, pattern)
    want = ctr(x1, x2, x3, w4 * pattern.mask()[..., 0], b4, alpha, A)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got.sum().backward()
    gradient = torch.autograd.grad(want.sum(), w4)[0]
    torch.testing.assert_close(pattern.scatter(values.grad)[..., 0], gradient, atol=1e-11, rtol=1e-11)


@native
@pytest.mark.parametrize("blocks", [None, [(8, 1)] * 3, [(1, 1)] * 3, [(4, 4)] * 3, [(8, 1), (4, 4), (8, 1)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ctr_sums_over_subsets(dtype: torch.dtype, blocks: list[tuple[int, int]] | None) -> None:
    """Weights, embeddings, inputs and graphs of three subsets, against the subsets one by one."""
    shape, subsets = (21, 11, 1), 3
    embedded, wide, alpha, A = (normal(*size, seed=seed, dtype=dtype) for seed, size in enumerate(
        [(2, subsets, 2, 11, 25), (2, subsets, 21, 6, 25), (1,), (subsets, 25, 25)]))
    patterns = None if blocks is None else [random_pattern(shape, block, 0.4, seed=k) for k, block in enumerate(blocks)]
    dense = [normal(*shape, seed=10 + k, dtype=dtype) for k in range(subsets)]
    weights = [w[..., 0] for w in dense] if patterns is None else [p.gather(w) for p, w in zip(patterns, dense, strict=True)]
    biases, dy = [normal(21, seed=20 + k, dtype=dtype) for k in range(subsets)], normal(2, 21, 6, 25, seed=30, dtype=dtype)

    def together(embedded, wide, alpha, A, *small):
        return ctr_aggregate_sum(embedded, wide, small[:subsets], small[subsets:], alpha, A, patterns)

    def alone(embedded, wide, alpha, A, *small):
        return sum(ctr_aggregate(embedded[:, k, 0], embedded[:, k, 1], wide[:, k], small[k], small[subsets + k], alpha, A[k],
                                 None if patterns is None else patterns[k]) for k in range(subsets))

    arguments = [embedded, wide, alpha, A, *weights, *biases]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    for a, b in zip(run(together, arguments, dy), run(alone, arguments, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("change", "message"), [
    ({"embedded": torch.zeros(2, 3, 1, 4, 25)}, "embedded of shape"),
    ({"wide": torch.zeros(2, 2, 8, 6, 25)}, "embedded of shape"),
    ({"conv4_biases": [torch.zeros(8)]}, "of 3 subsets"), ({"A": torch.zeros(25, 25)}, "A of shape"),
    ({"conv4_patterns": [BlockPattern.full((8, 4, 1), (8, 1))] * 3}, "conv4_weight of shape"),
])
def test_bad_subsets_are_refused(change: dict, message: str) -> None:
    arguments = {"embedded": torch.zeros(2, 3, 2, 4, 25), "wide": torch.zeros(2, 3, 8, 6, 25),
                 "conv4_weights": [torch.zeros(8, 4)] * 3, "conv4_biases": [torch.zeros(8)] * 3, "alpha": torch.zeros(1),
                 "A": torch.zeros(3, 25, 25), **change}
    with pytest.raises(ValueError, match=message):
        ctr_aggregate_sum(**arguments)


def test_gradient_beyond_the_ragged_edge_is_zero() -> None:
    pattern = BlockPattern.full((5, 3, 1), (4, 4))
    arguments = [argument.detach() for argument in draw(sizes("ctr", 25, channels=5, rank=3))]
    arguments[3] = torch.ones(pattern.values_shape, dtype=torch.float64)
    gradient = run(lambda *leaves: ctr_aggregate(*leaves, pattern), arguments, torch.ones_like(arguments[2]))[4]
    inside = pattern.gather(torch.ones(5, 3, 1, dtype=torch.float64)).bool()
    assert gradient[inside].all() and not gradient[~inside].any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_stored_for_the_backward_pass(backend: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and _native.module is None:
        pytest.skip("the native module is not built")
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", backend)
    arguments, stored = draw(sizes(op, 17)), {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        OURS[op](*arguments)
    own = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    extra = sum(size for pointer, size in stored.items() if pointer not in own)
    # The arguments of the cases are joined to what the ops take; AA-GCN's graph is stored, and in the reference its tanh too.
    joined = 8 * sum(arguments[i].numel() for i in range(len(arguments)) if i != X[op])
    maps = N * 17 * 17 * 8 * (2 if backend == "reference" else 1)
    assert extra <= {"aa": joined + maps, "ctr": joined, "dg": 0}[op]


@native
@pytest.mark.parametrize("op", ["dg", "ctr", "ctr_live_blocks"])
def test_opcheck_and_fullgraph(op: str) -> None:
    name = op.split("_")[0]
    arguments = [argument.detach() for argument in draw(sizes(name, 25), torch.float32)]
    dy, extra, ours = torch.randn_like(arguments[X[name]]), (), OURS[name]
    if op == "ctr_live_blocks":
        pattern = random_pattern((C, R, 1), (2, 1), 0.5)
        arguments[3] = pattern.gather(arguments[3][..., None])
        ours = lambda *leaves: ctr_aggregate(*leaves, pattern)
    raw = arguments
    if name == "ctr":  # two subsets with the same weights
        x1, x2, x3, weight, bias, alpha, A = arguments
        raw = [torch.stack([x1, x2], 1)[:, None].repeat(1, 2, 1, 1, 1), x3[:, None].repeat(1, 2, 1, 1, 1),
               weight.flatten().repeat(2), bias.repeat(2, 1), alpha, A.repeat(2, 1, 1)]
        extra = (None, None, [0, 0], [C, R, 1], [8, 1]) if op == "ctr" else (
            pattern.row_ptr.repeat(2, 1), pattern.input.repeat(2), [pattern.num_blocks] * 2, [C, R, 1], [2, 1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.sparse_stgcn
    torch.library.opcheck(getattr(ops, f"{name}_aggregate"), (*raw, *extra), test_utils=tests)
    torch.library.opcheck(getattr(ops, f"{name}_aggregate_backward"), (dy, *raw, *extra), test_utils=tests)

    loss = lambda *leaves: ours(*leaves).relu().square().sum()
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "index", "shape", "message"), [
    ("ctr", 0, (N, R, 24), "x1 and x2 of shape"), ("ctr", 2, (C, T, 25), "x3 of shape"),
    ("ctr", 3, (C, R + 1), "conv4_weight of shape"), ("ctr", 4, (R,), "conv4_bias of shape"),
    ("ctr", 6, (1, 25, 25), "A of shape"), ("dg", 0, (N, K, T, 25), "x of shape"),
    ("dg", 1, (N, K, C, 24), "x1 and x2 of shape"), ("dg", 4, (K,), "beta to be one number"), ("dg", 5, (25, 25), "A of shape"),
])
def test_bad_arguments_are_refused(op: str, index: int, shape: tuple[int, ...], message: str) -> None:
    arguments = draw(sizes(op, 25))
    arguments[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        OURS[op](*arguments)


def test_a_pattern_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="conv4_pattern of shape"):
        ctr_aggregate(*draw(sizes("ctr", 25)), BlockPattern.full((R, C, 1), (1, 1)))


PROBE = """
from sparse_stgcn.kernels import _native
from tests import test_dynamic as d
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for op in d.OPS:
    for case in d.CASES: d.test_matches_the_formula_in_float32(op, case)
    for joints in (1, 17, 25, 40): d.test_small_integers_are_exact(op, joints)
    for kind in d.STRIDES: d.check(op, d.sizes(op, 25), kind, kind)
    for spread in (0.0, 30.0): d.test_small_and_large_embeddings(op, spread)
    d.test_nan_stays_where_it_belongs(op, 0, float("nan"))
    d.test_gradcheck(op); d.test_bit_equal_over_runs_and_threads(op, 5); d.test_stale_workspaces_do_not_leak(op)
for block in d.BLOCKS: d.test_ctr_with_live_blocks((21, 11, 1), block)
for spread in (1e-3, 1.0, 9.0, 1e3): d.test_tanh_of_differences(spread, 0.0)
print("OK")
"""


@native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    """The same checks with the instruction set forced, in a process of its own."""
    forced_isa.run(isa, PROBE)
