from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_stgcn.backbones import stgcn
from sparse_stgcn.backbones.stgcn import GraphBlock, GraphUnit
from sparse_stgcn.kernels import Support, _native, reference
from sparse_stgcn.kernels.stgcn_block import Normed, fuses, stgcn_block
from sparse_stgcn.layers import SparseConv2d, TemporalUnit
from sparse_stgcn.skeleton import Skeleton
from tests.kernel_cases import normal, random_pattern, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# N, I, O, T, V, taps, stride, dilation, residual, block
CASES = {
    "identity": (3, 16, 16, 12, 25, 9, 1, 1, "identity", (8, 1)),
    "first_block": (2, 3, 24, 20, 25, 9, 1, 1, None, (8, 1)),
    "strided": (2, 16, 24, 13, 25, 9, 2, 1, "tensor", (8, 1)),
    "strided_even": (2, 8, 16, 12, 25, 9, 2, 1, "tensor", (4, 4)),
    "stride_3": (2, 8, 16, 11, 17, 5, 3, 2, "tensor", (4, 1)),
    "few_taps_wide_stride": (2, 8, 8, 17, 9, 3, 4, 1, "tensor", (8, 1)),
    "dilation": (2, 12, 12, 15, 18, 3, 1, 4, "identity", (4, 1)),
    "pointwise": (2, 9, 9, 6, 25, 1, 1, 1, "identity", (4, 1)),
    "ragged": (2, 11, 21, 9, 18, 9, 1, 1, "tensor", (16, 16)),
    "many_tiles": (2, 128, 128, 61, 25, 9, 1, 1, "identity", (8, 1)),
    "many_tiles_strided": (2, 96, 160, 70, 25, 9, 2, 1, "tensor", (8, 1)),
    "one_sample": (1, 16, 16, 10, 25, 9, 1, 1, "identity", (8, 1)),
    "one_frame": (3, 8, 8, 1, 25, 9, 1, 1, "identity", (8, 1)),
    "one_joint": (4, 8, 8, 20, 1, 9, 1, 1, "identity", (8, 1)),
    "40_joints": (2, 8, 8, 7, 40, 9, 1, 1, "identity", (8, 1)),
    "more_samples_than_chunks": (37, 4, 4, 3, 5, 3, 1, 1, "identity", (4, 1)),
    "one_output": (2, 8, 8, 9, 25, 9, 1, 1, "identity", (1, 1)),
    "one_output_strided": (2, 11, 13, 14, 25, 9, 2, 1, "tensor", (1, 1)),
    "one_output_stride_3": (2, 6, 7, 11, 17, 5, 3, 2, "tensor", (1, 2)),
    "one_output_many_tiles": (2, 128, 128, 61, 25, 9, 1, 1, "identity", (1, 1)),
    "three_outputs": (2, 8, 10, 9, 18, 3, 1, 4, "tensor", (3, 5)),
    "stride_without_taps": (2, 8, 8, 9, 25, 1, 2, 1, "tensor", (8, 1)),
}


