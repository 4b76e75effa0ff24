"""kernels.branches against the ops that it stands for, and in the temporal units of CTR-GCN and DG-STGCN."""
from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sparse_stgcn import BlockPattern, compact, create_model, sparsify
from sparse_stgcn.backbones import multibranch
from sparse_stgcn.kernels import LiveConv, _native, branches, spans, split
from sparse_stgcn.kernels.branches import Map
from sparse_stgcn.kernels.dispatch import forced_backend
from sparse_stgcn.layers import SparseConv2d, Units
from tests import unit_cases
from tests.kernel_cases import STRIDES, normal, random_pattern, strided

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
module = sys.modules["sparse_stgcn.kernels.branches"]

# (N, T, V), stride, and the maps: (I, O, K, dilation, block, density), or "max" or "pass" and the channels. Those named
# "mean_..." have a joint mean.
CASES = {
    "ctr": ((3, 13, 25), 1, [(8, 8, 5, 1, (8, 1), 0.3), (8, 8, 5, 2, (8, 1), 0.3), ("max", 8)]),
    "ctr_stride": ((2, 14, 25), 2, [(16, 16, 5, 1, (8, 1), 0.2), (16, 16, 5, 2, (8, 1), 0.2), ("max", 16)]),
    "mean_dg": ((2, 11, 25), 1, [(14, 14, 3, 1, (8, 1), 0.3), *((10, 10, 3, d, (8, 1), 0.3) for d in (2, 3, 4)), ("max", 10),
                                 ("pass", 10)]),
    "mean_dg_stride": ((2, 11, 25), 2, [(14, 14, 3, 1, (8, 1), 0.3), *((10, 10, 3, d, (8, 1), 0.3) for d in (2, 3, 4)),
                                        ("max", 10), ("pass", 10)]),
    "dg_without_mean": ((2, 9, 26), 2, [(14, 14, 3, 4, (8, 1), 0.3), ("max", 10), ("pass", 10)]),
    "transform": ((3, 9, 25), 1, [(20, 20, 1, 1, (8, 1), 0.3)]),
    "mean_point": ((3, 9, 17), 1, [(20, 20, 1, 1, (8, 1), 0.3), ("pass", 3)]),
    "single": ((2, 12, 17), 1, [(6, 7, 3, 2, (1, 1), 0.3), (5, 4, 5, 1, (1, 1), 0.5)]),
    "mean_single_stride": ((2, 13, 5), 3, [(6, 7, 3, 2, (1, 1), 0.3), ("max", 5)]),
    "single_point": ((2, 5, 25), 1, [(9, 11, 1, 1, (1, 1), 0.4)]),
    "mixed_blocks": ((2, 9, 6), 1, [(16, 16, 3, 1, (16, 16), 0.5), (16, 12, 9, 1, (4, 4), 0.5), (7, 9, 3, 3, (2, 3), 0.6)]),
    "many_tiles": ((1, 400, 25), 1, [(32, 32, 5, 2, (8, 1), 0.1), ("max", 4)]),
    "mean_many_tiles": ((1, 301, 25), 2, [(48, 48, 5, 2, (4, 1), 0.1), ("max", 3), ("pass", 2)]),
    "mean_many_joints": ((1, 5, 70), 1, [(8, 8, 3, 1, (8, 1), 0.5), ("max", 3), ("pass", 2)]),
    "one_frame": ((3, 1, 4), 1, [(8, 8, 3, 4, (8, 1), 0.5), ("max", 3)]),
    "mean_one_joint": ((3, 4, 1), 1, [(8, 8, 3, 4, (8, 1), 0.5), ("max", 3), ("pass", 1)]),
    "pool_alone": ((2, 6, 7), 1, [("max", 5)]),
    "more_samples_than_ranges": ((19, 3, 4), 1, [(8, 8, 3, 1, (8, 1), 0.5), ("max", 4)]),
    "mean_nothing_lives": ((2, 6, 5), 1, [(8, 8, 3, 1, (8, 1), 0.0)]),
}


def patterns_of(case: str) -> list[BlockPattern | None]:
    made: list[BlockPattern | None] = []
    for seed, spec in enumerate(CASES[case][2]):
        if len(spec) == 2:
            made.append(None)
            continue
        inputs, outputs, taps, _, block, density = spec
        pattern = random_pattern((outputs, inputs, taps), block, density, seed)
        if not density:
            pattern = BlockPattern.from_blocks(torch.zeros_like(pattern.blocks()), pattern.shape, block)
        made.append(pattern)
    return made


