"""graph_conv with a graph of its own for every sample, and the layer of AA-GCN that is built on it."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_stgcn.joins import sum_over_graphs
from sparse_stgcn.kernels import BlockPattern, Lasso, _native, graph_conv, reference, reference_dynamic
from sparse_stgcn.kernels.dynamic import aa_graph
from sparse_stgcn.layers import SparseConv2d
from tests import forced_isa
from tests.kernel_cases import BLOCKS, STRIDES, assert_rounded_once, assert_within, integers, normal, random_pattern, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (O, I, K), N, T, V
CASES = {
    "sparse": ((16, 12, 3), 3, 20, 25), "ragged": ((21, 11, 3), 2, 9, 18), "one_subset": ((8, 3, 1), 2, 6, 17),
    "one_joint": ((8, 4, 2), 2, 30, 1), "sixteen_joints": ((8, 4, 2), 2, 5, 16), "40_joints": ((8, 4, 2), 2, 5, 40),
    "one_frame": ((16, 12, 3), 5, 1, 25), "long": ((8, 16, 3), 1, 601, 25),
}
NAMES = ("y", "dx", "dvalues", "dA", "dbias", "doffset")


def run(op, x, values, pattern, adjacency, bias, offset, dy, **kw):
    x, values, adjacency, bias, offset = (t.detach().requires_grad_() for t in (x, values, adjacency, bias, offset))
    y = op(x, values, pattern, adjacency, bias, offset=offset, **kw)
    return y.detach(), *torch.autograd.grad(y, (x, values, adjacency, bias, offset), dy)


def defined(x: Tensor, values: Tensor, pattern: BlockPattern, adjacency: Tensor, bias: Tensor, offset: Tensor) -> Tensor:
    return reference.graph_conv(x, values, pattern, adjacency, bias) + offset[:, None, None]


def case(shape, N, T, V, block):
    O, I, K = shape
    p = random_pattern(shape, block, 0.3)
    return p, [normal(N, I, T, V, seed=1), p.gather(normal(*shape, seed=3)), normal(N, K, V, V, seed=5), normal(K, O, seed=2),
               normal(O, seed=6), normal(N, O, T, V, seed=4)]


def check(shape, N, T, V, block, x_kind="contiguous", dy_kind="contiguous"):
    p, (x, values, A, bias, offset, dy) = case(shape, N, T, V, block)
    got = run(graph_conv, strided(x, x_kind), values, p, A, bias, offset, strided(dy, dy_kind))
    double = [t.double() for t in (x, values, A, bias, offset, dy)]
    exact = run(defined, *double[:2], p, *double[2:])
    size = run(defined, *(t.abs() for t in double[:2]), p, *(t.abs() for t in double[2:]))
    for name, a, e, m in zip(NAMES, got, exact, size, strict=True):
        assert_within(a, e, m, name)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, block):
    check(*CASES[name], block)


@pytest.mark.parametrize("x_kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
def test_any_strides_of_x_and_dy(x_kind, dy_kind):
    check(*CASES["sparse"], (8, 1), x_kind, dy_kind)


@pytest.mark.parametrize("block", [(8, 1), (1, 1), (4, 4)], ids=str)
def test_small_integers_are_exact(block):
    p = random_pattern((16, 12, 3), block, 0.4)
    arguments = [integers(3, 12, 11, 25, seed=1), p.gather(integers(16, 12, 3, seed=3)), integers(3, 3, 25, 25, seed=5),
                 integers(3, 16, seed=2), integers(16, seed=6), integers(3, 16, 11, 25, seed=4)]
    double = [t.double() for t in arguments]
    want = run(defined, *double[:2], p, *double[2:])
    for a, b in zip(run(graph_conv, *arguments[:2], p, *arguments[2:]), want, strict=True):
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize("block", [(3, 2), (1, 1), (8, 1)], ids=str)
def test_gradcheck(block):
    p = random_pattern((5, 4, 2), block, 0.6)
    inside = p.gather(torch.ones(5, 4, 2, dtype=torch.float64))
    inputs = [normal(2, 4, 3, 4, seed=1), p.gather(normal(5, 4, 2, seed=2)), normal(2, 2, 4, 4, seed=5), normal(2, 5, seed=3),
              normal(5, seed=6)]
    assert torch.autograd.gradcheck(lambda x, w, a, b, c: graph_conv(x, w * inside, p, a, b, offset=c),
                                    [t.double().requires_grad_() for t in inputs])


def test_bfloat16_is_summed_in_float32():
    p, arguments = case(*CASES["ragged"], (8, 1))
    x, values, A, bias, offset, dy = (t.bfloat16() for t in arguments)
    got = run(graph_conv, x, values, p, A, torch.zeros_like(bias), offset, dy)
    double = [t.double() for t in (x, values, A, torch.zeros_like(bias), offset, dy)]
    exact = run(defined, *double[:2], p, *double[2:])
    size = run(defined, *(t.abs() for t in double[:2]), p, *(t.abs() for t in double[2:]))
    for name, a, e, m in zip(NAMES, got, exact, size, strict=True):
        if name != "dbias":
            assert_rounded_once(a, e, m, name)


def test_bit_equal_over_runs_and_threads():
    p, arguments = case((64, 64, 3), 5, 100, 25, (8, 1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(graph_conv, *arguments[:2], p, *arguments[2:])[:4])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=False):
            assert torch.equal(a, b), name


def test_stale_workspaces_do_not_leak():
    p, arguments = case(*CASES["sparse"], (8, 1))
    clean = run(graph_conv, *arguments[:2], p, *arguments[2:])
    large = [torch.full_like(t, float("nan")) for t in case((16, 12, 3), 3, 60, 25, (8, 1))[1]]
    run(graph_conv, *large[:2], p, *large[2:])
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(graph_conv, *arguments[:2], p, *arguments[2:])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, again, strict=True):
        assert torch.equal(a, b)


def test_nan_of_a_sample_stays_there():
    p, (x, values, A, *_) = case(*CASES["sparse"], (8, 1))
    clean = graph_conv(x, values, p, A)
    x[1] = float("nan")
    got = graph_conv(x, values, p, A)
    assert got[1, 8:].isnan().all() and torch.equal(got[[0, 2]], clean[[0, 2]])


def test_lasso_is_fused_into_dw():
    kept, full = random_pattern((16, 12, 3), (8, 1), 0.3), BlockPattern.full((16, 12, 3), (8, 1))
    weight, x = normal(16, 12, 3, seed=1, dtype=torch.float64), normal(2, 12, 10, 25, seed=2, dtype=torch.float64)
    dy, A = normal(2, 16, 10, 25, seed=3, dtype=torch.float64), normal(2, 3, 25, 25, seed=5, dtype=torch.float64)
    scale, masked = torch.tensor(0.7, dtype=torch.float64), ~kept.blocks().permute(0, 2, 1).reshape(-1)
    values = full.gather(weight).requires_grad_()
    plain, = torch.autograd.grad(graph_conv(x, values, full, A), values, dy)
    fused, = torch.autograd.grad(graph_conv(x, values, full, A, lasso=Lasso(masked, scale)), values, dy)
    torch.testing.assert_close(full.scatter(fused), full.scatter(plain) + scale * weight * ~kept.mask(), rtol=1e-14, atol=1e-14)


def test_batch_of_zero():
    p = random_pattern((16, 12, 3), (8, 1), 0.3)
    y, dx, dvalues, dA, dbias, doffset = run(graph_conv, torch.zeros(0, 12, 10, 25), p.gather(torch.ones(16, 12, 3)), p,
                                             torch.ones(0, 3, 25, 25), torch.ones(3, 16), torch.ones(16),
                                             torch.zeros(0, 16, 10, 25))
    assert y.shape == (0, 16, 10, 25) and dx.shape == (0, 12, 10, 25) and dA.shape == (0, 3, 25, 25)
    assert not dvalues.any() and not dbias.any() and not doffset.any()


def test_opcheck():
    p, (x, values, A, _, offset, dy) = case(*CASES["sparse"], (8, 1))
    tail = (p.row_ptr, p.input, p.tap, list(p.shape), list(p.block))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.sparse_stgcn
    of_joints = offset[:, None].expand(16, 25)
    torch.library.opcheck(ops.sample_graph_conv, (x, values, A, of_joints, *tail), test_utils=tests)
    torch.library.opcheck(ops.sample_graph_conv_dx, (x, dy, values, A, *tail, True), test_utils=tests)
    torch.library.opcheck(ops.sample_graph_conv_dw, (x, dy, values, A, None, None, *tail), test_utils=tests)
    embedded, alpha, graph = normal(2, 2, 3, 4, 5, 25, seed=1), normal(1, seed=2), normal(3, 25, 25, seed=3)
    torch.library.opcheck(ops.aa_graph, (embedded, alpha, graph), test_utils=tests)
    torch.library.opcheck(ops.aa_graph_backward, (normal(2, 3, 25, 25, seed=4), embedded, alpha, graph), test_utils=tests)


@pytest.mark.parametrize("change", [{"adjacency": torch.zeros(3, 3, 25, 25)}, {"adjacency": torch.zeros(2, 2, 25, 25)},
                                    {"offset": torch.zeros(12)}], ids=["samples", "subsets", "offset"])
def test_bad_arguments_are_refused(change):
    p = BlockPattern.full((16, 12, 3))
    arguments = {"x": torch.zeros(2, 12, 10, 25), "values": torch.zeros(p.values_shape), "pattern": p,
                 "adjacency": torch.zeros(2, 3, 25, 25), **change}
    with pytest.raises(ValueError, match="Expected (adjacency|offset) of shape"):
        graph_conv(**arguments)


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("joints", [1, 17, 25, 40])
def test_graphs_follow_their_formula(joints, kind):
    embedded, alpha, A = normal(2, 2 * 3 * 4, 6, joints, seed=1), normal(1, seed=2), normal(3, joints, joints, seed=3)
    dy = normal(2, 3, joints, joints, seed=4)
    results = []
    for op, dtype in ((aa_graph, torch.float32), (aa_graph, torch.float64), (reference_dynamic.aa_graph, torch.float64)):
        e, scale, graph = (t.to(dtype).requires_grad_() for t in (strided(embedded, kind).detach(), alpha, A))
        y = op(e.unflatten(1, (2, 3, 4)), scale, graph)
        results.append([y, *torch.autograd.grad(y, (e, scale, graph), dy.to(dtype))])
    for single, double, want in zip(*results, strict=True):
        torch.testing.assert_close(double, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("argument", "shape"), [("embedded", (2, 3, 4, 6, 25)), ("embedded", (2, 1, 3, 4, 6, 25)),
                                                 ("A", (3, 25, 24)), ("alpha", (3,))], ids=str)
def test_bad_arguments_of_graphs_are_refused(argument, shape):
    arguments = {"embedded": torch.zeros(2, 2, 3, 4, 6, 25), "alpha": torch.zeros(1), "A": torch.zeros(3, 25, 25),
                 argument: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"Expected {argument}"):
        aa_graph(**arguments)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [[(8, 1)] * 3, [(8, 1), (4, 1), (8, 1)]], ids=["one_block", "two_blocks"])
def test_convolutions_over_graphs_are_summed(blocks, bias):
    """As one op where the blocks agree; with the gradients of the parameters of each."""
    torch.manual_seed(0)
    convs = [SparseConv2d(12, 16, bias=bias).double() for _ in range(3)]
    for seed, (conv, block) in enumerate(zip(convs, blocks, strict=True)):
        conv.attach(random_pattern((16, 12, 1), block, 0.4, seed=seed))
        conv.compact()
    x, graphs, dy = (normal(*size, seed=seed, dtype=torch.float64).requires_grad_()
                     for seed, size in enumerate([(2, 12, 7, 25), (2, 3, 25, 25), (2, 16, 7, 25)]))
    leaves = [x, graphs, *(parameter for conv in convs for parameter in conv.parameters())]
    want = sum(conv(torch.einsum("nitv,nvw->nitw", x, graph)) for conv, graph in zip(convs, graphs.unbind(1), strict=True))
    for a, b in zip(torch.autograd.grad(sum_over_graphs(convs, x, graphs), leaves, dy), torch.autograd.grad(want, leaves, dy),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


PROBE = """
from sparse_stgcn.kernels import _native
from tests import test_sample_graph_conv as d
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for name in d.CASES:
    for block in ((8, 1), (1, 1), (3, 5)): d.test_matches_the_reference(name, block)
for joints in (1, 17, 25, 40): d.test_graphs_follow_their_formula(joints, "slice")
d.test_small_integers_are_exact((8, 1)); d.test_bit_equal_over_runs_and_threads(); d.test_stale_workspaces_do_not_leak()
print("OK")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    """The same checks with the instruction set forced, in a process of its own."""
    forced_isa.run(isa, PROBE)
