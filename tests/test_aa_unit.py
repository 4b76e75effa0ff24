"""kernels.aa_unit_graph against the two ops that it stands for, and in AA-GCN's unit."""
from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from sparse_stgcn import BlockPattern, compact, create_model, sparsify
from sparse_stgcn.backbones import aagcn
from sparse_stgcn.kernels import _native
from sparse_stgcn.kernels.aa_unit import aa_unit_graph
from tests import unit_cases
from tests.kernel_cases import STRIDES, normal, random_pattern, strided
from tests.unit_cases import trains_alike

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (N, K, R, I, T, V), the block, and the share that lives
CASES = {
    "ntu": ((3, 3, 16, 8, 7, 25), (8, 1), 0.4),
    "rows_over_groups": ((2, 2, 10, 5, 9, 5), (4, 1), 0.5),
    "single": ((2, 3, 7, 16, 5, 17), (1, 1), 0.25),
    "square": ((2, 3, 16, 16, 6, 25), (16, 16), 0.6),
    "one_pixel": ((1, 1, 11, 7, 1, 1), (8, 1), 0.5),
    "more_samples_than_ranges": ((19, 2, 8, 8, 3, 4), (8, 1), 0.5),
    "no_sample": ((0, 3, 8, 8, 4, 25), (8, 1), 0.5),
    "nothing_lives": ((2, 3, 8, 8, 4, 25), (8, 1), 0.0),
}


