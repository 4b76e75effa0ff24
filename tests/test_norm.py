from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_stgcn.batch_norms import normalise
from sparse_stgcn.kernels import _native, norm, reference
from sparse_stgcn.layers import Units
from tests import forced_isa
from tests.kernel_cases import STRIDES, normal, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (N, widths of the joined tensors, T, V)
CASES = {
    "one": (3, (5,), 9, 25),
    "joined": (3, (4, 1, 7), 9, 25),
    "less_than_a_vector": (2, (3,), 1, 3),
    "one_pixel": (6, (3,), 1, 1),
    "one_sample": (1, (4,), 11, 7),
    "long": (2, (2,), 100, 25),
}
FORMS = {"plain": (False, False, False), "relu": (False, True, False), "residual": (True, False, False),
         "residual_relu": (True, True, False), "relu_residual": (True, False, True), "both": (True, True, True)}


def arguments(case, dtype=torch.float64, offset=0.0, kind="contiguous"):
    batch, widths, frames, joints = CASES[case]
    xs = [strided(normal(batch, width, frames, joints, seed=i, dtype=dtype) * 2 + offset, kind)
          for i, width in enumerate(widths)]
    channels = sum(widths)
    residual = strided(normal(batch, channels, frames, joints, seed=11, dtype=dtype), kind)
    dy = strided(normal(batch, channels, frames, joints, seed=12, dtype=dtype), kind)
    return xs, 1 + normal(channels, seed=13, dtype=dtype) / 4, normal(channels, seed=14, dtype=dtype), residual, dy


def run(op, xs, weight, bias, residual, dy, form):
    with_residual, relu, before = FORMS[form]
    leaves = [t.detach().requires_grad_() for t in (*xs, weight, bias, *([residual] if with_residual else []))]
    count = len(xs)
    y, mean, variance = op(leaves[:count], leaves[count], leaves[count + 1], 1e-5, leaves[-1] if with_residual else None, relu,
                           before)
    return [y.detach(), mean.detach(), variance.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(got, exact, eps, what):
    for i, (a, e) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == e.shape and (a.double() - e).abs().max() <= eps * max(1.0, float(e.abs().max())), (what, i)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, form):
    exact = run(reference.norm, *arguments(case), form)
    assert_close(run(norm, *arguments(case), form), exact, 1e-12, "float64")
    single = [[t.float() for t in item] if isinstance(item, list) else item.float() for item in arguments(case)]
    double = [[t.double() for t in item] if isinstance(item, list) else item.double() for item in single]
    # An error of a few eps in y turns a ReLU only where |y| is as small: none of these numbers is.
    assert_close(run(norm, *single, form), run(reference.norm, *double, form), 4e-6, "float32")


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides(kind):
    exact = run(reference.norm, *arguments("joined"), "both")
    assert_close(run(norm, *arguments("joined", kind=kind), "both"), exact, 1e-12, kind)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    xs, weight, bias, residual, _ = arguments("joined")
    with_residual, relu, before = FORMS[form]
    leaves = [t[:2, :, :2, :5].contiguous().requires_grad_() if t.dim() == 4 else t.requires_grad_()
              for t in (*xs, weight, bias, residual)]
    assert torch.autograd.gradcheck(
        lambda *t: norm(t[:3], t[3], t[4], 1e-5, t[5] if with_residual else None, relu, before)[0], leaves)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_digits(offset):
    xs, *_ = arguments("long", torch.float32, offset)
    _, mean, variance = norm(xs, torch.ones(2), torch.zeros(2))
    exact_variance, exact_mean = torch.var_mean(xs[0].double(), (0, 2, 3))
    assert torch.allclose(mean.double(), exact_mean, rtol=2e-7, atol=0)
    assert torch.allclose(variance.double(), exact_variance, rtol=2e-6, atol=0)