def arguments(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous", grid: bool = True
              ) -> tuple[list[Tensor], str]:
    """x of all branches, coefficients, weight and bias of the norm, then values and bias of each convolution; and the case.

    x lies on a ``grid``, so that no ReLU and no maximum is decided by a rounding error.
    """
    (batch, frames, joints), stride, maps = CASES[case]
    draw = lambda seed, *shape: normal(*shape, seed=seed).to(dtype)
    widths = [spec[1] if len(spec) == 2 else spec[0] for spec in maps]
    normed = sum(width for width, spec in zip(widths, maps, strict=True) if spec[0] != "pass")
    convs = [part for seed, pattern in enumerate(patterns_of(case)) if pattern is not None
             for part in (pattern.gather(draw(50 + seed, *pattern.shape)), draw(70 + seed, pattern.shape[0]))]
    xs = [2 * draw(seed, batch, width, -(-frames // stride) if spec[0] == "pass" else frames, joints)
          for seed, (width, spec) in enumerate(zip(widths, maps, strict=True))]
    xs = [strided(3 + ((4 * x).round() / 4 if grid else x), kind) for x in xs]
    return [*xs, draw(39, joints), draw(40, normed), draw(41, normed), *convs], case


def maps_of(case: str, convs: list[Tensor], bias: bool = True) -> list[Map]:
    pairs = zip(convs[::2], convs[1::2] if bias else [None] * len(convs), strict=False)
    return [spec[0] if pattern is None else LiveConv(*(pair := next(pairs))[:1], pattern, pair[1], spec[3])
            for pattern, spec in zip(patterns_of(case), CASES[case][2], strict=True)]


def call(case: str, leaves: list[Tensor], bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    count = len(CASES[case][2])
    coef, weight, shift, *convs = leaves[count:]
    return branches(leaves[:count], weight, shift, maps_of(case, convs, bias), CASES[case][1], 1e-4,
                    coef if case.startswith("mean") else None)


def run(given: list[Tensor], case: str, dy: Tensor, bias: bool = True) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y, mean, variance = call(case, leaves, bias)
    assert not mean.requires_grad and not variance.requires_grad and y.is_contiguous()
    count = len(CASES[case][2])
    wanted = [leaf for at, leaf in enumerate(leaves) if (bias or at < count + 3 or (at - count - 3) % 2 == 0)
              and (at != count or case.startswith("mean"))]
    return [y.detach(), mean, variance, *torch.autograd.grad(y, wanted, dy)]


def gradient(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous") -> Tensor:
    (batch, frames, joints), stride, maps = CASES[case]
    outputs = sum(spec[1] for spec in maps)
    return strided(normal(batch, outputs, -(-frames // stride), joints, seed=90).to(dtype), kind)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, bias: bool) -> None:
    unit_cases.against_the_reference(sys.modules[__name__], case, bias=bias)


@native
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
def test_any_strides(kind: str, dy_kind: str) -> None:
    unit_cases.any_strides(sys.modules[__name__], "ctr_stride", kind, dy_kind)


@native
@pytest.mark.parametrize("case", ["mean_single_stride", "mean_one_joint", "one_frame", "mean_point"])
def test_gradcheck(case: str) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments(case, grid=False)[0]]
    leaves[len(CASES[case][2])].requires_grad_(case.startswith("mean"))
    assert torch.autograd.gradcheck(lambda *given: call(case, list(given))[0], leaves)


@native
@pytest.mark.parametrize("case", ["ctr", "mean_dg_stride", "single", "many_tiles", "mean_many_tiles",
                                  "more_samples_than_ranges"])
def test_bit_equal_over_runs_and_threads(case: str) -> None:
    unit_cases.bit_equal_over_threads(sys.modules[__name__], case)


@native
def test_gradients_of_slices_lie_in_their_places() -> None:
    """The inputs are slices of one tensor with channels between them, as a joined 1 x 1 convolution gives them."""
    given, case = arguments("mean_dg")
    count = len(CASES[case][2])
    rooms = [x.shape[1] + 3 for x in given[:count]]
    wide = torch.zeros(2, sum(rooms), 11, 25, dtype=torch.float64)
    where = [(begin, begin + x.shape[1]) for (begin, _), x in zip(spans(rooms), given[:count], strict=True)]
    for (begin, end), x in zip(where, given[:count], strict=True):
        wide[:, begin:end] = x
    leaf = wide.requires_grad_()
    y, *_ = call(case, [*split(2 * leaf, where), *given[count:]])
    y.backward(gradient(case))
    want = run([*(2 * x for x in given[:count]), *given[count:]], case, gradient(case))[3:3 + count]
    for (begin, end), dx in zip(where, want, strict=True):
        torch.testing.assert_close(leaf.grad[:, begin:end], 2 * dx, rtol=1e-12, atol=1e-12)
        leaf.grad[:, begin:end] = 0
    assert not leaf.grad.any()


@native
def test_stale_workspaces_do_not_leak() -> None:
    (given, case), dy = arguments("mean_dg", torch.float32), gradient("mean_dg", torch.float32)
    clean = run(given, case, dy)
    run([torch.full_like(t, float("nan")) for t in arguments("many_tiles", torch.float32)[0]], "many_tiles",
        gradient("many_tiles", torch.float32) * float("nan"))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(given, case, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@native
def test_nothing_but_the_arguments_is_stored() -> None:
    (given, case), stored = arguments("ctr", torch.float32), []
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        call(case, leaves)
    inputs = {x.data_ptr() for x in leaves}
    assert all(t.data_ptr() in inputs or t.dim() == 1 for t in stored)


@native
def test_opcheck_and_fullgraph() -> None:
    given, case = arguments("ctr", torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    maps = maps_of(case, given[6:])

    def loss(*tensors: Tensor) -> Tensor:
        ways = [way if isinstance(way, str) else way._replace(values=tensors[6 + 2 * b], bias=tensors[7 + 2 * b])
                for b, way in enumerate(maps)]
        return branches(tensors[:3], tensors[4], tensors[5], ways, coef=tensors[3])[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)
    xs, (coef, weight, shift), convs = given[:3], given[3:6], given[6:]
    patterns = [p for p in patterns_of(case) if p is not None]
    index = [part for p in patterns for part in (p.row_ptr, p.input, p.tap)]
    sizes = [0, 8, 8, 5, 8, 1, 1, 0, 8, 8, 5, 8, 1, 2, 1, 8, 8, 1, 1, 1, 1]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (xs, weight, shift, coef, convs[::2], convs[1::2], index, sizes, 1, 1e-5)
    torch.library.opcheck(torch.ops.sparse_stgcn.branches, forward, test_utils=tests)
    _, mean, rstd, _, means = torch.ops.sparse_stgcn.branches(*forward)
    weights = weight, shift, coef, *convs[::2], *convs[1::2]
    dxs, gradients = [torch.empty_like(x) for x in xs], [torch.empty_like(t) for t in weights]
    torch.library.opcheck(torch.ops.sparse_stgcn.branches_backward, (
        gradient(case, torch.float32), xs, weight, shift, coef, mean, rstd, means, convs[::2], index, sizes, 1,
        dxs, gradients),
        test_utils=tests)


CONV = LiveConv(torch.zeros(24, 1, 8), BlockPattern.full((8, 8, 3), (8, 1)), torch.zeros(8))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"xs": []}, ValueError, "one map for each of 0 xs"),
    ({"xs": [torch.zeros(2, 8, 6, 25), torch.zeros(2, 8, 5, 25)]}, ValueError, "xs of shapes"),
    ({"maps": ["max"]}, ValueError, "one map for each of 2 xs"),
    ({"maps": ["pass", "pass"]}, ValueError, "not all of them"),
    ({"coef": torch.zeros(24)}, ValueError, r"coef of shape \(25,\)"),
    ({"maps": ["pass", "max"], "stride": 2, "weight": torch.zeros(8), "bias": torch.zeros(8)}, ValueError, "xs of shapes"),
    ({"weight": torch.zeros(8)}, ValueError, r"weight and bias of shape \(16,\)"),
    ({"bias": torch.zeros(16, dtype=torch.float64)}, TypeError, "of one dtype"),
    ({"stride": 0}, ValueError, "stride and dilations of at least 1"),
    ({"maps": [CONV._replace(dilation=0), "max"]}, ValueError, "stride and dilations of at least 1"),
    ({"maps": [CONV._replace(pattern=BlockPattern.full((8, 8, 2), (8, 1))), "max"]}, ValueError, "with an odd K"),
    ({"maps": [CONV._replace(pattern=BlockPattern.full((8, 4, 3), (8, 1))), "max"]}, ValueError, r"a pattern \(O, 8, K\)"),
    ({"maps": [CONV._replace(values=torch.zeros(3, 1, 8)), "max"]}, ValueError, "values of shape"),
    ({"maps": [CONV._replace(bias=torch.zeros(3)), "max"]}, ValueError, "bias of shape"),
    ({"xs": [torch.zeros(1, 8, 1, 1)] * 2}, ValueError, "at least two values per channel"),
])
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    given = {"xs": [torch.zeros(2, 8, 6, 25)] * 2, "weight": torch.zeros(16), "bias": torch.zeros(16), "maps": [CONV, "max"],
             **change}
    with pytest.raises(error, match=message):
        branches(**given)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever the op runs."""
    made: list[int] = []
    real = torch.ops.sparse_stgcn
    monkeypatch.setattr(module, "_ops", SimpleNamespace(branches=lambda *a: made.append(1) or real.branches(*a),
                                                        branches_backward=real.branches_backward))
    return made


def step(unit: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = unit(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in unit.parameters()), *unit.buffers()]


@native
@pytest.mark.parametrize("level", [0.6, 0.9])
@pytest.mark.parametrize(("backbone", "ops"), [("ctrgcn", 1), ("dgstgcn", 2)])
def test_temporal_units_take_it_in_training(backbone: str, ops: int, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units with and without a stride: as one op, with a hook on a convolution or a pooling, and op by op."""
    made = counted(monkeypatch)
    options = {"num_person": 1} if backbone == "ctrgcn" else {}
    model = compact(sparsify(create_model(backbone, 5, base_channels=24, **options), level, (8, 1))).double().train()
    units = [m for m in model.modules() if isinstance(m, multibranch.BranchedTemporal | multibranch.MixedTemporal)]
    strides = [unit.branches[0][3].conv.stride for unit in units]
    for unit in (units[1], units[strides.index(2)]):
        x = normal(2, unit.branches[0][0].in_channels, 8, 25, seed=1).double()
        results = []
        for way in ("one", "conv", "pool", "apart"):
            other = copy.deepcopy(unit)
            watched = {"conv": other.branches[1][3].conv, "pool": other.branches[-2][3]}.get(way)
            if watched is not None:
                watched.register_forward_hook(lambda *_: None)
            del made[:]
            if way == "apart":
                with monkeypatch.context() as patch:
                    patch.setattr(multibranch, "as_maps", lambda *a: None)
                    patch.setattr("sparse_stgcn.layers.as_maps", lambda *a: None)
                    results.append(step(other, x))
            else:
                results.append(step(other, x))
            assert len(made) == {"one": ops, "apart": 0}.get(way, ops - 1), way
        for others in results[1:]:
            for a, b in zip(results[0], others, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@native
@pytest.mark.parametrize("change", ["eval", "momentum", "dense", "bfloat16", "no_norm", "subclass"])
def test_units_that_are_not_one_op_run_one_by_one(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    monkeypatch.setattr("sparse_stgcn.layers._LONGEST_SUM", {})  # dense weights are torch's, on every machine
    conv, bn = SparseConv2d(8, 8), nn.BatchNorm2d(8)
    unit = Units(bn, nn.ReLU(), conv)
    if change != "dense":
        conv.attach(random_pattern((8, 8, 1), (8, 1), 0.5))
        conv.compact()
    unit(normal(2, 8, 5, 4, seed=1))
    assert len(made) == (change != "dense")
    if change == "eval":
        unit.eval()
    if change == "momentum":  # a cumulative average is the norm's own affair
        bn.momentum = None
    if change == "no_norm":
        unit = Units(nn.ReLU(), conv)
    if change == "subclass":
        unit[0] = type("Other", (nn.BatchNorm2d,), {})(8)
    x = normal(2, 8, 5, 4, seed=1)
    unit, x = (unit.bfloat16(), x.bfloat16()) if change == "bfloat16" else (unit, x)
    del made[:]
    y = unit(x)
    assert len(made) == (change == "momentum")
    plain = conv(unit[1](unit[0](x))) if change != "no_norm" else conv(unit[0](x))
    tolerance = 2e-2 if change == "bfloat16" else 1e-5
    torch.testing.assert_close(y, plain, rtol=tolerance, atol=tolerance)


@native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    unit_cases.on_an_instruction_set(isa, "test_branches")


def test_without_the_native_module_it_is_the_definition() -> None:
    given, case = arguments("ctr")
    with forced_backend("reference"):
        want = run(given, case, gradient(case))
    for a, b in zip(run(given, case, gradient(case)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
