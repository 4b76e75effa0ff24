"""The convolutions of activations stored in bfloat16: sums are float32, in a fixed order, and are rounded once."""
from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern, Lasso, _native, graph_conv, reference, temporal_conv
from tests import forced_isa
from tests import test_graph_conv as graph_tests
from tests import test_temporal_conv as temporal_tests
from tests.kernel_cases import assert_rounded_once, assert_within, integers, normal, random_pattern, strided

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

BLOCKS = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (5, 2), (16, 16)]
CASES = ["9x1", "9x1_stride2", "3x1_dilation4_stride2", "1x1_stride3", "ragged", "shorter_than_kernel", "one_joint", "wide"]
BF16 = torch.bfloat16


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_temporal_conv(case, block):
    temporal_tests.test_bfloat16_is_summed_in_float32(case, block)


@pytest.mark.parametrize("case", ["sparse", "ragged"])
def test_graph_conv(case):
    graph_tests.test_bfloat16_is_summed_in_float32(case, (16, 1))


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (5, 2)], ids=str)
def test_small_integers_are_exact(block):
    """Sums of small integers have no error, so every path must give their rounding, and a weight's gradient itself."""
    p = random_pattern((16, 12, 9), block, 0.4)
    x, dy = integers(3, 12, 40, 25, seed=1), integers(3, 16, 40, 25, seed=4)
    values, bias = p.gather(integers(16, 12, 9, seed=3)), integers(16, seed=2)
    want = temporal_tests.run(reference.temporal_conv, x.double(), values.double(), p, bias.double(), 1, 1, dy.double())
    got = temporal_tests.run(temporal_conv, x.to(BF16), values.to(BF16), p, bias.to(BF16), 1, 1, dy.to(BF16))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.to(BF16))
    tail = (p.row_ptr, p.input, p.tap, list(p.shape), list(p.block), 1, 1)
    raw = torch.ops.sparse_stgcn.temporal_conv_dw(x.to(BF16), dy.to(BF16), values, None, None, *tail)
    for a, b in zip(raw, want[2:], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.double(), b)


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (3, 5)], ids=str)
def test_bit_equal_for_any_number_of_threads(block):
    """Both convolutions, the pass for both gradients of a 1x1 among them."""
    temporal, pointwise, graph = (random_pattern((24, 12, taps), block, 0.3) for taps in (9, 1, 3))
    x, dy = normal(3, 12, 50, 25, seed=1).to(BF16), normal(3, 24, 50, 25, seed=2).to(BF16)
    values = [p.gather(normal(*p.shape, seed=3)).to(BF16).requires_grad_() for p in (temporal, pointwise, graph)]
    A, per_sample = (normal(*size, 25, 25, seed=4).to(BF16).requires_grad_() for size in ((3,), (3, 3)))
    leaf, before, results = x.requires_grad_(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ys = (temporal_conv(leaf, values[0], temporal), temporal_conv(leaf, values[1], pointwise),
                  graph_conv(leaf, values[2], graph, A), graph_conv(leaf, values[2], graph, per_sample))
            results.append([*ys, *torch.autograd.grad(ys, (leaf, *values, A, per_sample), [dy] * len(ys))])
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert one.dtype == BF16 and all(torch.equal(one, other) for other in others)


def test_weights_of_more_digits_are_not_rounded():
    """The raw ops take float32 weights beside bfloat16 activations."""
    p = random_pattern((16, 12, 9), (8, 1), 0.4)
    x, dy = normal(2, 12, 20, 25, seed=1).to(BF16), normal(2, 16, 20, 25, seed=2).to(BF16)
    values = p.gather(normal(16, 12, 9, seed=3))
    tail = (p.row_ptr, p.input, p.tap, list(p.shape), list(p.block), 1, 1)
    leaf, weight = x.double().requires_grad_(), values.double()
    exact = reference.temporal_conv(leaf, weight, p)
    dx, = torch.autograd.grad(exact, leaf, dy.double())
    size = reference.temporal_conv(leaf.detach().abs().requires_grad_(), weight.abs(), p)
    assert_rounded_once(torch.ops.sparse_stgcn.temporal_conv(x, values, None, *tail), exact.detach(), size.detach(), "y")
    leaf = torch.zeros_like(leaf).requires_grad_()
    size, = torch.autograd.grad(reference.temporal_conv(leaf, weight.abs(), p), leaf, dy.double().abs())
    assert_rounded_once(torch.ops.sparse_stgcn.temporal_conv_dx(dy, values, *tail, 20), dx, size, "dx")


@pytest.mark.parametrize("block", [(1, 1), (8, 1)], ids=str)
def test_lasso_is_fused_into_dw(block):
    p = random_pattern((16, 12, 9), block, 0.3)
    x, dy = normal(2, 12, 20, 25, seed=1).to(BF16), normal(2, 16, 20, 25, seed=2).to(BF16)
    values, masked = p.gather(normal(16, 12, 9, seed=3)).to(BF16), torch.arange(p.num_blocks) % 2 == 0
    tail = (p.row_ptr, p.input, p.tap, list(p.shape), list(p.block), 1, 1)
    plain, fused = (torch.ops.sparse_stgcn.temporal_conv_dw(x, dy, values.float(), *term, *tail)[0]
                    for term in (Lasso(None, None), Lasso(masked, torch.tensor(0.5))))
    assert torch.equal(fused[~masked], plain[~masked])
    term = 0.5 * values.float()
    assert_within(fused[masked], (plain + term)[masked].double(), (plain.abs() + term.abs())[masked], "dvalues")


def test_rounding_is_to_nearest_even_and_keeps_what_is_no_number():
    """1 * x of sums with ties, overflow, infinities and NaN, as torch rounds them."""
    numbers = [1.0, 1.0078125, -1.0, 3.3895313892515355e38, float("inf"), float("-inf"), float("nan"), 0.0, 2.0**-100]
    halves = [0.00390625, 0.00390625, -0.00390625, 1.3240357e36, 1.0, 1.0, 1.0, -0.0, 2.0**-107]
    x = torch.tensor([numbers, halves], dtype=BF16).view(1, 2, 1, -1).repeat(1, 1, 1, 5)
    want = x.float().sum(1, keepdim=True).to(BF16)
    for block in ((8, 1), (1, 1)):
        p = BlockPattern.full((8, 2, 1), block)
        y = temporal_conv(x, torch.ones(p.values_shape, dtype=BF16), p)
        assert torch.equal(y.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0).expand_as(y)), block
        assert torch.equal(y.isnan(), want.isnan().expand_as(y)), block


