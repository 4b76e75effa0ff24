from __future__ import annotations

import warnings

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern, Lasso, _native, reference, temporal_conv
from tests import forced_isa
from tests.kernel_cases import BLOCKS, STRIDES, assert_rounded_once, assert_within, integers, normal, random_pattern, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# (O, I, K), T, V, stride, dilation
CASES = {
    "9x1": ((16, 12, 9), 20, 25, 1, 1),
    "1x1": ((24, 10, 1), 13, 17, 1, 1),
    "9x1_stride2": ((16, 12, 9), 21, 25, 2, 1),
    "1x1_stride2": ((16, 12, 1), 10, 25, 2, 1),
    "1x1_stride3": ((8, 5, 1), 11, 4, 3, 1),
    "5x1_dilation2": ((16, 12, 5), 20, 25, 1, 2),
    "3x1_dilation4_stride2": ((14, 10, 3), 19, 26, 2, 4),
    "ragged": ((21, 11, 3), 9, 18, 1, 1),
    "shorter_than_kernel": ((16, 12, 9), 3, 25, 1, 1),
    "one_frame": ((16, 12, 9), 1, 25, 2, 1),
    "one_joint": ((16, 12, 9), 30, 1, 1, 1),
    "wide": ((8, 3, 3), 7, 40, 1, 1),
}


def run(op, x, values, pattern, bias, stride, dilation, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (values, bias)]
    x = x.detach().requires_grad_()
    y = op(x, leaves[0], pattern, leaves[1], stride, dilation)
    return y.detach(), *torch.autograd.grad(y, (x, *leaves), dy)


