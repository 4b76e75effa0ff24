"""Checks of a backbone against values that the public PYSKL modules gave for a deterministic fill.

``Golden(shared, "STGCN")`` reads the values and their definition (``golden/fill.py``, ``golden/FORMULA.md``)
from the shared folder; each method runs one comparison. Tolerances: float64 1e-9, gradient norms 1e-8
relative, float32 2e-5.
"""
from __future__ import annotations

import importlib.util
import json
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_stgcn import BlockPattern, Recognizer, compact, create_model
from sparse_stgcn.sparsity import maskable_convs

CHECKS = (
    "keys",
    "logits_float64",
    "logits_float32",
    "gradients",
    "zero_second_person",
    "train_mode",
    "masked80",
    "masked80_compact",
)


class Golden:
    def __init__(self, shared: Path, arch: str) -> None:
        self.folder, self.arch = shared / "golden", arch
        self.values: dict[str, Any] = json.loads((self.folder / f"golden_{arch}_ntu.json").read_text())
        self.keys: dict[str, Any] = json.loads((self.folder / f"keys_{arch}_ntu.json").read_text())

    @cached_property
    def fill(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("golden_fill", self.folder / "fill.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def model(
        self, dtype: torch.dtype = torch.float64, keep_graph: bool = False, **kwargs: Any
    ) -> Recognizer:
        torch.manual_seed(0)
        model = create_model(self.arch.lower(), self.values["num_classes"], **kwargs).to(dtype)
        return self.fill.fill_(model, keep_graph=keep_graph, gain=self.values["gain"]).eval()

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(self.fill.make_input()).to(dtype)

    def check(self, name: str) -> None:
        getattr(self, f"check_{name}")()

    def check_keys(self) -> None:
        state = self.model().state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == \
            {key: entry["shape"] for key, entry in self.keys.items()}
        parameters = dict(self.model().named_parameters())
        assert {key for key, entry in self.keys.items() if entry["kind"] == "param"} == set(parameters)
        assert sum(p.numel() for p in parameters.values()) == self.values["params"]

    def check_logits_float64(self) -> None:
        model, observed = self.model(), {}
        units = {"data_bn": model.backbone.data_bn}
        for index, block in enumerate(model.backbone.blocks):
            units[f"block{index + 1}"] = block
            if index in (0, 4):
                units[f"block{index + 1}.gcn"] = getattr(block, block.names[0])
        for name, unit in units.items():
            unit.register_forward_hook(
                lambda _, __, y, name=name: observed.__setitem__(name, y.detach().clone())
            )
        with torch.no_grad():
            logits = model(self.input())
        for name, entry in self.values["observed_float64"].items():
            value = observed[name].double()
            assert list(value.shape) == entry["shape"], name
            got = [value.mean(), value.std(correction=0), *value.flatten()[:8]]
            torch.testing.assert_close(
                torch.stack(got),
                _tensor([entry["mean"], entry["std"], *entry["first8"]]),
                atol=1e-9,
                rtol=0,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        _close(logits, self.values["logits_float64"], 1e-9)

    def check_logits_float32(self) -> None:
        with torch.no_grad():
            logits = self.model(torch.float32)(self.input(torch.float32))
        _close(logits, self.values["logits_float32"], 2e-5)

    def check_gradients(self) -> None:
        model, x = self.model(), self.input().requires_grad_()
        logits = model(x)
        probe = torch.from_numpy(self.fill.wave("grad_probe", logits.numel()).reshape(logits.shape))
        (logits * probe).sum().backward()
        got = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
        want = self.values["grad_params"]
        assert set(want) <= set(got)
        np.testing.assert_allclose([got[name] for name in want], list(want.values()), rtol=1e-8, atol=0)
        np.testing.assert_allclose(x.grad.norm().item(), self.values["grad_input"]["norm"], rtol=1e-8)
        np.testing.assert_allclose(
            x.grad.flatten()[:8], self.values["grad_input"]["first8"], rtol=0, atol=1e-9
        )

    def check_zero_second_person(self) -> None:
        x = self.input()
        x[:, 1] = 0
        with torch.no_grad():
            _close(self.model()(x), self.values["logits_zero_person2"], 1e-9)

    def check_train_mode(self) -> None:
        model = self.model().train()
        with torch.no_grad():
            _close(model(self.input()), self.values["logits_train_mode"], 1e-9)
        for name, first in self.values["data_bn_after_train"].items():
            _close(getattr(model.backbone.data_bn, name)[:8], first, 1e-9)

    def check_masked80(self) -> None:
        model, kept, total = self.model(), 0, 0
        with torch.no_grad():
            for name, conv in maskable_convs(model).items():
                unit = self.fill.unit(f"mask:{name}.weight", conv.weight.numel())
                keep = torch.from_numpy(unit >= 0.8).view_as(conv.weight)
                conv.weight.mul_(keep)
                kept, total = kept + int(keep.sum()), total + keep.numel()
            assert (kept, total) == (self.values["masked80"]["kept"], self.values["masked80"]["maskable"])
            _close(model(self.input()), self.values["masked80"]["logits"], 1e-9)

    def check_masked80_compact(self) -> None:
        model = self.model()
        for name, conv in maskable_convs(model).items():
            keep = torch.from_numpy(self.fill.unit(f"mask:{name}.weight", conv.weight.numel()) >= 0.8)
            live = conv.as_oik(keep.view_as(conv.weight)).contiguous()
            conv.attach(BlockPattern.from_blocks(live, conv.shape_oik, (1, 1)))
        assert sum(p.numel() for p in compact(model).parameters()) == \
            self.values["params"] - self.values["masked80"]["maskable"] + self.values["masked80"]["kept"]
        with torch.no_grad():
            _close(model(self.input()), self.values["masked80"]["logits"], 1e-9)

    def check_graph_built(self) -> None:
        with torch.no_grad():
            logits = self.model(keep_graph=True)(self.input())
        _close(logits, self.values["logits_graph_A"], 1e-9)


def _tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _close(got: Tensor, want: list, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), _tensor(want), atol=tolerance, rtol=0)
