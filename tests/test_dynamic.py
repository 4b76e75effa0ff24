"""kernels.dynamic: the aggregations against their formulas, and what they keep for the backward pass."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_stgcn import BlockPattern
from sparse_stgcn.kernels import _native
from sparse_stgcn.kernels.dynamic import aa_aggregate, ctr_aggregate, dg_aggregate
from tests.kernel_cases import BLOCKS, STRIDES, assert_within, integers, normal, random_pattern

N, C, R, T, K = 2, 4, 3, 6, 2
OPS = ["aa", "ctr", "dg"]
native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")


def aa(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    similar = torch.einsum("nrtv,nrtw->nvw", a, b) / (a.shape[1] * a.shape[2])
    return torch.einsum("nctv,nvw->nctw", x, A + alpha * torch.tanh(similar))


def ctr(x1: Tensor, x2: Tensor, x3: Tensor, w4: Tensor, b4: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    maps = torch.tanh(x1[..., :, None] - x2[..., None, :])
    refined = torch.einsum("cr,nrvw->ncvw", w4, maps) + b4[:, None, None]
    return torch.einsum("nctv,ncvw->nctw", x3, alpha * refined + A)


def dg(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    attention = torch.einsum("nkcv,nkcw->nkvw", x1, x2).softmax(-2)[:, :, None]
    graph = A[:, None] + alpha * torch.tanh(x1[..., :, None] - x2[..., None, :]) + beta * attention
    return torch.einsum("nkctv,nkcvw->nkctw", x, graph)


OURS: dict[str, Callable] = {"aa": aa_aggregate, "ctr": ctr_aggregate, "dg": dg_aggregate}
FORMULA: dict[str, Callable] = {"aa": aa, "ctr": ctr, "dg": dg}

# The size of a result, by which an error is measured: the same op on absolute values, and of tanh and the softmax what their
# errors are measured by. Their values and slopes go into the sizes of results and of gradients alike.


def size_of(x: Tensor) -> Tensor:
    """|x|, of slope 1 at 0 too."""
    return torch.where(x < 0, -x, x)


def tanh_size(z: Tensor, size: Tensor | float = 0.0) -> Tensor:
    """Of tanh(z) where z has an error of ``size``: the error of tanh itself is 3 eps absolute, its slope at most 1; that of
    1 - tanh^2 is at most twice its error plus 0.8 times that of z."""
    return 1 + size + (2 + size) * (z - z.detach())


def softmax_size(attention: Tensor, score: Tensor) -> Tensor:
    """Of a softmax over -2 with sums of absolute values ``score`` behind it: exp turns their error into a relative one."""
    weight = (attention * (2 + 2 * score.amax(-2, keepdim=True))).detach()
    move = score - score.detach()
    return weight + weight * (move + (attention * move).sum(-2, keepdim=True))


def aa_size(x: Tensor, a: Tensor, b: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    similar = torch.einsum("nrtv,nrtw->nvw", size_of(a), size_of(b)) / (a.shape[1] * a.shape[2])
    return torch.einsum("nctv,nvw->nctw", size_of(x), size_of(A) + size_of(alpha) * tanh_size(similar, similar.detach()))


def ctr_size(x1: Tensor, x2: Tensor, x3: Tensor, w4: Tensor, b4: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    maps = tanh_size(size_of(x1)[..., :, None] + size_of(x2)[..., None, :])
    refined = torch.einsum("cr,nrvw->ncvw", size_of(w4), maps) + size_of(b4)[:, None, None]
    return torch.einsum("nctv,ncvw->nctw", size_of(x3), size_of(alpha) * refined + size_of(A))


def dg_size(x: Tensor, x1: Tensor, x2: Tensor, alpha: Tensor, beta: Tensor, A: Tensor) -> Tensor:
    attention = torch.einsum("nkcv,nkcw->nkvw", x1, x2).softmax(-2).detach()
    attention = softmax_size(attention, torch.einsum("nkcv,nkcw->nkvw", size_of(x1), size_of(x2)))[:, :, None]
    maps = tanh_size(size_of(x1)[..., :, None] + size_of(x2)[..., None, :])
    graph = size_of(A)[:, None] + size_of(alpha) * maps + size_of(beta) * attention
    return torch.einsum("nkctv,nkcvw->nkctw", size_of(x), graph)


SIZE: dict[str, Callable] = {"aa": aa_size, "ctr": ctr_size, "dg": dg_size}


def sizes(op: str, joints: int, batch: int = N, channels: int = C, rank: int = R, frames: int = T, groups: int = K
          ) -> list[tuple[int, ...]]:
    V = joints
    return {
        "aa": [(batch, channels, frames, V), (batch, rank, frames, V), (batch, rank, frames, V), (1,), (V, V)],
        "ctr": [(batch, rank, V), (batch, rank, V), (batch, channels, frames, V), (channels, rank), (channels,), (1,), (V, V)],
        "dg": [(batch, groups, channels, frames, V), (batch, groups, channels, V), (batch, groups, channels, V), (1,), (1,),
               (groups, V, V)],
    }[op]


NAMES = {"aa": ["x", "a", "b", "alpha", "A"], "ctr": ["x1", "x2", "x3", "w4", "b4", "alpha", "A"],
         "dg": ["x", "x1", "x2", "alpha", "beta", "A"]}
X = {"aa": 0, "ctr": 2, "dg": 0}  # the argument that has the shape of the result


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def restride(x: Tensor, kind: str) -> Tensor:
    """The numbers of x in other strides."""
    last = x.dim() - 1
    if x.dim() == 1:
        return x
    if kind == "channels_last":
        return x.movedim(1, last).contiguous().movedim(last, 1)
    if kind == "slice":  # of a wider tensor, with an offset into its storage
        wide = torch.full([size + 3 for size in x.shape], float("nan"), dtype=x.dtype)
        return wide[tuple(slice(1, -2) for _ in x.shape)].copy_(x)
    if kind == "transposed":
        return x.permute(*range(last, -1, -1)).contiguous().permute(*range(last, -1, -1))
    if kind == "every_second":
        wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), float("nan"), dtype=x.dtype)
        return wide[..., ::2, :].copy_(x)
    return x.contiguous()


def run(op: Callable, arguments: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(op: str, shapes: list[tuple[int, ...]], kind: str = "contiguous", dy_kind: str = "contiguous",
          pattern: BlockPattern | None = None, spread: float = 1.0) -> None:
    """float32 against the formula in float64: |error| <= 8 eps times the size."""
    arguments = [argument.detach() for argument in draw(shapes, torch.float32)]
    embedded = [i for i, name in enumerate(NAMES[op]) if name in ("a", "b", "x1", "x2")]
    arguments = [argument * spread if i in embedded else argument for i, argument in enumerate(arguments)]
    dy = normal(*shapes[X[op]], seed=20)
    double = [argument.double() for argument in arguments]
    ours = OURS[op]
    if pattern is not None:
        double[3] *= pattern.mask()[..., 0]
        arguments[3] = pattern.gather(arguments[3][..., None])
        ours = lambda *leaves: ctr_aggregate(*leaves, pattern)
    got = run(ours, [restride(argument, kind) for argument in arguments], restride(dy, dy_kind))
    exact = run(FORMULA[op], double, dy.double())
    size = run(SIZE[op], double, dy.double().abs())
    for name, actual, want, scale in zip(["y", *(f"d{name}" for name in NAMES[op])], got, exact, size, strict=True):
        if pattern is not None and name == "dw4":
            actual = pattern.scatter(actual)[..., 0]
            want, scale = (t * pattern.mask()[..., 0] for t in (want, scale))
        assert_within(actual, want, scale.abs(), f"{op} {name}")


CASES = {
    "ntu": {"joints": 25, "frames": 20, "channels": 24, "rank": 16},
    "coco": {"joints": 17, "frames": 13, "channels": 9, "rank": 5},
    "one_joint": {"joints": 1, "frames": 30, "channels": 5, "rank": 3},
    "sixteen_joints": {"joints": 16, "frames": 14, "channels": 8, "rank": 4},
    "40_joints": {"joints": 40, "frames": 9, "channels": 6, "rank": 4},
    "70_joints": {"joints": 70, "frames": 4, "channels": 3, "rank": 2},
    "one_frame": {"joints": 25, "frames": 1, "channels": 17, "rank": 8},
    "one_channel": {"joints": 25, "frames": 27, "channels": 1, "rank": 1},
    "many_samples": {"joints": 5, "frames": 3, "channels": 3, "rank": 2, "batch": 37, "groups": 3},
}


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
def test_parameters_follow_the_activations_under_autocast(op: str) -> None:
    """Activations in bfloat16, parameters in float32: the result is that of bfloat16, gradients are float32."""
    arguments = [argument.detach().float() for argument in draw(sizes(op, 5))]
    mixed = [(a.bfloat16() if i in (0, 1, 2) else a).requires_grad_() for i, a in enumerate(arguments)]
    with torch.autocast("cpu", torch.bfloat16):
        got = OURS[op](*mixed)
    got.sum().backward()
    torch.testing.assert_close(got.float(), FORMULA[op](*arguments), atol=0.3, rtol=0.05)
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
    maps = 2 * N * 17 * 17 * 8
    assert extra <= (maps if (op, backend) == ("aa", "reference") else 0)


@native
@pytest.mark.parametrize("op", [*OPS, "ctr_live_blocks"])
def test_opcheck_and_fullgraph(op: str) -> None:
    name = op.split("_")[0]
    arguments = [argument.detach() for argument in draw(sizes(name, 25), torch.float32)]
    dy, extra, ours = torch.randn_like(arguments[X[name]]), (), OURS[name]
    if op == "ctr":
        extra = (None, None, [C, R, 1], [8, 1])
    if op == "ctr_live_blocks":
        pattern = random_pattern((C, R, 1), (2, 1), 0.5)
        arguments[3] = pattern.gather(arguments[3][..., None])
        extra = (pattern.row_ptr, pattern.input, [C, R, 1], [2, 1])
        ours = lambda *leaves: ctr_aggregate(*leaves, pattern)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.sparse_stgcn
    torch.library.opcheck(getattr(ops, f"{name}_aggregate"), (*arguments, *extra), test_utils=tests)
    torch.library.opcheck(getattr(ops, f"{name}_aggregate_backward"), (dy, *arguments, *extra), test_utils=tests)

    loss = lambda *leaves: ours(*leaves).relu().square().sum()
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "index", "shape", "message"), [
    ("aa", 0, (N, C, T, 24), "x of shape"), ("aa", 2, (N, R + 1, T, 25), "a and b of shape"),
    ("aa", 3, (2,), "alpha to be one number"), ("aa", 4, (25, 24), "A of shape"),
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
    done = subprocess.run([sys.executable, "-c", PROBE.format(isa=isa)], env={**os.environ, "SPARSE_STGCN_ISA": isa},
                          capture_output=True, text=True, timeout=300)
    if done.stdout.startswith("SKIP"):
        pytest.skip(f"this processor has no {isa}: {done.stdout[5:].strip()}")
    assert done.returncode == 0 and done.stdout.strip() == "OK", done.stdout + done.stderr
