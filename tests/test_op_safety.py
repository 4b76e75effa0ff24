"""What the public ops do with what they were not made for: a clear error, or the right result; never other memory."""
from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparse_stgcn import compact, create_model, optimize, sparsify
from sparse_stgcn.kernels import (
    BlockPattern,
    Lasso,
    Support,
    _native,
    append_mean,
    attend,
    graph_conv,
    graph_product,
    group_lasso,
    max_pool,
    norm,
    reference,
    share,
    split,
    temporal_conv,
)
from sparse_stgcn.kernels.aa_unit import aa_unit_graph
from sparse_stgcn.kernels.again import again
from sparse_stgcn.kernels.ctr import ctr_aggregate_sum
from sparse_stgcn.kernels.ctr_unit import ctr_unit
from sparse_stgcn.kernels.dispatch import forced_backend
from sparse_stgcn.kernels.dynamic import aa_graph, dg_aggregate
from sparse_stgcn.kernels.prepared import FixedGraphConv, WindowConv
from sparse_stgcn.kernels.stgcn_block import Normed, stgcn_block
from tests.kernel_cases import normal as drawn

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return drawn(*shape, seed=seed)


PATTERN = BlockPattern.full((8, 4, 3), (8, 1))
VALUES = PATTERN.gather(normal(8, 4, 3, seed=1))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_that_fails_is_an_error_on_any_number_of_threads(threads: int) -> None:
    x, y = normal(2, 4, 16, 25), torch.zeros(2, 8, 16, 25)
    too_far = 10**12  # frames: no memory holds that panel
    with pytest.raises(MemoryError):
        _native.module.temporal_forward(
            0, [2, 16, 16, 25, 1, too_far], _native.sizes(PATTERN.shape, PATTERN.block, PATTERN.num_blocks),
            _native.index(PATTERN.row_ptr, PATTERN.input, PATTERN.tap), x.data_ptr(), x.stride(), VALUES.data_ptr(), 0,
            y.data_ptr(), threads)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deepcopy", "pickle"])
def test_copies_of_prepared_convolutions_own_what_they_read(copied: Callable) -> None:
    weight, adjacency, x = normal(8, 4, 3, seed=2), (normal(3, 25, 25, seed=3) > 1).float(), normal(1, 4, 5, 25, seed=4)
    graph, window = FixedGraphConv(weight, PATTERN, None, torch.zeros(8), adjacency), WindowConv(weight, PATTERN, None)
    wanted = graph(x), window(x, 3)
    others = copied(graph), copied(window)
    del graph, window
    gc.collect()
    rubbish = [torch.full((size,), 2**30, dtype=torch.int32) for size in range(1, 400)]
    assert torch.equal(others[0](x), wanted[0]) and torch.equal(others[1](x, 3), wanted[1])
    assert len(rubbish) == 399
    with pytest.raises(ValueError, match=r"V=20. Got \(3, 25, 25\)"):
        others[0](x[..., :20])


class TestChangedInPlace:
    """Autograd notices changes of tensors that were saved; these were not."""

    def test_result_that_is_made_again(self) -> None:
        x, weight = normal(2, 4, 6, 25).requires_grad_(), normal(4, seed=5).requires_grad_()
        gradients = []
        for whether in (True, False):
            values = VALUES.clone().requires_grad_()
            y, *_ = norm(x, weight, weight, relu=True)
            y = y.mul_(3)
            if whether:
                with again(y):
                    z = temporal_conv(y, values, PATTERN)
            else:
                z = temporal_conv(y, values, PATTERN)
            gradients.append(torch.autograd.grad(z.sum(), values)[0])
        assert torch.equal(*gradients)

    def test_what_it_is_made_of(self) -> None:
        x, weight = normal(2, 4, 6, 25).requires_grad_(), normal(4, seed=5).requires_grad_()
        values = VALUES.clone().requires_grad_()
        y, *_ = norm(x, weight, weight, relu=True)
        with again(y):
            z = temporal_conv(y, values, PATTERN)
        with torch.no_grad():
            weight.mul_(10)
        with pytest.raises(RuntimeError, match="Expected the arguments of norm to be as they were"):
            torch.autograd.grad(z.sum(), values)

    @pytest.mark.parametrize("elsewhere", [True, False])
    def test_result_that_is_stored_elsewhere(self, elsewhere: bool) -> None:
        x, weight = normal(2, 4, 6, 25).requires_grad_(), normal(4, seed=5)
        y, *_ = norm(x, weight, weight, residual=x, relu=True, elsewhere=elsewhere)
        y.neg_()
        with pytest.raises(RuntimeError, match="in.?place"):
            y.sum().backward()

    def test_gradient_that_a_caller_took(self) -> None:
        whole = normal(2, 8, 6, 5).requires_grad_()
        parts = split(2 * whole, [(0, 4), (4, 8)])
        out = max_pool(parts[0]).sum() + max_pool(parts[1]).sum()
        taken, = torch.autograd.grad(out, parts[0], retain_graph=True)
        kept = taken.clone()
        (5 * out).backward()
        assert torch.equal(taken, kept)
        assert torch.allclose(whole.grad[:, :4], 10 * kept)


