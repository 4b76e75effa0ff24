from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_stgcn.kernels import _native, max_pool
from sparse_stgcn.kernels import reference_units as reference
from sparse_stgcn.layers import run_units
from tests import forced_isa
from tests.kernel_cases import STRIDES, integers, normal, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

SHAPES = {"ntu": (2, 5, 20, 25), "odd": (3, 2, 7, 26), "one_frame": (2, 3, 1, 25), "two_frames": (2, 3, 2, 4),
          "three_frames": (1, 2, 3, 1), "clip": (1, 2, 100, 25)}


def run(op, x, dy, stride):
    x = x.detach().requires_grad_()
    y = op(x, stride)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def example(case, stride, dtype=torch.float32, make=normal):
    batch, channels, frames, joints = SHAPES[case]
    shape = (batch, channels, -(-frames // stride), joints)
    return make(*SHAPES[case], seed=1, dtype=dtype), integers(*shape, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("case", SHAPES)
def test_bit_equal_to_torch(case, stride, dtype):
    # Gradients are small integers, so that their sums are exact in any order; small integers in x tie often.
    for make in (normal, lambda *shape, seed, dtype: integers(*shape, seed=seed, low=-1, high=2, dtype=dtype)):
        x, dy = example(case, stride, dtype, make)
        for a, b in zip(run(max_pool, x, dy, stride), run(reference.max_pool, x, dy, stride), strict=True):
            assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_of_equals_wins(stride):
    x, dy = torch.zeros(1, 1, 6, 3), torch.ones(1, 1, -(-6 // stride), 3)
    _, dx = run(max_pool, x, dy, stride)
    assert dx[0, 0, :, 0].tolist() == ([2, 1, 1, 1, 1, 0] if stride == 1 else [1, 1, 0, 1, 0, 0])
    assert torch.equal(dx, run(reference.max_pool, x, dy, stride)[1])


@pytest.mark.parametrize("stride", [1, 2])
def test_numbers_that_are_none_and_infinities_as_torch(stride):
    x, dy = example("ntu", stride)
    kind = integers(*x.shape, seed=3, low=0, high=6)
    x = x.masked_fill(kind == 0, float("nan")).masked_fill(kind == 1, float("-inf")).masked_fill(kind == 2, float("inf"))
    for a, b in zip(run(max_pool, x, dy, stride), run(reference.max_pool, x, dy, stride), strict=True):
        assert torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides(kind):
    x, dy = example("ntu", 2)
    for a, b in zip(run(max_pool, strided(x, kind), strided(dy, kind), 2), run(reference.max_pool, x, dy, 2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride):
    x = torch.randperm(2 * 2 * 7 * 3, generator=torch.Generator().manual_seed(0)).double().view(2, 2, 7, 3)
    assert torch.autograd.gradcheck(lambda x: max_pool(x, stride), [x.requires_grad_()])


def test_bit_equal_over_threads():
    before, results = torch.get_num_threads(), []
    x, dy = normal(3, 5, 20, 25, seed=1), normal(3, 5, 20, 25, seed=2)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(max_pool, x, dy, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_unit_pools_natively_where_it_may(monkeypatch):
    called, plain = [], reference.max_pool
    monkeypatch.setattr("sparse_stgcn.layers.max_pool", lambda x, stride: called.append(stride) or plain(x, stride))
    x = normal(1, 2, 6, 5, seed=1)
    pool, seen = nn.MaxPool2d((3, 1), (2, 1), (1, 0)), []
    assert torch.equal(run_units([pool], x), pool(x)) and called == [2]
    for other in (nn.MaxPool2d(3, 1, 1), nn.MaxPool2d((3, 1), 2, (1, 0)), nn.MaxPool2d((3, 1), (1, 1), (1, 0), ceil_mode=True)):
        assert torch.equal(run_units([other], x), other(x)) and called == [2]
    pool.register_forward_hook(lambda *_: seen.append(1))
    run_units([pool], x)
    assert seen == [1] and called == [2]


def test_opcheck_and_fullgraph():
    x, dy = example("ntu", 2)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.max_pool, (x, 2), test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.max_pool_backward, (dy, x, 2, torch.empty_like(x)), test_utils=tests)
    compiled = torch.compile(lambda x: max_pool(x, 2).square().sum(), fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    assert torch.equal(*torch.autograd.grad(compiled(x), x), *torch.autograd.grad(max_pool(x, 2).square().sum(), x))


def test_errors():
    with pytest.raises(ValueError, match="x of shape"):
        max_pool(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="stride of at least 1"):
        max_pool(torch.zeros(2, 3, 4, 5), 0)


PROBE = """
import torch
from tests import test_pool as t
from sparse_stgcn.kernels import _native
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for case in t.SHAPES:
    for stride in (1, 2): t.test_bit_equal_to_torch(case, stride, torch.float32)
t.test_numbers_that_are_none_and_infinities_as_torch(1)
print("OK")
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    forced_isa.run(isa, PROBE)