def arguments(case, dtype=torch.float64, offset=0.0):
    N, I, O, T, V, taps, stride, dilation, residual, block = CASES[case]
    K, out = 3, -(-T // stride)
    graph, temporal = random_pattern((O, I, K), block, 0.3), random_pattern((O, O, taps), block, 0.3, seed=1)
    where = torch.rand(K, V, V, generator=torch.Generator().manual_seed(5)) < 3 / V
    tensors = {
        "x": normal(N, I, T, V, seed=1) + offset, "graph": graph.gather(normal(O, I, K, seed=2)) / I**0.5,
        "adjacency": normal(K, V, V, seed=3) * where, "graph_bias": normal(K, O, seed=4),
        "weight1": 1 + normal(O, seed=5) / 4, "shift1": normal(O, seed=6),
        "temporal": temporal.gather(normal(O, O, taps, seed=7)) / (O * taps) ** 0.5, "temporal_bias": normal(O, seed=8),
        "weight2": 1 + normal(O, seed=9) / 4, "shift2": normal(O, seed=10),
    }
    if residual == "tensor":
        tensors["residual"] = normal(N, O, out, V, seed=11)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors, graph, temporal, where, stride, dilation, residual == "identity", normal(N, O, out, V, seed=12, dtype=dtype)


def plain(x, graph, adjacency, temporal, residual, identity, support, stride, dilation):
    z = reference.graph_conv(x, graph.values, graph.pattern, adjacency * support, graph.bias)
    h, *first = reference.norm([z], graph.weight, graph.shift, graph.eps, None, True, False)
    y = reference.temporal_conv(h, temporal.values, temporal.pattern, temporal.bias, stride, dilation)
    out, *second = reference.norm([y], temporal.weight, temporal.shift, temporal.eps, x if identity else residual, True, False)
    return out, first, second


def run(op, tensors, graph, temporal, where, stride, dilation, identity, dout):
    """Output, statistics, and the gradient of every argument, by name."""
    t = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, first, second = op(
        t["x"], Normed(t["graph"], graph, t["graph_bias"], t["weight1"], t["shift1"], 1e-5), t["adjacency"],
        Normed(t["temporal"], temporal, t["temporal_bias"], t["weight2"], t["shift2"], 1e-4), t.get("residual"), identity,
        where, stride, dilation)
    found = dict(zip(t, torch.autograd.grad(out, list(t.values()), dout), strict=True))
    found["adjacency"] = found["adjacency"] * where
    return {"out": out.detach(), **{f"statistics {i}": s.detach() for i, s in enumerate((*first, *second))}, **found}


def assert_close(got, exact, eps):
    for name, value in exact.items():
        assert got[name].shape == value.shape, name
        # A channel that no block reaches has variance 0, and its norm a slope of 1 / sqrt(eps) <= 320: only its bias sees it.
        slope = 320 if name.endswith("bias") else 1
        error, bound = (got[name].double() - value).abs().max(), slope * eps * max(1.0, float(value.abs().max()))
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case):
    *double, dout = arguments(case)
    assert_close(run(stgcn_block, *double, dout), run(plain, *double, dout), 1e-10)
    tensors, *rest, dout = arguments(case, torch.float32)
    if "many_tiles" in case:  # among so many numbers one is near enough to a ReLU's edge to be turned by rounding: all are open
        tensors["shift1"], tensors["shift2"] = tensors["shift1"] + 16, tensors["shift2"] + 16
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    # Sums of a few thousand numbers near one, and no number so near a ReLU's edge that rounding turns it.
    assert_close(run(stgcn_block, tensors, *rest, dout), run(plain, wide, *rest, dout.double()), 3e-5)


def test_the_cases_are_run_by_the_op():
    for name, (_, _, _, _, _, taps, stride, *_, block) in CASES.items():
        pattern = random_pattern((8, 8, taps), block, 0.5)
        assert fuses(torch.zeros(1), pattern, stride) == (name != "stride_without_taps")


def test_a_mean_far_from_zero_costs_no_digits():
    tensors, *rest, dout = arguments("identity", torch.float32)
    tensors["graph_bias"], tensors["temporal_bias"] = tensors["graph_bias"] + 300, tensors["temporal_bias"] + 300
    got = run(stgcn_block, tensors, *rest, dout)
    exact = run(plain, {name: t.double() for name, t in tensors.items()}, *rest, dout.double())
    for i in range(4):  # the inputs of the norms are rounded to eps times their size, 300 to 2000
        assert torch.allclose(got[f"statistics {i}"].double(), exact[f"statistics {i}"], rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["channels_last", "slice", "every_second"])
def test_any_strides(kind):
    tensors, *rest, dout = arguments("strided", torch.float64)
    exact = run(stgcn_block, tensors, *rest, dout)
    moved = {name: strided(t, kind) if t.dim() == 4 else t for name, t in tensors.items()}
    for name, value in run(stgcn_block, moved, *rest, strided(dout, kind)).items():
        assert torch.equal(value, exact[name]), name


@pytest.mark.parametrize("case", ["many_tiles", "many_tiles_strided", "more_samples_than_chunks", "one_sample",
                                  "one_output_many_tiles", "one_output_strided"])
