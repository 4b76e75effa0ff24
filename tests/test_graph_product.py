"""graph_product: every subset of a graph applied to x, shared or of the samples, and the dense layers that are built on it."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_stgcn.joins import sum_over_graphs
from sparse_stgcn.kernels import _native, graph_product
from sparse_stgcn.layers import SparseConv2d
from tests.kernel_cases import STRIDES, assert_within, integers, normal, strided

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# N, I, T, V, K
CASES = {"ntu": (3, 12, 20, 25, 3), "coco": (2, 5, 9, 17, 2), "one_joint": (2, 4, 30, 1, 1), "40_joints": (2, 6, 5, 40, 2),
         "one_frame": (5, 3, 1, 25, 3), "one_channel": (1, 1, 60, 16, 3), "no_samples": (0, 4, 6, 25, 3)}


def formula(x: Tensor, adjacency: Tensor) -> Tensor:
    return torch.einsum("nitv,kvw->nkitw" if adjacency.dim() == 3 else "nitv,nkvw->nkitw", x, adjacency).flatten(1, 2)


def case(name: str, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    N, I, T, V, K = CASES[name]
    return normal(N, I, T, V, seed=1), normal(*(() if shared else (N,)), K, V, V, seed=2), normal(N, K * I, T, V, seed=3)


def run(op, x: Tensor, adjacency: Tensor, dz: Tensor, **kw) -> list[Tensor]:
    x, adjacency = x.detach().requires_grad_(), adjacency.detach().requires_grad_()
    z = op(x, adjacency, **kw)
    return [z.detach(), *torch.autograd.grad(z, (x, adjacency), dz)]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of_samples"])
@pytest.mark.parametrize("name", CASES)
def test_follows_the_formula(name: str, shared: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and _native.module is None:
        pytest.skip("the native module is not built")
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", backend)
    x, adjacency, dz = case(name, shared)
    exact = run(formula, x.double(), adjacency.double(), dz.double())
    size = run(formula, x.double().abs(), adjacency.double().abs(), dz.double().abs())
    for what, got, want, scale in zip(("z", "dx", "dA"), run(graph_product, x, adjacency, dz), exact, size, strict=True):
        assert_within(got, want, scale, what)
    for got, want in zip(run(graph_product, x.double(), adjacency.double(), dz.double()), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dz_kind", STRIDES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of_samples"])
def test_any_strides(kind: str, dz_kind: str, shared: bool) -> None:
    x, adjacency, dz = (integers(*t.shape, seed=i) for i, t in enumerate(case("ntu", shared)))
    want = run(formula, x.double(), adjacency.double(), dz.double())
    for a, b in zip(run(graph_product, strided(x, kind), adjacency, strided(dz, dz_kind)), want, strict=True):
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_entries_outside_of_the_support_count_as_zero(share: float) -> None:
    x, adjacency, dz = (t.double() for t in case("ntu", True))
    support = torch.rand(adjacency.shape, generator=torch.Generator().manual_seed(0)) < share
    got = run(graph_product, x, adjacency, dz, support=support)
    for a, b in zip(got, run(lambda x, A: formula(x, A * support), x, adjacency, dz), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@native
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of_samples"])
def test_bit_equal_over_threads(shared: bool) -> None:
    arguments, before, results = case("ntu", shared), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(graph_product, *arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, graphs, dz = case("ntu", False)
    torch.library.opcheck(torch.ops.sparse_stgcn.graph_product, (x, graphs, None, None), test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.graph_product_backward, (dz, x, graphs, None, None, True), test_utils=tests)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 3, 25, 25), (25, 25)], ids=str)
def test_bad_graphs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected x of shape"):
        graph_product(torch.zeros(4, 12, 5, 25), torch.zeros(shape))


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_graph_convolution_trains_as_it_infers(bias: bool) -> None:
    """One convolution over all subsets in training mode, one for each otherwise."""
    torch.manual_seed(0)
    conv = SparseConv2d(12, 16, subsets=3, bias=bias).double()
    x, adjacency, _ = (t.double().requires_grad_() for t in case("ntu", True))
    leaves, dy = [x, adjacency, *conv.parameters()], normal(3, 16, 20, 25, seed=9, dtype=torch.float64)
    got, want = (torch.autograd.grad(conv.train(mode).aggregate(x, adjacency), leaves, dy) for mode in (True, False))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
def test_dense_convolutions_over_graphs_are_summed(bias: bool) -> None:
    torch.manual_seed(0)
    convs = [SparseConv2d(12, 16, bias=bias).double() for _ in range(3)]
    x, graphs, _ = (t.double().requires_grad_() for t in case("ntu", False))
    leaves = [x, graphs, *(p for conv in convs for p in conv.parameters())]
    want = sum(conv(torch.einsum("nitv,nvw->nitw", x, graph)) for conv, graph in zip(convs, graphs.unbind(1), strict=True))
    dy = normal(3, 16, 20, 25, seed=9, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(sum_over_graphs(convs, x, graphs), leaves, dy), torch.autograd.grad(want, leaves, dy),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