@pytest.mark.parametrize("x_kind", ["transposed", "every_second"])
@pytest.mark.parametrize("block", [(1, 1), (8, 1)], ids=str)
def test_any_strides(block, x_kind):
    p = random_pattern((16, 12, 9), block, 0.3)
    x, values = normal(2, 12, 20, 25, seed=1).to(BF16), p.gather(normal(16, 12, 9, seed=3)).to(BF16)
    assert torch.equal(temporal_conv(strided(x, x_kind), values, p), temporal_conv(x, values, p))


PROBE = """
import torch
from sparse_stgcn.kernels import _native
from tests import test_bfloat16 as b, test_graph_conv as g
if _native.isa != {isa!r}: print("SKIP", _native.reason); raise SystemExit
for block in b.BLOCKS:
    for case in b.CASES: b.test_temporal_conv(case, block)
for block in ((1, 1), (8, 1), (5, 2)): b.test_small_integers_are_exact(block); b.test_bit_equal_for_any_number_of_threads(block)
for block in ((1, 1), (8, 1)): b.test_lasso_is_fused_into_dw(block); b.test_any_strides(block, "every_second")
b.test_weights_of_more_digits_are_not_rounded(); b.test_rounding_is_to_nearest_even_and_keeps_what_is_no_number()
g.test_bfloat16_is_summed_in_float32("ragged", (8, 1)); g.test_bfloat16_is_summed_in_float32("sparse", (1, 1))
print("OK")
"""


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set(isa):
    """The same checks with the instruction set forced, in a process of its own."""
    forced_isa.run(isa, PROBE)