def test_group_lasso_of_weights_that_overlap() -> None:
    pattern = BlockPattern.from_blocks(torch.zeros(1, 4, 1, dtype=torch.bool), (8, 4, 1), (8, 1))
    results = []
    for backend in ("native", "reference"):
        row = normal(1, 4, 1, seed=6).requires_grad_()
        with forced_backend(backend):
            group_lasso([row.expand(8, 4, 1)], [pattern]).backward()
        results.append(row.grad)
    assert torch.allclose(*results, rtol=1e-5)
    with pytest.raises(TypeError, match=r"Expected weights of one dtype.*weights\[1\]"):
        group_lasso([normal(8, 4, 1), normal(8, 4, 1).bfloat16()], [pattern, pattern])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_supports_fit_their_adjacency(backend: str) -> None:
    x, adjacency, where = normal(2, 4, 5, 25), normal(3, 25, 25, seed=7), normal(3, 25, 25, seed=8) > 1
    with forced_backend(backend):
        for support in (where[:1], where[:, :10, :10], where.float(), Support.of(where[:1])):
            for op in (lambda s: graph_conv(x, VALUES, PATTERN, adjacency, support=s),
                       lambda s: graph_product(x, adjacency, s)):
                with pytest.raises(ValueError, match="Expected support to be a bool tensor of adjacency's shape"):
                    op(support)
        with pytest.raises(ValueError, match="Expected support=None, or a shared adjacency"):
            graph_product(x, adjacency.expand(2, 3, 25, 25), where)
        products = [graph_product(x, adjacency, support) for support in (where, Support.of(where))]
        assert torch.equal(*products)
        assert torch.allclose(products[0], graph_product(x, adjacency * where), atol=1e-5)


def block(**changed: object) -> None:
    taps = BlockPattern.full((8, 8, 3), (8, 1))
    given: dict = {"x": normal(2, 4, 6, 25), "weight": torch.ones(8), "adjacency": normal(3, 25, 25), "temporal": taps,
                   "stride": 1, **changed}
    graph = Normed(VALUES, PATTERN, None, given["weight"], torch.zeros(8), 1e-5)
    temporal = Normed(given["temporal"].gather(normal(*given["temporal"].shape)), given["temporal"], None, torch.ones(8),
                      torch.zeros(8), 1e-5)
    stgcn_block(given["x"], graph, given["adjacency"], temporal, stride=given["stride"])


@pytest.mark.parametrize(("changed", "message"), [
    ({"adjacency": normal(3, 20, 20)}, r"Expected adjacency of shape \(K, V, V\) = \(3, 25, 25\)"),
    ({"adjacency": normal(1, 25, 25)}, "Expected adjacency of shape"),
    ({"weight": torch.ones(2)}, r"Expected graph.weight and graph.shift of shape \(8,\)"),
    ({"temporal": BlockPattern.full((8, 8, 4), (8, 1))}, "odd number of taps. Got 4"),
    ({"stride": 0}, "Expected stride and dilation of at least 1"),
])
def test_a_block_checks_what_it_reads(changed: dict, message: str) -> None:
    block()
    with pytest.raises(ValueError, match=message):
        block(**changed)


def test_dense_and_sparse_subsets_of_channel_graphs() -> None:
    batch, subsets, rank, channels, frames, joints = 2, 3, 4, 8, 5, 7
    sparse = BlockPattern.from_blocks(normal(1, rank, 1, seed=9) > 0, (channels, rank, 1), (8, 1))
    weights = [normal(channels, rank, seed=10 + k) for k in range(subsets)]
    given: list[Tensor] = [weights[0], sparse.gather(weights[1][..., None]), weights[2]]
    dense = [weights[0], sparse.scatter(given[1])[..., 0], weights[2]]
    embedded, wide = normal(batch, subsets, 2, rank, joints, seed=20), normal(batch, subsets, channels, frames, joints, seed=21)
    rest = [normal(channels, seed=22)] * subsets, torch.tensor(0.7), normal(subsets, joints, joints, seed=23)
    y = ctr_aggregate_sum(embedded, wide, given, *rest, [None, sparse, None])
    assert torch.allclose(y, ctr_aggregate_sum(embedded, wide, dense, *rest), rtol=1e-4, atol=1e-5)