def check(shape, T, V, stride, dilation, block, x_kind="contiguous", dy_kind="contiguous", N=2):
    p = random_pattern(shape, block, 0.3)
    x, bias = normal(N, shape[1], T, V, seed=1), normal(shape[0], seed=2)
    values = p.gather(normal(*shape, seed=3))
    dy = normal(N, shape[0], -(-T // stride), V, seed=4)
    got = run(temporal_conv, strided(x, x_kind), values, p, bias, stride, dilation, strided(dy, dy_kind))
    exact = run(reference.temporal_conv, x.double(), values.double(), p, bias.double(), stride, dilation, dy.double())
    size = run(reference.temporal_conv, *(t.double().abs() for t in (x, values)), p, bias.double().abs(), stride, dilation,
               dy.double().abs())
    for name, a, e, m in zip(("y", "dx", "dvalues", "dbias"), got, exact, size, strict=True):
        assert_within(a, e, m, name)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, block):
    check(*CASES[case], block)


@pytest.mark.parametrize("x_kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
def test_any_strides_of_x_and_dy(x_kind, dy_kind):
    check(*CASES["9x1_stride2"], (8, 1), x_kind, dy_kind)
    check(*CASES["ragged"], (4, 4), x_kind, dy_kind)


def test_expanded_gradient():
    """loss.sum() hands a gradient of stride 0."""
    p = random_pattern((16, 12, 9), (8, 1), 0.3)
    x, values = normal(2, 12, 10, 25, seed=1), p.gather(normal(16, 12, 9, seed=3))
    ones = torch.ones(()).expand(2, 16, 10, 25)
    assert ones.stride() == (0, 0, 0, 0)
    got = run(temporal_conv, x, values, p, normal(16, seed=2), 1, 1, ones)
    want = run(temporal_conv, x, values, p, normal(16, seed=2), 1, 1, ones.contiguous())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", ["9x1", "3x1_dilation4_stride2", "ragged"])
def test_small_integers_are_exact(case, block):
    shape, T, V, stride, dilation = CASES[case]
    p = random_pattern(shape, block, 0.4)
    x, bias, values = integers(3, shape[1], T, V, seed=1), integers(shape[0], seed=2), p.gather(integers(*shape, seed=3))
    dy = integers(3, shape[0], -(-T // stride), V, seed=4)
    for a, b in zip(run(temporal_conv, x, values, p, bias, stride, dilation, dy),
                    run(reference.temporal_conv, *(t.double() for t in (x, values)), p, bias.double(), stride, dilation,
                        dy.double()), strict=True):
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize("case", ["9x1_stride2", "5x1_dilation2", "ragged", "shorter_than_kernel"])
def test_gradcheck(case):
    shape, T, _, stride, dilation = CASES[case]
    p = random_pattern((5, 4, shape[2]), (3, 2), 0.6)
    inputs = [normal(2, 4, min(T, 6), 3, seed=1, dtype=torch.float64), p.gather(normal(5, 4, shape[2], seed=2).double()),
              normal(5, seed=3, dtype=torch.float64)]
    inside = p.gather(torch.ones(5, 4, shape[2], dtype=torch.float64))  # what lies beyond a ragged edge is no parameter
    assert torch.autograd.gradcheck(lambda x, w, b: temporal_conv(x, w * inside, p, b, stride, dilation),
                                    [t.requires_grad_() for t in inputs])


def test_adjointness():
    """<W x, y> = <x, W^T y> and = <W, dW(x, y)>."""
    p = random_pattern((32, 24, 9), (8, 1), 0.2)
    x, dy = normal(2, 24, 17, 25, seed=1, dtype=torch.float64), normal(2, 32, 9, 25, seed=2, dtype=torch.float64)
    values = p.gather(normal(32, 24, 9, seed=3, dtype=torch.float64))
    y, dx, dvalues, _ = run(temporal_conv, x, values, p, torch.zeros(32, dtype=torch.float64), 2, 1, dy)
    assert (y * dy).sum().item() == pytest.approx((x * dx).sum().item(), rel=1e-12)
    assert (y * dy).sum().item() == pytest.approx((values * dvalues).sum().item(), rel=1e-12)


def test_frames_outside_do_not_leak():
    """Stale NaN in the workspaces and uninitialised outputs must not be seen."""
    p = random_pattern((16, 12, 9), (8, 1), 0.3)
    values, bias, dy = p.gather(normal(16, 12, 9, seed=3)), normal(16, seed=2), normal(2, 16, 5, 25, seed=4)
    clean = run(temporal_conv, normal(2, 12, 5, 25, seed=1), values, p, bias, 1, 1, dy)
    run(temporal_conv, torch.full((2, 12, 40, 25), float("nan")), values, p, bias, 1, 1,
        torch.full((2, 16, 40, 25), float("nan")))
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        again = run(temporal_conv, normal(2, 12, 5, 25, seed=1), values, p, bias, 1, 1, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", [(8, 1), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("N", [1, 2, 5])
def test_bit_equal_over_runs_and_threads(block, N):
    """Also where a batch has fewer samples than there are threads, so that a clip is cut."""
    p = random_pattern((64, 64, 9), block, 0.1)
    x, dy = normal(N, 64, 100, 25, seed=1), normal(N, 64, 100, 25, seed=4)
    values, bias = p.gather(normal(64, 64, 9, seed=3)), normal(64, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            results.append(run(temporal_conv, x, values, p, bias, 1, 1, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_long_clips_are_tiled():
    """A panel of 3000 frames exceeds any cache: several tiles, whose seams must not show."""
    check((8, 16, 9), 1500, 25, 1, 1, (8, 1), N=1)
    check((8, 16, 9), 1501, 25, 2, 1, (4, 1), N=1)


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (16, 16)], ids=str)
def test_empty_pattern_gives_the_bias(block):
    rows, cols = -(-16 // block[0]), -(-12 // block[1])
    p = BlockPattern.from_blocks(torch.zeros(rows, cols, 9, dtype=torch.bool), (16, 12, 9), block)
    bias = normal(16, seed=2)
    y, dx, dvalues, dbias = run(temporal_conv, normal(2, 12, 10, 25, seed=1), torch.zeros(p.values_shape), p, bias, 1, 1,
                                torch.ones(2, 16, 10, 25))
    assert torch.equal(y, bias[None, :, None, None].expand_as(y))
    assert not dx.any() and dvalues.numel() == 0
    assert torch.equal(dbias, torch.full((16,), 2.0 * 10 * 25))


def test_batch_of_zero():
    p = random_pattern((16, 12, 9), (8, 1), 0.3)
    y, dx, dvalues, dbias = run(temporal_conv, torch.zeros(0, 12, 10, 25), p.gather(torch.ones(16, 12, 9)), p, torch.ones(16),
                                1, 1, torch.zeros(0, 16, 10, 25))
    assert y.shape == (0, 16, 10, 25) and dx.shape == (0, 12, 10, 25)
    assert not dvalues.any() and not dbias.any()


def test_full_pattern_is_the_dense_convolution():
    p = BlockPattern.full((24, 16, 9), (8, 1))
    weight, x = normal(24, 16, 9, seed=1, dtype=torch.float64), normal(2, 16, 12, 25, seed=2, dtype=torch.float64)
    want = torch.nn.functional.conv2d(x, weight.unsqueeze(-1), padding=(4, 0))
    torch.testing.assert_close(temporal_conv(x, p.gather(weight), p), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (4, 4)], ids=str)
def test_lasso_is_fused_into_dw(block):
    """dW of all blocks, with scale * W added to the masked ones only."""
    kept = random_pattern((16, 12, 9), block, 0.3)
    full = BlockPattern.full((16, 12, 9), block)
    weight, x = normal(16, 12, 9, seed=1, dtype=torch.float64), normal(2, 12, 10, 25, seed=2, dtype=torch.float64)
    dy, scale = normal(2, 16, 10, 25, seed=3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    masked = ~kept.blocks().permute(0, 2, 1).reshape(-1)
    values = full.gather(weight).requires_grad_()
    plain, = torch.autograd.grad(temporal_conv(x, values, full), values, dy)
    fused, = torch.autograd.grad(temporal_conv(x, values, full, lasso=Lasso(masked, scale)), values, dy)
    want = full.scatter(plain) + scale * weight * ~kept.mask()
    torch.testing.assert_close(full.scatter(fused), want, rtol=1e-14, atol=1e-14)
    assert torch.equal(fused[~masked], plain[~masked])


def test_ragged_entries_get_no_gradient():
    p = BlockPattern.full((5, 3, 3), (4, 2))
    values = p.gather(normal(5, 3, 3, seed=1)).requires_grad_()
    gradient, = torch.autograd.grad(temporal_conv(normal(1, 3, 8, 4, seed=2), values, p).square().sum(), values)
    outside = p.gather(torch.ones(5, 3, 3)) == 0
    assert outside.any() and not gradient[outside].any()


def test_opcheck_and_fullgraph():
    p = random_pattern((16, 12, 9), (8, 1), 0.3)
    x = strided(normal(2, 12, 10, 25, seed=1), "channels_last").requires_grad_()
    values, bias = p.gather(normal(16, 12, 9, seed=3)).requires_grad_(), normal(16, seed=2)
    tail = (p.row_ptr, p.input, p.tap, list(p.shape), list(p.block), 2, 1)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparse_stgcn.temporal_conv, (x.detach(), values.detach(), bias, *tail), test_utils=tests)
    dy = normal(2, 16, 5, 25, seed=5)
    torch.library.opcheck(torch.ops.sparse_stgcn.temporal_conv_dx, (dy, values.detach(), *tail, 10), test_utils=tests)
    torch.library.opcheck(torch.ops.sparse_stgcn.temporal_conv_dw, (x.detach(), dy, values.detach(), None, None, *tail),
                          test_utils=tests)

    def loss(x, values):
        return temporal_conv(x, values, p, bias, 2, 1).relu().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, values), (x, values)), torch.autograd.grad(loss(x, values), (x, values)),
                    strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", [(8, 1), (4, 4), (3, 5), (1, 1)], ids=str)
def test_one_pass_over_a_1x1_gives_both_gradients(block):
    """As the two ops that make one of them each, with the lasso's term; also of no samples and for any number of threads."""
    p, A = random_pattern((21, 11, 1), block, 0.3), [[21, 11, 1], list(block)]
    for samples, frames in ((3, 60), (0, 7), (2, 1)):
        x, values = strided(normal(samples, 11, frames, 25, seed=1), "slice"), p.gather(normal(21, 11, 1, seed=3))
        dy = strided(normal(samples, 21, frames, 25, seed=4), "channels_last")
        masked, scale = torch.arange(p.num_blocks) % 2 == 0, torch.tensor(0.3)
        ops, index, before, results = torch.ops.sparse_stgcn, (p.row_ptr, p.input, p.tap), torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.pointwise_conv_backward(x, dy, values, masked, scale, *index, *A))
        finally:
            torch.set_num_threads(before)
        alone = (ops.temporal_conv_dx(dy, values, *index, *A, 1, 1, frames),
                 *ops.temporal_conv_dw(x, dy, values, masked, scale, *index, *A, 1, 1))
        for got, *others, want in zip(*results, alone, strict=True):
            assert all(torch.equal(got, other) for other in others)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    torch.library.opcheck(ops.pointwise_conv_backward, (x, dy, values, None, None, *index, *A),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(2, 11, 10, 25)}, ValueError, "x of shape"),
    ({"values": torch.zeros(1, 1, 8)}, ValueError, "values of shape"),
    ({"bias": torch.zeros(3)}, ValueError, "bias of shape"),
    ({"bias": torch.zeros(16, dtype=torch.float64)}, TypeError, "dtype of x"),
    ({"stride": 0}, ValueError, "stride"),
    ({"dilation": 0}, ValueError, "dilation"),
    ({"pattern": BlockPattern.full((16, 12, 4))}, ValueError, "odd number of taps"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_bad_arguments_are_refused(change, error, message):
    p = BlockPattern.full((16, 12, 9))
    arguments = {"x": torch.zeros(2, 12, 10, 25), "values": torch.zeros(p.values_shape), "pattern": p, "bias": torch.zeros(16),
                 "stride": 1, "dilation": 1, **change}
    with pytest.raises(error, match=message):
        temporal_conv(**arguments)


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("case", ["9x1", "9x1_stride2", "1x1", "ragged"])
def test_bfloat16_is_summed_in_float32(case, block):
    shape, T, V, stride, dilation = CASES[case]
    p = random_pattern(shape, block, 0.3)
    x, bias, values, dy = (t.bfloat16() for t in (normal(2, shape[1], T, V, seed=1), normal(shape[0], seed=2),
                                                  p.gather(normal(*shape, seed=3)),
                                                  normal(2, shape[0], -(-T // stride), V, seed=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(temporal_conv, strided(x, "slice"), values, p, bias, stride, dilation, strided(dy, "channels_last"))
    double = [t.double() for t in (x, values, bias, dy)]
    exact = run(reference.temporal_conv, *double[:2], p, double[2], stride, dilation, double[3])
    size = run(reference.temporal_conv, *(t.abs() for t in double[:2]), p, double[2].abs(), stride, dilation, double[3].abs())
    for name, a, e, m in zip(("y", "dx", "dvalues", "dbias"), got, exact, size, strict=True):
        assert_rounded_once(a, e, m, name)


@pytest.mark.parametrize("N", [1, 2, 3, 17])
@pytest.mark.parametrize("case", ["9x1", "9x1_stride2", "5x1_dilation2", "one_joint", "wide"])
def test_strips_of_frames_and_samples_share_vectors(case, N):
    """Few outputs a block: lanes hold joints of several samples and of several strips of a clip, whose seams must not show."""
    shape, _, V, stride, dilation = CASES[case]
    for block in ((1, 1), (2, 1)):
        check(shape, 83, V, stride, dilation, block, N=N, x_kind="slice", dy_kind="every_second")


def test_half_precision_falls_back_with_one_warning():
    from sparse_stgcn.kernels import dispatch

    p = random_pattern((16, 12, 9), (8, 1), 0.3)
    dispatch._warned.clear()
    x, values = normal(2, 12, 10, 25, seed=1).half(), p.gather(normal(16, 12, 9, seed=3)).half()
    with pytest.warns(UserWarning, match="dense PyTorch reference"):
        y = temporal_conv(x, values, p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        temporal_conv(x, values, p)
    assert y.dtype == torch.float16


ISAS = ["avx512", "avx2", "baseline"]
PROBE = """
import torch
from sparse_stgcn.kernels import _native
from tests import test_temporal_conv as t, test_graph_conv as g
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for case in t.CASES: t.check(*t.CASES[case], (8, 1)); t.check(*t.CASES[case], (3, 5)); t.check(*t.CASES[case], (1, 1))
t.test_small_integers_are_exact("9x1", (8, 1)); t.test_gradcheck("ragged"); t.test_bit_equal_over_runs_and_threads((8, 1), 1)
for case in g.CASES: g.check(*g.CASES[case], (8, 1)); g.check(*g.CASES[case], (3, 5))
g.test_small_integers_are_exact((8, 1)); g.test_gradcheck((3, 2))
print("OK")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    """The same checks with the instruction set forced, in a process of its own."""
    forced_isa.run(isa, PROBE)