def test_bit_equal_over_runs_and_threads(case):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(stgcn_block, *arguments(case, torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_gradcheck():
    tensors, graph, temporal, where, stride, dilation, identity, _ = arguments("few_taps_wide_stride")
    names = list(tensors)

    def op(*values):
        t = dict(zip(names, values, strict=True))
        return stgcn_block(
            t["x"][:, :, :9, :5], Normed(t["graph"], graph, t["graph_bias"], t["weight1"], t["shift1"], 1e-5),
            t["adjacency"][:, :5, :5], Normed(t["temporal"], temporal, t["temporal_bias"], t["weight2"], t["shift2"], 1e-5),
            t["residual"][:, :, :3, :5], identity, where[:, :5, :5], stride, dilation)[0]

    assert torch.autograd.gradcheck(op, [tensor.requires_grad_() for tensor in tensors.values()], fast_mode=True)


def test_without_biases_and_with_a_constant_graph():
    tensors, graph, temporal, where, *_ = arguments("first_block")
    x = tensors["x"]

    def op(function, bias):
        values = tensors["temporal"].detach().requires_grad_()
        zero = lambda name: torch.zeros_like(tensors[name]) if bias else None
        out, *_ = function(x, Normed(tensors["graph"], graph, zero("graph_bias"), tensors["weight1"], tensors["shift1"], 1e-5),
                           tensors["adjacency"], Normed(values, temporal, zero("temporal_bias"), tensors["weight2"],
                                                        tensors["shift2"], 1e-5), None, False, where, 1, 1)
        return out, torch.autograd.grad(out.square().sum(), values)[0]

    for got, exact in zip(op(stgcn_block, False), op(plain, True), strict=True):
        assert torch.allclose(got, exact, rtol=1e-9, atol=1e-9)


def test_not_a_number_reaches_the_output():
    tensors, *rest = arguments("identity", torch.float32)
    tensors["x"][1, 2, 3, 4] = float("nan")
    assert run(stgcn_block, tensors, *rest)["out"].isnan().any()


@pytest.mark.parametrize("change, message", [
    ({"x": normal(2, 5, 12, 25, seed=1)}, "x of shape"), ({"identity": True, "residual": "x"}, "identity without"),
    ({"residual": normal(3, 16, 11, 25, seed=1)}, "residual of shape")])
def test_wrong_arguments(change, message):
    tensors, graph, temporal, where, stride, dilation, *_ = arguments("identity", torch.float32)
    t = {**tensors, "residual": None, "identity": False, **change}
    t["residual"] = t["x"] if isinstance(t["residual"], str) else t["residual"]
    with pytest.raises(ValueError, match=message):
        stgcn_block(t["x"], Normed(t["graph"], graph, t["graph_bias"], t["weight1"], t["shift1"], 1e-5), t["adjacency"],
                    Normed(t["temporal"], temporal, t["temporal_bias"], t["weight2"], t["shift2"], 1e-5), t["residual"],
                    t["identity"], where, stride, dilation)


def test_wrong_dtype():
    tensors, graph, temporal, where, *_ = arguments("first_block", torch.float32)
    t = tensors
    with pytest.raises(TypeError, match="dtype of x"):
        stgcn_block(t["x"], Normed(t["graph"], graph, None, t["weight1"].double(), t["shift1"], 1e-5), t["adjacency"],
                    Normed(t["temporal"], temporal, None, t["weight2"], t["shift2"], 1e-5), None, False, where)


def block(adaptive="importance", widths=(16, 16), stride=1, residual=True):
    torch.manual_seed(0)
    adjacency = Skeleton.load("nturgb+d").adjacency("stgcn_spatial", 3, 0)
    units = GraphUnit(*widths, adjacency, adaptive), TemporalUnit(widths[1], widths[1], stride=stride)
    made = GraphBlock(*units, *widths, stride, residual)
    return attached(made, compact=True).train()


def attached(made, compact):
    for seed, conv in enumerate(m for m in made.modules() if isinstance(m, SparseConv2d)):
        conv.attach(random_pattern(conv.shape_oik, (8, 1), 0.3, seed))
        if compact:
            conv.compact()
    return made


def both(model, x, monkeypatch):
    """Output, gradients and buffers of a step with the block as one op and unit by unit, and how often the op ran."""
    results, calls = [], []
    real = stgcn.stgcn_block
    monkeypatch.setattr(stgcn, "stgcn_block", lambda *a: calls.append(1) or real(*a))
    for one_op in (True, False):
        net = copy.deepcopy(model)
        if not one_op:
            monkeypatch.setattr(GraphBlock, "fuses", lambda self, x: False)
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        (out * normal(*out.shape, seed=2, dtype=out.dtype)).sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    return results, len(calls)


@pytest.mark.parametrize("adaptive", ["importance", "init", "offset", "fixed"])
@pytest.mark.parametrize("form", [((16, 16), 1, True), ((3, 16), 1, False), ((8, 16), 2, True)], ids=str)
def test_a_block_is_the_same_as_one_op(form, adaptive, monkeypatch):
    (one, apart), calls = both(block(adaptive, *form).double(), normal(3, form[0][0], 11, 25, seed=1, dtype=torch.float64),
                               monkeypatch)
    assert calls == 1
    for a, b in zip(one, apart, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_what_keeps_a_block_from_being_one_op(monkeypatch):
    x = normal(2, 16, 10, 25, seed=1)
    assert block().fuses(x) and block().double().fuses(x.double())
    assert not block().eval().fuses(x)
    assert not block().fuses(x.double())
    assert not block().bfloat16().fuses(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):  # what is float32 stays so, and so does a narrower input once it is widened
        assert block().fuses(x) and not block().fuses(x.bfloat16())
    frozen = block()
    frozen.tcn.bn.eval()
    assert not frozen.fuses(x)
    for name in ("gcn", "gcn.conv", "gcn.bn", "tcn", "tcn.conv", "tcn.bn", "residual"):
        watched = block()
        watched.get_submodule(name).register_forward_hook(lambda *_: None)
        assert not watched.fuses(x), name
    replaced = block()
    replaced.tcn.conv = nn.Conv2d(16, 16, (9, 1), padding=(4, 0))
    assert not replaced.fuses(x)
    dense = GraphBlock(GraphUnit(16, 16, torch.ones(3, 25, 25)), TemporalUnit(16, 16), 16, 16, 1)
    warm = attached(copy.deepcopy(dense), compact=False)
    for longest, one_op in ((9 * 16, True), (9 * 16 - 1, False)):
        monkeypatch.setattr("sparse_stgcn.layers._LONGEST_SUM", {_native.isa: longest})
        assert dense.fuses(x) == warm.fuses(x) == one_op
        with torch.no_grad():
            assert not dense.fuses(x)


def test_the_reference_backend_runs_unit_by_unit(monkeypatch):
    monkeypatch.setenv("SPARSE_STGCN_BACKEND", "reference")
    assert not block().fuses(normal(2, 16, 10, 25, seed=1))


def test_opcheck(monkeypatch):
    calls, real = [], torch.ops.sparse_stgcn
    net, x = block(), normal(2, 16, 10, 25, seed=1)

    class Spy:
        def stgcn_block(self, *arguments):
            calls.append(("stgcn_block", arguments))
            return real.stgcn_block(*arguments)

        def stgcn_block_backward(self, *arguments):
            calls.append(("stgcn_block_backward", arguments))
            return real.stgcn_block_backward(*arguments)

    monkeypatch.setattr(torch.ops, "sparse_stgcn", Spy())
    net(x).sum().backward()
    monkeypatch.undo()
    assert [name for name, _ in calls] == ["stgcn_block", "stgcn_block_backward"]
    for name, arguments in calls:
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(getattr(real, name), detached, test_utils=("test_schema", "test_faketensor"))


def test_compiles_as_one_graph():
    tensors, graph, temporal, where, stride, dilation, identity, dout = arguments("identity", torch.float32)
    support, eager = Support.of(where), run(stgcn_block, tensors, graph, temporal, where, stride, dilation, identity, dout)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def op(t):
        return stgcn_block(t["x"], Normed(t["graph"], graph, t["graph_bias"], t["weight1"], t["shift1"], 1e-5), t["adjacency"],
                           Normed(t["temporal"], temporal, t["temporal_bias"], t["weight2"], t["shift2"], 1e-4), None, identity,
                           support, stride, dilation)[0]

    out = torch.compile(op, backend="aot_eager", fullgraph=True)(leaves)
    assert torch.equal(out, eager["out"])
    for name, gradient in zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True):
        assert torch.equal(gradient, eager[name]), name


def test_stored_for_the_backward_pass():
    """x, z, y and the output; the graph of unit by unit keeps relu(bn(z)) as well."""
    net, x, stored = block(), normal(4, 16, 40, 25, seed=1).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.setdefault(t.data_ptr(), t), lambda t: t):
        net(x)
    assert sum(t.numel() for t in stored.values() if t.numel() == x.numel()) == 4 * x.numel()