def arguments(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous") -> tuple[list[Tensor], BlockPattern]:
    """x, values, bias, alpha, A: the similarities are of size 1, where the slope of tanh is neither 0 nor 1."""
    (batch, subsets, rank, inputs, frames, joints), block, density = CASES[case]
    pattern = random_pattern((2 * subsets * rank, inputs, 1), block, density)
    draw = lambda seed, *shape: normal(*shape, seed=seed, dtype=torch.float64).to(dtype)
    return [strided(draw(1, batch, inputs, frames, joints), kind), pattern.gather(draw(2, *pattern.shape)) / 2,
            draw(3, pattern.shape[0]) / 2, draw(4, 1), draw(5, subsets, joints, joints)], pattern


def run(given: list[Tensor], pattern: BlockPattern, dgraphs: Tensor, bias: bool = True) -> list[Tensor]:
    x, values, b, alpha, A = leaves = [tensor.detach().requires_grad_() for tensor in given]
    graphs = aa_unit_graph(x, values, pattern, b if bias else None, alpha, A)
    wanted = leaves if bias else [x, values, alpha, A]
    return [graphs.detach(), *torch.autograd.grad(graphs, wanted, dgraphs)]


def gradient(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous") -> Tensor:
    (batch, subsets, _, _, _, joints), *_ = CASES[case]
    return strided(normal(batch, subsets, joints, joints, seed=9, dtype=torch.float64).to(dtype), kind)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, bias: bool) -> None:
    unit_cases.against_the_reference(sys.modules[__name__], case, bias=bias)


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dgraphs_kind", STRIDES)
def test_any_strides(kind: str, dgraphs_kind: str) -> None:
    unit_cases.any_strides(sys.modules[__name__], "ntu", kind, dgraphs_kind)


def test_gradcheck() -> None:
    given, pattern = arguments("rows_over_groups")
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    assert torch.autograd.gradcheck(lambda x, values, b, alpha, A: aa_unit_graph(x, values, pattern, b, alpha, A), leaves)


@native
@pytest.mark.parametrize("case", ["ntu", "one_pixel", "more_samples_than_ranges"])
def test_bit_equal_over_runs_and_threads(case: str) -> None:
    unit_cases.bit_equal_over_threads(sys.modules[__name__], case)


@native
def test_stale_workspaces_do_not_leak() -> None:
    (given, pattern), (larger, other) = arguments("ntu", torch.float32), arguments("square", torch.float32)
    clean = run(given, pattern, gradient("ntu", torch.float32))
    run([torch.full_like(tensor, float("nan")) for tensor in larger], other, gradient("square", torch.float32) * float("nan"))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(given, pattern, gradient("ntu", torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_gradient_beyond_the_ragged_edge_is_zero() -> None:
    given, pattern = arguments("one_pixel")
    dvalues = run([given[0], torch.ones_like(given[1]) / 100, *given[2:]], pattern, gradient("one_pixel"))[2]
    inside = pattern.gather(torch.ones(pattern.shape, dtype=torch.float64)).bool()
    assert dvalues[inside].all() and not dvalues[~inside].any()


@native
def test_the_embeddings_are_not_stored() -> None:
    (given, pattern), stored = arguments("ntu", torch.float32), []
    x, values, b, alpha, A = (tensor.detach().requires_grad_() for tensor in given)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        aa_unit_graph(x, values, pattern, b, alpha, A)
    assert max(tensor.numel() for tensor in stored) <= max(x.numel(), 3 * 3 * 25 * 25)  # they would be twelve times x


@native
def test_opcheck_and_fullgraph() -> None:
    given, pattern = arguments("ntu", torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in given]

    def loss(x, values, b, alpha, A):
        return aa_unit_graph(x, values, pattern, b, alpha, A).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)
    index = pattern.row_ptr, pattern.input, pattern.tap, list(pattern.shape), list(pattern.block)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.aa_unit_graph, (*given, *index), test_utils=tests)
    x, values, bias, alpha, _ = given
    dgraphs = gradient("ntu", torch.float32)
    torch.library.opcheck(torch.ops.sparse_stgcn.aa_unit_graph_backward,
                          (dgraphs, x, values, bias, alpha, dgraphs.tanh(), *index), test_utils=tests)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(2, 5, 6, 25)}, ValueError, "x of shape"),
    ({"A": torch.zeros(25, 25)}, ValueError, "A of shape"),
    ({"A": torch.zeros(3, 24, 25)}, ValueError, "A of shape"),
    ({"A": torch.zeros(5, 25, 25)}, ValueError, r"pattern of shape \(2 K R, I, 1\)"),
    ({"pattern": BlockPattern.full((24, 8, 3))}, ValueError, r"pattern of shape \(2 K R, I, 1\)"),
    ({"alpha": torch.zeros(3)}, ValueError, "alpha to be one number"),
    ({"bias": torch.zeros(8)}, ValueError, "bias of shape"),
    ({"values": torch.zeros(24, 1, 8, dtype=torch.float64)}, TypeError, "values to have the dtype of x"),
])
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(2, 8, 6, 25), "values": torch.zeros(24, 1, 8), "pattern": BlockPattern.full((24, 8, 1)),
             "bias": torch.zeros(24), "alpha": torch.zeros(1), "A": torch.zeros(3, 25, 25), **change}
    with pytest.raises(error, match=message):
        aa_unit_graph(**given)


@native
@pytest.mark.parametrize(("block", "level", "made"), [((8, 1), 0.6, True), ((1, 1), 0.9, True), ((32, 1), 0.6, False)])
def test_the_unit_takes_it_in_training(block: tuple[int, int], level: float, made: bool,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of 8 channels are no multiple of 32 rows: the convolutions then run one by one."""
    torch.manual_seed(0)
    model = compact(sparsify(create_model("aagcn", 5, base_channels=32, num_person=1), level, block)).double().train()
    unit, x, calls = model.backbone.gcn[1].gcn, normal(2, 32, 6, 25, seed=1).double(), []
    monkeypatch.setattr(aagcn, "aa_unit_graph", lambda *a: calls.append(1) or aa_unit_graph(*a))
    trains_alike(unit, x, "conv_a.1", aagcn, calls, int(made), monkeypatch)


@native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    unit_cases.on_an_instruction_set(isa, "test_aa_unit")
