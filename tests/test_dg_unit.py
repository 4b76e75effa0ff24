"""kernels.dg_unit against norm, ReLU and dg_aggregate one after the other, and in DG-STGCN's unit."""
from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparse_stgcn import compact, create_model, sparsify
from sparse_stgcn.kernels import _native
from sparse_stgcn.kernels import dg_unit as module
from sparse_stgcn.kernels.dg_unit import dg_unit
from sparse_stgcn.kernels.dispatch import forced_backend
from tests import unit_cases
from tests.kernel_cases import STRIDES, normal, strided

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

# N, K, C, T, V
CASES = {"ntu": (3, 2, 4, 7, 25), "coco": (2, 3, 2, 9, 17), "wide": (2, 1, 3, 5, 40), "one_frame": (3, 2, 3, 1, 4),
         "one_joint": (3, 2, 2, 4, 1), "more_samples_than_ranges": (19, 2, 2, 3, 5)}


def arguments(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous", grid: bool = True
              ) -> tuple[list[Tensor], str]:
    """x, weight, bias, x1, x2, alpha, beta, A. x lies on a ``grid``, so that no ReLU is decided by a rounding error."""
    batch, subsets, channels, frames, joints = CASES[case]
    draw = lambda seed, *shape: normal(*shape, seed=seed).to(dtype)
    x = 3 + 2 * draw(1, batch, subsets * channels, frames, joints)
    return [strided((4 * x).round() / 4 if grid else x, kind), draw(2, subsets * channels), draw(3, subsets * channels),
            draw(4, batch, subsets, channels, joints), draw(5, batch, subsets, channels, joints), draw(6, 1)[0], draw(7, 1)[0],
            draw(8, subsets, joints, joints)], case


def run(given: list[Tensor], case: str, dy: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y, mean, variance = dg_unit(*leaves, 1e-4)
    assert not mean.requires_grad and not variance.requires_grad and y.is_contiguous()
    return [y.detach(), mean, variance, *torch.autograd.grad(y, leaves, dy)]


def gradient(case: str, dtype: torch.dtype = torch.float64, kind: str = "contiguous") -> Tensor:
    batch, subsets, channels, frames, joints = CASES[case]
    return strided(normal(batch, subsets * channels, frames, joints, seed=9).to(dtype), kind)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str) -> None:
    unit_cases.against_the_reference(sys.modules[__name__], case)


@native
@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("dy_kind", STRIDES)
def test_any_strides(kind: str, dy_kind: str) -> None:
    unit_cases.any_strides(sys.modules[__name__], "ntu", kind, dy_kind)


@native
def test_gradcheck() -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments("one_frame", grid=False)[0]]
    assert torch.autograd.gradcheck(lambda *given: dg_unit(*given)[0], leaves)


def some_read(case: str) -> Tensor:
    """Two of three channels are read."""
    return -(torch.arange(CASES[case][1] * CASES[case][2]) % 3 == 1).int()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "reference"])
def test_channels_that_nobody_reads(case: str, backend: str) -> None:
    """They are 0; all else is as if their gradient had been 0."""
    (given, _), read = arguments(case), some_read(case)
    dy = gradient(case).masked_fill((read < 0)[:, None, None], 0)
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    with forced_backend(backend):
        y, *moments = dg_unit(*leaves, 1e-4, read)
        gradients = torch.autograd.grad(y, leaves, gradient(case))
        whole = run(given, case, dy)
    assert not y[:, read < 0].any()
    for a, b in zip([y[:, read >= 0], *moments, *gradients], [whole[0][:, read >= 0], *whole[1:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@native
@pytest.mark.parametrize("case", ["ntu", "more_samples_than_ranges"])
def test_bit_equal_over_runs_and_threads(case: str) -> None:
    unit_cases.bit_equal_over_threads(sys.modules[__name__], case)


@native
def test_nothing_but_the_arguments_is_stored() -> None:
    (given, _), stored = arguments("ntu", torch.float32), []
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        dg_unit(*leaves)
    inputs = {x.data_ptr() for x in leaves}
    assert all(t.data_ptr() in inputs or t.dim() == 1 for t in stored)


@native
def test_opcheck_and_fullgraph() -> None:
    given, case = arguments("ntu", torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    loss = lambda *tensors: dg_unit(*tensors)[0].square().sum()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(a, b)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for read in (None, some_read(case)):
        torch.library.opcheck(torch.ops.sparse_stgcn.dg_unit, (*given, read, 1e-5), test_utils=tests)
        _, mean, rstd, _ = torch.ops.sparse_stgcn.dg_unit(*given, read, 1e-5)
        arguments_of_backward = (gradient(case, torch.float32), *given, mean, rstd, read)
        torch.library.opcheck(torch.ops.sparse_stgcn.dg_unit_backward, arguments_of_backward, test_utils=tests)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(2, 7, 6, 25)}, ValueError, "x of shape"),
    ({"x": torch.zeros(2, 8, 6, 24)}, ValueError, "x of shape"),
    ({"weight": torch.zeros(4)}, ValueError, r"weight and bias of shape \(8,\)"),
    ({"bias": torch.zeros(8, dtype=torch.float64)}, TypeError, "weight and bias to have the dtype of x"),
    ({"A": torch.zeros(2, 24, 24)}, ValueError, "A of shape"),
    ({"alpha": torch.zeros(2)}, ValueError, "alpha to be one number"),
    ({"x": torch.zeros(1, 8, 1, 1), "x1": torch.zeros(1, 2, 4, 1), "x2": torch.zeros(1, 2, 4, 1), "A": torch.zeros(2, 1, 1)},
     ValueError, "at least two values per channel"),
])
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(2, 8, 6, 25), "weight": torch.zeros(8), "bias": torch.zeros(8), "x1": torch.zeros(2, 2, 4, 25),
             "x2": torch.zeros(2, 2, 4, 25), "alpha": torch.zeros(1), "beta": torch.zeros(1), "A": torch.zeros(2, 25, 25),
             **change}
    with pytest.raises(error, match=message):
        dg_unit(**given)


@native
@pytest.mark.parametrize("stage", ["dense", "compact"])
def test_the_unit_takes_it_in_training(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one op, with a hook on the norm, its ReLU or what holds them, and in eval mode."""
    torch.manual_seed(0)
    model = create_model("dgstgcn", 5, base_channels=16).double().train()
    if stage == "compact":
        compact(sparsify(model, 0.6, (8, 1)))
    unit, x, made = model.backbone.blocks[1].gcn, normal(2, 16, 6, 25, seed=1).double(), []
    real = torch.ops.sparse_stgcn
    monkeypatch.setattr(module, "_ops", SimpleNamespace(dg_unit=lambda *a: made.append(1) or real.dg_unit(*a),
                                                        dg_unit_backward=real.dg_unit_backward))
    results = []
    for watched in ("", "pre", "pre.1", "pre.2", "apart"):
        other, leaf = copy.deepcopy(unit), x.clone().requires_grad_()
        del made[:]
        if watched == "apart":
            monkeypatch.setattr("sparse_stgcn.backbones.dgstgcn.norm_fuses", lambda *a: False)
        elif watched:
            other.get_submodule(watched).register_forward_hook(lambda *_: None)
        y = other(leaf)
        y.square().sum().backward()
        assert len(made) == (not watched), watched
        results.append([y.detach(), leaf.grad, *(p.grad for p in other.parameters()), *other.buffers()])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    unit_cases.on_an_instruction_set(isa, "test_dg_unit")
