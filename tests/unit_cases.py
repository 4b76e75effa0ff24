"""What the tests of ops with rows made on the way share: test_{aa,ctr,dg}_unit.py and test_branches.py."""
from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from sparse_stgcn.kernels.dispatch import forced_backend
from tests import forced_isa


def on_an_instruction_set(isa: str, tests: str) -> None:
    """The cases of tests.``tests`` against the reference in float64, with an instruction set forced."""
    forced_isa.run(isa, """
from sparse_stgcn.kernels import _native
if _native.isa != {isa!r}:
    print("SKIP", _native.reason)
    raise SystemExit
from tests import TESTS, unit_cases
for case in TESTS.CASES:
    unit_cases.against_the_reference(TESTS, case)
print("OK")
""".replace("TESTS", tests))


def against_the_reference(tests: ModuleType, case: str, **form: bool) -> None:
    """Result and gradients of a case, native in float64 and float32, and the reference in float64.

    ``tests`` has arguments(case, dtype), gradient(case, dtype) and run(given, *patterns, gradient, bias=...).
    """
    bias = {"bias": form["bias"]} if "bias" in form else {}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        given, *patterns = tests.arguments(case, dtype, **{name: on for name, on in form.items() if name != "bias"})
        got = tests.run(given, *patterns, tests.gradient(case, dtype), **bias)
        with forced_backend("reference"):
            exact = tests.run([tensor.double() for tensor in given], *patterns, tests.gradient(case, dtype).double(), **bias)
        for index, (a, e) in enumerate(zip(got, exact, strict=True)):
            assert a.dtype == dtype
            scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
            torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * scale, msg=lambda m, i=index: f"result {i}: {m}")


def any_strides(tests: ModuleType, case: str, kind: str, gradient_kind: str) -> None:
    """Result and gradients of a case do not depend on the strides of x and of the gradient that comes in."""
    strided, plain = tests.arguments(case, kind=kind), tests.arguments(case)
    got = tests.run(*strided, tests.gradient(case, kind=gradient_kind))
    for a, b in zip(got, tests.run(*plain, tests.gradient(case)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def bit_equal_over_threads(tests: ModuleType, case: str) -> None:
    """Result and gradients of a case in float32, run by run and for any number of threads."""
    given, *patterns = tests.arguments(case, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            results.append(tests.run(given, *patterns, tests.gradient(case, torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def trains_alike(unit: nn.Module, x: Tensor, watched: str, backbone: ModuleType, calls: list, wanted: int,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a backbone's unit as it is, with a hook on its layer ``watched``, and with its layers one by one.

    ``calls`` grows whenever the op in question runs: ``wanted`` times in the first step, and in no other.
    """
    results = []
    for way in ("one", "hook", "apart"):
        other, leaf = copy.deepcopy(unit), x.clone().requires_grad_()
        if way == "hook":
            other.get_submodule(watched).register_forward_hook(lambda *_: None)
        if way == "apart":
            monkeypatch.setattr(backbone, "live_stack", lambda convs: None)
        other(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in other.parameters())])
        assert len(calls) == wanted, way
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
