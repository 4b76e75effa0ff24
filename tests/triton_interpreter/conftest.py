"""What is not written, or read beyond its end, shows as NaN."""

from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels.triton import configs


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.fixture(params=["narrow", "wide"])
def frames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Frames as they lie, or always copied to 16 bytes."""
    monkeypatch.setattr(configs, "PACK_FROM", dict.fromkeys(configs.PACK_FROM, 0.0 if request.param == "wide" else 1e9))
    return request.param
