from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels import _native, append_mean, share, spread_mean
from sparse_stgcn.kernels import reference_units as reference
from tests import forced_isa
from tests.kernel_cases import STRIDES, assert_within, integers, normal, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

SHAPES = {"ntu": (2, 5, 20, 25), "one_pixel": (3, 2, 1, 1), "small": (2, 3, 7, 3), "many_joints": (2, 2, 3, 70),
          "sixteen": (1, 2, 4, 16), "clip": (1, 3, 100, 25)}
WIDTHS = (1, 4, 2)  # of the tensors that spread_mean joins

# Each op with one list of tensors as its argument.
OPS = {
    "share": (lambda op, given: op(given[0], 3), share, reference.share),
    "share_mean": (lambda op, given: op(given[0], 2, True), share, reference.share),
    "only_mean": (lambda op, given: op(given[0], 1, True)[1:], share, reference.share),
    "append_mean": (lambda op, given: op(given[0], 3), append_mean, reference.append_mean),
    "spread_mean": (lambda op, given: (op(given[1:], given[0]),), spread_mean, reference.spread_mean),
}


def arguments(name, case, dtype=torch.float64, kind="contiguous", make=normal):
    batch, channels, frames, joints = SHAPES[case]
    if name != "spread_mean":
        return [strided(make(batch, channels, frames, joints, seed=1, dtype=dtype), kind)]
    xs = [strided(make(batch, width, frames, joints + 1, seed=width, dtype=dtype), kind) for width in WIDTHS]
    return [make(joints, seed=9, dtype=dtype), *xs]


def run(name, given, native=True, kind="contiguous", make=normal):
    call, op, plain = OPS[name]
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    outputs = call(op if native else plain, leaves)
    dtype = given[0].dtype
    # Gradients in which no two uses are alike.
    douts = [strided(make(*y.shape, seed=20 + i, dtype=dtype), kind) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, douts)]


def absolute(*shape, seed, dtype):
    return normal(*shape, seed=seed, dtype=dtype).abs()


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_matches_the_reference(name, case):
    exact = run(name, arguments(name, case), native=False)
    magnitude = run(name, [tensor.abs() for tensor in arguments(name, case)], native=False, make=absolute)
    assert len(exact) == len(magnitude)
    for i, (a, e, m) in enumerate(zip(run(name, arguments(name, case)), exact, magnitude, strict=True)):
        assert_within(a, e, m, f"float64, result {i}")
    single = run(name, arguments(name, case, torch.float32))
    doubles = lambda *shape, seed, dtype: normal(*shape, seed=seed, dtype=torch.float32).double()
    exact = run(name, [tensor.double() for tensor in arguments(name, case, torch.float32)], native=False, make=doubles)
    for i, (a, e, m) in enumerate(zip(single, exact, magnitude, strict=True)):
        assert_within(a, e, m, f"float32, result {i}")


@pytest.mark.parametrize("name", ["share", "spread_mean"])
def test_small_integers_are_exact(name):
    given = arguments(name, "ntu", torch.float32, make=integers)
    for a, b in zip(run(name, given, make=integers), run(name, given, native=False, make=integers), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("name", OPS)
def test_any_strides(name, kind):
    exact = run(name, arguments(name, "ntu"), native=False)
    for a, e in zip(run(name, arguments(name, "ntu", kind=kind), kind=kind), exact, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    leaves = [tensor.requires_grad_() for tensor in arguments(name, "small")]
    assert torch.autograd.gradcheck(lambda *given: OPS[name][0](OPS[name][1], given), leaves)


@pytest.mark.parametrize("name", OPS)
def test_bit_equal_over_threads(name):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(name, arguments(name, "ntu", torch.float32)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", [share, append_mean], ids=["share", "append_mean"])
def test_uses_without_a_gradient(op):
    x = normal(2, 3, 4, 5, seed=1).requires_grad_()
    first, second, _ = op(x, 3)
    assert first.data_ptr() == second.data_ptr()
    expected, = torch.autograd.grad(2 * op(x, 1)[0].sum(), x)
    assert torch.equal(torch.autograd.grad(2 * second.sum(), x)[0], expected)
    assert not op(x.detach(), 2)[0].requires_grad


def test_other_dtypes_run_in_torch():
    x = normal(2, 3, 4, 5, seed=1).bfloat16()
    aliases = share(x, 2, mean=True)
    assert aliases[0] is x and aliases[2].dtype == torch.bfloat16 and append_mean(x)[0].shape == (2, 3, 4, 6)
    assert spread_mean([x, x.float()], torch.ones(4)).dtype == torch.float32


def test_opcheck_and_fullgraph():
    ops, x = torch.ops.sparse_stgcn, normal(2, 3, 4, 5, seed=1)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, given in ((ops.frame_mean, (x,)), (ops.total, ([x, 2 * x], None)), (ops.total, ([x], x[:, :, :1])),
                      (ops.append_mean, (x,)), (ops.append_mean_backward, ([x, 2 * x],)),
                      (ops.spread_mean, ([x, x], torch.ones(4))),
                      (ops.spread_mean_backward, (torch.ones(2, 6, 4, 4), torch.ones(2, 6, 4), torch.ones(4), [3 * x, 4 * x]))):
        torch.library.opcheck(op, given, test_utils=tests)

    def loss(x, coef):
        first, second, mean = share(x, 2, True)
        return (spread_mean(append_mean(first), coef) * second + mean).square().sum()

    leaves = [x.requires_grad_(), torch.rand(5).requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: share(torch.zeros(2, 3, 4), 1), "x of shape"),
    (lambda: share(torch.zeros(2, 3, 4, 5), 9), "count from 1 to 8"),
    (lambda: append_mean(torch.zeros(2, 3, 4, 5), 0), "count from 1 to 8"),
    (lambda: spread_mean([], torch.zeros(3)), "xs of shapes"),
    (lambda: spread_mean([torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 3, 5)], torch.zeros(4)), "xs of shapes"),
    (lambda: spread_mean([torch.zeros(2, 3, 4, 5)], torch.zeros(5)), "coef of shape"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PROBE = """
from tests import test_means as t
from sparse_stgcn.kernels import _native
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for name in t.OPS:
    for case in t.SHAPES: t.test_matches_the_reference(name, case)
print("OK")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    forced_isa.run(isa, PROBE)