def test_a_network_whose_subsets_are_dense_and_sparse() -> None:
    model = create_model("ctrgcn", num_classes=5, base_channels=16).eval()
    sparsify(model, 0.5, block=(2, 1), seed=0)
    compact(model)
    x = normal(2, 2, 8, 25, 3)
    wanted = model(x)
    model.backbone.net[1].gcn1.convs[1].conv4.densify()
    assert torch.allclose(model(x), wanted, atol=1e-6)
    assert torch.allclose(optimize(model)(x), wanted, atol=1e-5)


def test_lasso_terms_fit_their_pattern() -> None:
    x, scale = normal(2, 4, 6, 25), torch.tensor(0.5)
    flags = torch.arange(PATTERN.num_blocks) % 2 == 0
    adjacency = normal(3, 25, 25)
    for op in (lambda lasso: temporal_conv(x, VALUES, PATTERN, lasso=lasso),
               lambda lasso: graph_conv(x, VALUES, PATTERN, adjacency, lasso=lasso)):
        for masked, kind in ((flags[:1], ValueError), (flags.long(), TypeError)):
            with pytest.raises(kind, match="Expected lasso.masked"):
                op(Lasso(masked, scale))

    def gradient(masked: Tensor) -> Tensor:
        values = VALUES.clone().requires_grad_()
        return torch.autograd.grad(temporal_conv(x, values, PATTERN, lasso=Lasso(masked, scale)).sum(), values)[0]

    scattered = torch.stack([flags, ~flags], 1)[:, 0]
    assert not scattered.is_contiguous()
    assert torch.equal(gradient(scattered), gradient(flags))


def ops(N: int, T: int, V: int) -> Iterator[Callable[[], object]]:
    K, R, C, I = 2, 4, 8, 4

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape)

    single, wide = BlockPattern.full((8, 4, 3), (1, 1)), BlockPattern.full((K * C, I, 1), (8, 1))
    pairs = BlockPattern.full((2 * K * R, I, 1), (8, 1))
    for pattern in (PATTERN, single):
        yield lambda pattern=pattern: temporal_conv(rand(N, I, T, V), pattern.gather(rand(8, 4, 3)), pattern)
    yield lambda: graph_conv(rand(N, I, T, V), VALUES, PATTERN, rand(3, V, V))
    yield lambda: graph_conv(rand(N, I, T, V), VALUES, PATTERN, rand(N, 3, V, V))
    yield lambda: graph_product(rand(N, I, T, V), rand(3, V, V))
    yield lambda: max_pool(rand(N, I, T, V))
    yield lambda: append_mean(rand(N, I, T, V))
    yield lambda: share(rand(N, I, T, V), 2, True)
    yield lambda: attend(rand(N, I, T, V), rand(1, I, 3), rand(1), rand(1, I, 9), rand(1), rand(3, I), rand(3), rand(I, 3),
                         rand(I))
    yield lambda: aa_graph(rand(N, 2, K, R, T, V), rand(1), rand(K, V, V))
    yield lambda: aa_unit_graph(rand(N, I, T, V), pairs.gather(rand(*pairs.shape)), pairs, rand(2 * K * R), rand(1),
                                rand(K, V, V))
    yield lambda: dg_aggregate(rand(N, K, C, T, V), rand(N, K, C, V), rand(N, K, C, V), rand(1), rand(1), rand(K, V, V))
    yield lambda: ctr_aggregate_sum(rand(N, K, 2, R, V), rand(N, K, C, T, V), [rand(C, R)] * K, [rand(C)] * K, rand(1),
                                    rand(K, V, V))
    yield lambda: ctr_unit(rand(N, K, 2, R, V), rand(N, I, T, V), wide.gather(rand(*wide.shape)), wide, rand(K * C),
                           [rand(C, R)] * K, [rand(C)] * K, rand(1), rand(K, V, V))


@pytest.mark.parametrize("shape", [(2, 0, 25), (2, 5, 0)])
def test_no_frame_or_no_joint_is_an_error(shape: tuple[int, int, int]) -> None:
    for op in ops(*shape):
        with pytest.raises(ValueError, match="at least one frame and one joint"):
            op()


def test_no_sample_is_none() -> None:
    for op in ops(0, 5, 25):
        op()


def test_patterns_keep_nothing_of_a_trace() -> None:
    class Scattered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pattern = BlockPattern.from_blocks(normal(1, 4, 3, seed=30) > 0, (8, 4, 3), (8, 1))
            self.values = torch.nn.Parameter(self.pattern.gather(normal(8, 4, 3, seed=31)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, self.pattern.scatter(self.values)[..., None])

    module, x = Scattered(), normal(1, 4, 6, 5)
    torch.export.export(module, (x,), strict=False)
    y = module(x)
    assert type(y) is Tensor
    assert torch.allclose(y, reference.temporal_conv(x, module.values, module.pattern)[:, :, 1:-1], atol=1e-5)
