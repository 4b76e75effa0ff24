"""Fixtures and rules of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sparse_stgcn import Archive, Predictor

ROOT = Path(__file__).resolve().parent.parent

# These run in a process of their own: TRITON_INTERPRET has to be set before a kernel is defined, and an interpreted
# process cannot compile. tests/test_triton_interpreter.py starts it.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpreter"]

# Likewise: it needs the module that tests/test_cuda_emulation.py builds.
collect_ignore += [] if "SPARSE_STGCN_EMULATED" in os.environ else ["cuda_emulation"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data sets and golden values that lies beside the repository, or SPARSE_STGCN_SHARED."""
    folder = Path(os.environ.get("SPARSE_STGCN_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder ({folder}); set SPARSE_STGCN_SHARED to where it is")
    return folder


# For the tests of predictions; modules with fixtures of these names use their own.

@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``predicted.train_two``: the runs "low" and "high", and their data tiny.npz."""
    from predicted import train_two

    return train_two(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def archive(trained: Path) -> Archive:
    """The data of ``trained``."""
    from sparse_stgcn import Archive

    return Archive.open(trained / "tiny.npz").with_split()


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    """Of the run "low" of ``trained``."""
    from sparse_stgcn import Predictor

    return Predictor.load(trained / "low")


def missing_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None where they can."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU with a working driver"
    return None


# One test each that takes minutes: first, so that no worker is left alone with one at the end.
LONGEST = ("test_cuda_emulation.py", "test_triton_interpreter.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := missing_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
