from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern, Lasso, Support, _native, graph_conv, reference
from tests.kernel_cases import BLOCKS, STRIDES, assert_rounded_once, assert_within, integers, normal, random_pattern, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (O, I, K), T, V, share of non-zero adjacency entries
CASES = {
    "sparse": ((16, 12, 3), 20, 25, 0.08),
    "dense_adjacency": ((16, 12, 3), 7, 25, 1.0),
    "no_adjacency": ((16, 12, 3), 7, 25, 0.0),
    "ragged": ((21, 11, 3), 9, 18, 0.1),
    "one_subset": ((8, 3, 1), 6, 17, 0.2),
    "one_joint": ((8, 4, 2), 30, 1, 1.0),
    "sixteen_joints": ((8, 4, 2), 5, 16, 0.3),
    "32_joints": ((8, 4, 2), 5, 32, 0.1),
    "more_joints_than_two_registers": ((8, 4, 2), 5, 40, 0.1),
    "one_frame": ((16, 12, 3), 1, 25, 0.1),
}


def graph(K, V, share, seed=5, dtype=torch.float64):
    where = torch.rand(K, V, V, generator=torch.Generator().manual_seed(seed)) < share
    return normal(K, V, V, seed=seed, dtype=dtype) * where


def run(op, x, values, pattern, adjacency, bias, dy, **kw):
    x, values, adjacency, bias = (t.detach().requires_grad_() for t in (x, values, adjacency, bias))
    y = op(x, values, pattern, adjacency, bias, **kw)
    return y.detach(), *torch.autograd.grad(y, (x, values, adjacency, bias), dy)


def check(shape, T, V, share, block, x_kind="contiguous", dy_kind="contiguous", N=2):
    p = random_pattern(shape, block, 0.3)
    O, I, K = shape
    A, bias = graph(K, V, share).float(), normal(K, O, seed=2)
    x, dy, values = normal(N, I, T, V, seed=1), normal(N, O, T, V, seed=4), p.gather(normal(*shape, seed=3))
    support = A != 0
    got = run(graph_conv, strided(x, x_kind), values, p, A, bias, strided(dy, dy_kind), support=support)
    double = [t.double() for t in (x, values, A, bias, dy)]
    exact = run(reference.graph_conv, *double[:2], p, *double[2:])
    size = run(reference.graph_conv, *(t.abs() for t in double[:2]), p, *(t.abs() for t in double[2:]))
    for name, a, e, m in zip(("y", "dx", "dvalues", "dA", "dbias"), got, exact, size, strict=True):
        if name == "dA":
            assert not a[~support].any(), "entries outside of the support get gradient 0"
            e = e * support
        assert_within(a, e, m, name)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, block):
    check(*CASES[case], block)


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("case", ["sparse", "ragged"])
def test_bfloat16_is_summed_in_float32(case, block):
    shape, T, V, share = CASES[case]
    O, I, K = shape
    p, A = random_pattern(shape, block, 0.3), graph(K, V, share).bfloat16()
    x, values, bias, dy = (t.bfloat16() for t in (normal(2, I, T, V, seed=1), p.gather(normal(*shape, seed=3)),
                                                  normal(K, O, seed=2), normal(2, O, T, V, seed=4)))
    got = run(graph_conv, strided(x, "slice"), values, p, A, bias, strided(dy, "channels_last"), support=A != 0)
    double = [t.double() for t in (x, values, A, bias, dy)]
    exact = run(reference.graph_conv, *double[:2], p, *double[2:])
    size = run(reference.graph_conv, *(t.abs() for t in double[:2]), p, *(t.abs() for t in double[2:]))
    for name, a, e, m in zip(("y", "dx", "dvalues", "dA", "dbias"), got, exact, size, strict=True):
        assert_rounded_once(a, e * (A != 0) if name == "dA" else e, m, name)