def test_persons_of_zeros_beside_numbers_far_from_zero():
    x = 50 + normal(4, 3, 20, 25, seed=1)
    x[1], x[3] = 0, 0
    _, mean, variance = norm(x, torch.ones(3), torch.zeros(3))
    exact_variance, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    assert torch.allclose(mean.double(), exact_mean, rtol=2e-7) and torch.allclose(variance.double(), exact_variance, rtol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_zeros(form):
    """A channel without gradient sends none, one that lacks it in some samples does there as well; y is as ever."""
    xs, weight, bias, residual, dy = arguments("joined")
    dy[:, 2] = 0
    dy[:2, 5] = 0
    dy[1, 7:9] = 0
    got = run(norm, xs, weight, bias, residual, dy, form)
    assert_close(got, run(reference.norm, xs, weight, bias, residual, dy, form), 1e-12, form)
    assert not got[3][:, 2].any() and got[4][:2, 0].any()


def test_a_constant_channel():
    x = torch.full((2, 1, 4, 25), 7.3).requires_grad_()
    y, mean, variance = norm(x, torch.ones(1), torch.full((1,), 0.5), relu=True)
    assert torch.allclose(y, torch.full_like(y, 0.5)) and variance.item() < 1e-10 and abs(mean.item() - 7.3) < 1e-6
    y.sum().backward()
    assert x.grad.abs().max() < 1e-3


def test_not_a_number_stays():
    x = normal(2, 2, 4, 25, seed=1)
    x[0, 0, 0, 0] = float("nan")
    y, _, _ = norm(x, torch.ones(2), torch.zeros(2), relu=True)
    assert y[:, 0].isnan().all() and not y[:, 1].isnan().any()


def test_bit_equal_over_runs_and_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(norm, *arguments("joined", torch.float32), "both"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_running_statistics_are_those_of_torch(momentum, dtype):
    ours = nn.BatchNorm2d(6, momentum=momentum, dtype=dtype)
    theirs = copy.deepcopy(ours)
    eps = 8 * torch.finfo(dtype).eps
    for seed in range(4):
        x = normal(3, 6, 5, 25, seed=seed, dtype=dtype) * 3 + 2
        assert torch.allclose(normalise(ours, x, relu=True), theirs(x).relu(), rtol=0, atol=20 * eps)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].double(), value.double(), rtol=eps, atol=eps), name
    assert int(ours.num_batches_tracked) == 4
    ours.eval(), theirs.load_state_dict(ours.state_dict()), theirs.eval()
    assert torch.equal(normalise(ours, x, relu=True), theirs(x).relu())
    assert int(ours.num_batches_tracked) == 4


def test_units_run_a_norm_and_its_relu_as_one():
    units = Units(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU())
    plain = nn.Sequential(*copy.deepcopy(list(units)))
    x = normal(3, 4, 6, 25, seed=1)
    assert torch.allclose(units(x), plain(x.clone()), atol=1e-5)
    assert list(units.state_dict()) == list(plain.state_dict())


def test_autocast_widens_what_it_normalises():
    """Convolutions under autocast give bfloat16; the norm takes what they are, and its result and sums are float32."""
    bn, xs = nn.BatchNorm2d(4), [normal(3, 4, 6, 25, seed=seed).bfloat16().requires_grad_() for seed in (1, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        y = normalise(bn, *xs, relu=True)
    y.square().sum().backward()
    wide = [x.detach().float().requires_grad_() for x in xs]
    want = normalise(copy.deepcopy(bn), *wide, relu=True)
    want.square().sum().backward()
    assert torch.equal(y, want)
    for x, other in zip(xs, wide, strict=True):
        assert torch.equal(x.grad, other.grad.bfloat16())
    assert normalise(bn, xs[0]).dtype == torch.bfloat16  # nobody asked for float32 where there is no autocast


def test_opcheck_and_fullgraph():
    xs, weight, bias, residual, dy = arguments("joined", torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.norm, (xs, weight, bias, residual, 1e-5, True, True), test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.norm_again, (xs, weight, bias, weight, weight.abs(), True), test_utils=tests)
    y, mean, rstd, _ = torch.ops.sparse_stgcn.norm(xs, weight, bias, residual, 1e-5, True, True)
    for saved in (y, None):
        dxs = [torch.empty_like(x) for x in xs]
        torch.library.opcheck(torch.ops.sparse_stgcn.norm_backward, (dy, xs, saved, weight, bias, mean, rstd, True, dxs),
                              test_utils=tests)

    def loss(x, weight):
        return norm(x, weight, bias[:4], 1e-5, None, True)[0].square().sum()

    leaves = [xs[0].requires_grad_(), weight[:4].detach().requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"xs": []}, ValueError, "xs of shapes"),
    ({"xs": [torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 6)]}, ValueError, "xs of shapes"),
    ({"weight": torch.ones(3)}, ValueError, "weight of shape"),
    ({"residual": torch.ones(2, 4, 3, 4)}, ValueError, "residual of shape"),
    ({"xs": torch.zeros(1, 4, 1, 1)}, ValueError, "at least two values"),
    ({"xs": torch.zeros(0, 4, 3, 5)}, ValueError, "at least two values"),
    ({"bias": torch.ones(4, dtype=torch.float64)}, TypeError, "one dtype"),
], ids=lambda value: str(value)[:20])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        norm(**{"xs": torch.zeros(2, 4, 3, 5), "weight": torch.ones(4), "bias": torch.zeros(4), **change})


PROBE = """
from tests import test_norm as t
from sparse_stgcn.kernels import _native
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for case in t.CASES: t.test_matches_the_reference(case, "both"); t.test_matches_the_reference(case, "relu")
t.test_bit_equal_over_runs_and_threads()
print("OK")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    forced_isa.run(isa, PROBE)
