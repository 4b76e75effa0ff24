from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from sparse_stgcn.backbones import aagcn
from sparse_stgcn.backbones.aagcn import AdaptiveGraphUnit
from sparse_stgcn.kernels import _native, attend
from sparse_stgcn.kernels import reference_units as reference
from sparse_stgcn.kernels.dispatch import forced_backend
from tests import forced_isa
from tests.kernel_cases import STRIDES, normal, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (N, C, T, V, taps along joints, taps along frames, H)
CASES = {
    "ntu": (2, 6, 20, 25, 25, 9, 3),
    "coco": (3, 5, 11, 17, 17, 9, 2),
    "less_than_a_vector": (2, 3, 5, 3, 3, 9, 1),
    "one_pixel": (2, 3, 1, 1, 1, 1, 4),
    "more_joints_than_four_vectors": (2, 2, 3, 70, 5, 3, 9),
    "wide": (2, 40, 7, 32, 31, 9, 20),
    "clip": (1, 4, 100, 25, 25, 9, 2),
}


def arguments(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous") -> tuple[list[Tensor], Tensor]:
    batch, channels, frames, joints, joint_taps, frame_taps, hidden = CASES[case]
    part = lambda seed, *shape: normal(*shape, seed=seed, dtype=dtype)
    weights = [part(1, 1, channels, joint_taps) / 3, part(2, 1), part(3, 1, channels, frame_taps) / 3, part(4, 1),
               part(5, hidden, channels), part(6, hidden), part(7, channels, hidden), part(8, channels)]
    shape = (batch, channels, frames, joints)
    return [strided(part(9, *shape) + 0.3, kind), *weights], strided(part(10, *shape), kind)


def run(op, given: list[Tensor], dout: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_close(got: list[Tensor], exact: list[Tensor], eps: float, what: str) -> None:
    for i, (a, e) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == e.shape and (a.double() - e).abs().max() <= eps * max(1.0, float(e.abs().max())), (what, i)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case):
    assert_close(run(attend, *arguments(case)), run(reference.attend, *arguments(case)), 1e-12, "float64")
    given, dout = arguments(case, torch.float32)
    exact = run(reference.attend, [tensor.double() for tensor in given], dout.double())
    # A sum of n numbers of either sign, n up to 2500 here, in float32: eps sqrt(n) on the scale of its largest terms.
    assert_close(run(attend, given, dout), exact, 8e-6, "float32")


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides(kind):
    assert_close(run(attend, *arguments("ntu", kind=kind)), run(reference.attend, *arguments("ntu")), 1e-12, kind)


@pytest.mark.parametrize("case", ["coco", "less_than_a_vector"])
def test_gradcheck(case):
    given, _ = arguments(case)
    given[0] = given[0][:2, :, :4]
    assert torch.autograd.gradcheck(attend, [tensor.detach().requires_grad_() for tensor in given])


def test_closed_hidden_units_have_no_gradient():
    given, dout = arguments("ntu")
    given[6].fill_(-100)  # fc1's bias: no hidden unit is open
    result = run(attend, given, dout)
    assert_close(result, run(reference.attend, given, dout), 1e-12, "closed")
    assert not result[6].any() and not result[7].any() and result[1].any()


def test_a_sample_that_is_not_a_number_stays_alone():
    given, _ = arguments("ntu", torch.float32)
    given[0][1, 2, 3, 4] = float("nan")
    out = attend(*given)
    assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("case", ["ntu", "wide"])
def test_bit_equal_over_runs_and_threads(case):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(attend, *arguments(case, torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck_and_fullgraph():
    (y, *parameters), dout = arguments("ntu", torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.attend, (y, parameters), test_utils=tests)
    _, state = torch.ops.sparse_stgcn.attend(y, parameters)
    torch.library.opcheck(torch.ops.sparse_stgcn.attend_backward, (dout, y, parameters, state), test_utils=tests)
    leaves = [tensor.requires_grad_() for tensor in (y, *parameters)]
    loss = lambda *given: attend(*given).square().sum()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)


def unit() -> AdaptiveGraphUnit:
    torch.manual_seed(0)
    unit = AdaptiveGraphUnit(8, 8, torch.rand(3, 25, 25)).double()
    for parameter in unit.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return unit


@pytest.mark.parametrize("training", [True, False])
def test_the_unit_is_the_same_on_every_path(training):
    x, results = normal(2, 8, 6, 25, seed=1, dtype=torch.float64), []
    for path in ("native", "hook", "reference"):
        module = copy.deepcopy(unit()).train(training)
        if path == "hook":
            seen = []
            module.conv_ta.register_forward_hook(lambda *_: seen.append(1))  # noqa: B023  called within the turn
        with forced_backend("reference" if path == "reference" else "native"):
            module(x).square().sum().backward()
        if path == "hook":
            assert seen == [1]
        results.append([parameter.grad for parameter in module.parameters()])
    for other in results[1:]:
        assert_close(other, results[0], 1e-10, "paths")


def test_autocast_widens_what_is_attended_to(monkeypatch):
    module, x = unit().float(), normal(2, 8, 6, 25, seed=1)
    plain, calls = module(x), []
    monkeypatch.setattr(aagcn, "attend", lambda *a: calls.append(a[0].dtype) or attend(*a))
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # none of the unit's ops falls back
        y = module(x)
    assert calls == [torch.float32] and y.dtype == torch.float32
    torch.testing.assert_close(y, plain, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(("at", "tensor", "error", "message"), [
    (0, torch.zeros(2, 6, 20), ValueError, "y of shape"),
    (1, torch.zeros(1, 6, 24), ValueError, "joint_weight of shape"),
    (3, torch.zeros(1, 5, 9), ValueError, "frame_weight of shape"),
    (5, torch.zeros(3, 5), ValueError, "fc1_weight of shape"),
    (8, torch.zeros(5), ValueError, "fc2_bias of shape"),
    (2, torch.zeros(1), TypeError, "dtype of y"),
], ids=lambda value: str(value)[:12])
def test_errors(at, tensor, error, message):
    given, _ = arguments("ntu")
    given[at] = tensor if error is TypeError else tensor.double()
    with pytest.raises(error, match=message):
        attend(*given)


PROBE = """
from tests import test_attend as t
from sparse_stgcn.kernels import _native
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for case in t.CASES: t.test_matches_the_reference(case)
t.test_bit_equal_over_runs_and_threads("ntu")
print("OK")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    forced_isa.run(isa, PROBE)