@pytest.mark.parametrize("x_kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
def test_any_strides_of_x_and_dy(x_kind, dy_kind):
    check(*CASES["sparse"], (8, 1), x_kind, dy_kind)


@pytest.mark.parametrize("block", [(8, 1), (1, 1), (4, 4)], ids=str)
def test_small_integers_are_exact(block):
    p = random_pattern((16, 12, 3), block, 0.4)
    x, values, dy = integers(3, 12, 11, 25, seed=1), p.gather(integers(16, 12, 3, seed=3)), integers(3, 16, 11, 25, seed=4)
    A, bias = integers(3, 25, 25, seed=5, low=-1, high=2), integers(3, 16, seed=2)
    double = [t.double() for t in (x, values, A, bias, dy)]
    want = run(reference.graph_conv, *double[:2], p, *double[2:])
    for a, b in zip(run(graph_conv, x, values, p, A, bias, dy), want, strict=True):
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize("block", [(3, 2), (1, 1), (8, 1)], ids=str)
def test_gradcheck(block):
    p = random_pattern((5, 4, 2), block, 0.6)
    inside = p.gather(torch.ones(5, 4, 2, dtype=torch.float64))
    inputs = [normal(2, 4, 3, 4, seed=1), p.gather(normal(5, 4, 2, seed=2)), graph(2, 4, 1.0), normal(2, 5, seed=3)]
    assert torch.autograd.gradcheck(lambda x, w, a, b: graph_conv(x, w * inside, p, a, b),
                                    [t.double().requires_grad_() for t in inputs])


def test_trainable_adjacency_gets_the_gradient_of_its_zeros():
    """Without a support, an entry that is 0 by chance must still be able to move."""
    p = BlockPattern.full((8, 4, 2), (8, 1))
    A = graph(2, 25, 0.1).requires_grad_()
    gradient, = torch.autograd.grad(graph_conv(normal(2, 4, 6, 25, seed=1, dtype=torch.float64),
                                               p.gather(normal(8, 4, 2, seed=2, dtype=torch.float64)), p, A).square().sum(), A)
    assert (gradient != 0).all()


def test_support_is_rebuilt_when_it_changes():
    p, x = BlockPattern.full((8, 4, 2), (8, 1)), normal(2, 4, 6, 25, seed=1)
    values, A = p.gather(normal(8, 4, 2, seed=2)), graph(2, 25, 1.0, dtype=torch.float32)
    support = torch.zeros(2, 25, 25, dtype=torch.bool)
    assert not graph_conv(x, values, p, A, support=support).any()
    support[:] = True
    torch.testing.assert_close(graph_conv(x, values, p, A, support=support), reference.graph_conv(x, values, p, A))


def test_a_graph_per_channel_runs_on_the_reference():
    p, x = random_pattern((16, 12, 3), (8, 1), 0.3), normal(2, 12, 9, 25, seed=1)
    values, A = p.gather(normal(16, 12, 3, seed=3)), normal(2, 3, 16, 25, 25, seed=5)
    hidden = torch.einsum("oik,nitv->nkotv", p.scatter(values), x)
    want = torch.stack([sum(hidden[n, k] @ A[n, k] for k in range(3)) for n in range(2)])
    torch.testing.assert_close(graph_conv(x, values, p, A), want, rtol=1e-4, atol=1e-4)


def test_bit_equal_over_runs_and_threads():
    p = random_pattern((64, 64, 3), (8, 1), 0.1)
    x, dy, values = normal(5, 64, 100, 25, seed=1), normal(5, 64, 100, 25, seed=4), p.gather(normal(64, 64, 3, seed=3))
    A, bias = graph(3, 25, 0.05).float(), normal(3, 64, seed=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(graph_conv, x, values, p, A, bias, dy, support=A != 0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(("y", "dx", "dvalues", "dA", "dbias"), results[0], other, strict=True):
            assert torch.equal(a, b), name


def test_stale_workspaces_do_not_leak():
    p = random_pattern((16, 12, 3), (8, 1), 0.3)
    values, bias, dy = p.gather(normal(16, 12, 3, seed=3)), normal(3, 16, seed=2), normal(2, 16, 5, 25, seed=4)
    A = graph(3, 25, 0.1).float()
    clean = run(graph_conv, normal(2, 12, 5, 25, seed=1), values, p, A, bias, dy, support=A != 0)
    run(graph_conv, torch.full((2, 12, 40, 25), float("nan")), values, p, A, bias, torch.full((2, 16, 40, 25), float("nan")))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(graph_conv, normal(2, 12, 5, 25, seed=1), values, p, A, bias, dy, support=A != 0)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, again, strict=True):
        assert torch.equal(a, b)


def test_long_clips_are_tiled():
    check((8, 16, 3), 1501, 25, 0.1, (8, 1), N=1)


def test_lasso_is_fused_into_dw():
    kept, full = random_pattern((16, 12, 3), (8, 1), 0.3), BlockPattern.full((16, 12, 3), (8, 1))
    weight, x = normal(16, 12, 3, seed=1, dtype=torch.float64), normal(2, 12, 10, 25, seed=2, dtype=torch.float64)
    dy, A, scale = normal(2, 16, 10, 25, seed=3, dtype=torch.float64), graph(3, 25, 0.1), torch.tensor(0.7, dtype=torch.float64)
    masked, values = ~kept.blocks().permute(0, 2, 1).reshape(-1), full.gather(weight).requires_grad_()
    plain, = torch.autograd.grad(graph_conv(x, values, full, A), values, dy)
    fused, = torch.autograd.grad(graph_conv(x, values, full, A, lasso=Lasso(masked, scale)), values, dy)
    torch.testing.assert_close(full.scatter(fused), full.scatter(plain) + scale * weight * ~kept.mask(), rtol=1e-14, atol=1e-14)


def test_batch_of_zero():
    p = random_pattern((16, 12, 3), (8, 1), 0.3)
    y, dx, dvalues, dA, dbias = run(graph_conv, torch.zeros(0, 12, 10, 25), p.gather(torch.ones(16, 12, 3)), p,
                                    torch.ones(3, 25, 25), torch.ones(3, 16), torch.zeros(0, 16, 10, 25))
    assert y.shape == (0, 16, 10, 25) and dx.shape == (0, 12, 10, 25)
    assert not dvalues.any() and not dA.any() and not dbias.any()


def test_opcheck_and_fullgraph():
    p, A = random_pattern((16, 12, 3), (8, 1), 0.3), graph(3, 25, 0.1).float()
    x, values, bias = normal(2, 12, 10, 25, seed=1), p.gather(normal(16, 12, 3, seed=3)), normal(16, 25, seed=2)
    support = Support.of(A != 0)
    coefficients, dy = A.reshape(-1)[support.flat], normal(2, 16, 10, 25, seed=5)
    tail = (support.ptr, support.source, p.row_ptr, p.input, p.tap, list(p.shape), list(p.block))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.graph_conv, (x, values, coefficients, bias, *tail), test_utils=tests)
    operands = (x, dy, values, coefficients)
    torch.library.opcheck(torch.ops.sparse_stgcn.graph_conv_dx, (*operands, *tail, True), test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.graph_conv_dw, (*operands, None, None, *tail), test_utils=tests)

    def loss(x, values, A):
        return graph_conv(x, values, p, A, support=support).relu().square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, values, A)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(2, 11, 10, 25)}, ValueError, "x of shape"),
    ({"adjacency": torch.zeros(3, 24, 24)}, ValueError, "adjacency of shape"),
    ({"adjacency": torch.zeros(3, 25, 25, dtype=torch.float64)}, TypeError, "dtype of x"),
    ({"bias": torch.zeros(16)}, ValueError, "bias of shape"),
    ({"support": torch.ones(3, 25, 25)}, ValueError, "support to be a bool tensor"),
    ({"adjacency": torch.zeros(3, 25, 25, device="meta")}, ValueError, "adjacency on the device of x, cpu. Got meta; use .to"),
    ({"offset": torch.zeros(16, device="meta")}, ValueError, "offset on the device of x, cpu. Got meta; use .to"),
    ({"support": torch.ones(3, 25, 25, dtype=torch.bool, device="meta")}, ValueError,
     "support on the device of adjacency, cpu. Got meta; use .to"),
], ids=["x", "adjacency", "dtype", "bias", "support", "adjacency's device", "offset's device", "support's device"])
def test_bad_arguments_are_refused(change, error, message):
    p = BlockPattern.full((16, 12, 3))
    arguments = {"x": torch.zeros(2, 12, 10, 25), "values": torch.zeros(p.values_shape), "pattern": p,
                 "adjacency": torch.zeros(3, 25, 25), **change}
    with pytest.raises(error, match=message):
        graph_conv(**arguments)


def test_what_is_kept_in_inference_mode_serves_training_later():
    live = torch.rand(2, 4, 3) < 0.9
    x, A = normal(2, 4, 6, 25, seed=1), graph(3, 25, 0.2).float()
    support = A != 0
    with torch.inference_mode():
        p = BlockPattern.from_blocks(live, (16, 4, 3), (8, 1))
        values = p.gather(normal(16, 4, 3, seed=2)).clone()
        before, _ = graph_conv(x, values, p, A, support=support), (p.mask(), p.rows)
    values = p.gather(normal(16, 4, 3, seed=2)).requires_grad_()
    after = graph_conv(x, values, p, A.requires_grad_(), support=support)
    assert torch.equal(before, after.detach())
    assert all(g.any() for g in torch.autograd.grad(after.sum(), (values, A)))
