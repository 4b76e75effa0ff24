"""No row without a check: a benchmark whose output was not compared with the reference fails."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_stgcn.benchmark.measure import check, environment
from tests.conftest import pytest_collection_modifyitems  # noqa: F401  (skips what needs a GPU, with the reason)

THREADS = 1  # one thread: a second one on a shared machine measures its neighbours


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checked(benchmark) -> Callable[..., None]:
    """checked(run, reference, tolerance): compare run()'s output with reference(), then time run()."""

    def run_checked(run: Callable[[], Tensor], reference: Callable[[], Tensor], tolerance: float = 1e-4) -> None:
        benchmark.extra_info.update(environment(), error=check("benchmark", run(), reference(), tolerance))
        benchmark(run)

    return run_checked


@pytest.fixture(autouse=True)
def _refuse_unchecked(request):
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None and "error" not in benchmark.extra_info:
        pytest.fail("this benchmark's output was never checked against a reference; time it through `checked`")
