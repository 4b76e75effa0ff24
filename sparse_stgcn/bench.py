"""`python -m sparse_stgcn.bench`: a network at several sparsities against every dense engine, in one paired run."""
from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backbones, masks, sparsity
from .benchmark.measure import check, environment, paired
from .benchmark.peers import candidate, dense_engines
from .errors import UserError, one_of, run, validating
from .kernels import BlockPattern, temporal_conv
from .runtime import optimize


@dataclass
class BenchConfig:
    """Time a backbone, sparse against dense: inference, and with --training a whole training step."""

    backbone: str = "stgcn"
    levels: tuple[float, ...] = (0.6, 0.8, 0.95, 0.99)
    """Sparsities of the maskable weights."""
    block: str = "8x1"
    density: str = "uniform"
    batch: int = 8
    persons: int = 2
    frames: int = 100
    classes: int = 60
    threads: int = 2
    rounds: int = 9
    """Each round times every candidate once, in turn; medians are printed."""
    ops: bool = False
    """Time the 9 x 1 temporal convolution alone, C = 64, 128, 256, against torch's dense one, instead of a network."""
    training: bool = False
    """Also time forward, backward and SGD, against torch's dense step."""
    compile: bool = True
    """Include torch.compile among the dense engines."""
    out: str | None = None
    """JSON file for the rows and what they depend on."""

    def validate(self) -> None:
        """Raise UserError for a flag that cannot be right."""
        one_of("--backbone", self.backbone, list(backbones.BACKBONES))
        with validating("--block"):
            sparsity.parse_block(self.block)
        for name in ("batch", "persons", "frames", "classes", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected --{name} to be at least 1. Got {getattr(self, name)}.")
        if not all(0 <= level < 1 for level in self.levels):
            raise UserError(f"Expected --levels to be at least 0 and below 1. Got {self.levels}.")


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds are medians; ``speedup`` is the paired ratio to the best dense engine."""

    what: str
    name: str
    seconds: float
    speedup: float
    error: float


def inference(config: BenchConfig, dense: nn.Module, sparse: dict[float, nn.Module], x: Tensor) -> list[Row]:
    """Logits of a batch, eval mode; every candidate is checked against its own network in float64."""
    engines = list(dense_engines(dense, x, config.threads, config.compile))
    candidates = engines + [candidate(_name(level, config), _inference(optimize(model), x)) for level, model in sparse.items()]
    references = [_double_logits(dense, x)] * len(engines) + [_double_logits(model, x) for model in sparse.values()]
    errors = [check(c.name, c.output(), reference, 1e-3) for c, reference in zip(candidates, references, strict=True)]
    timings = paired(candidates, config.rounds)
    best = min((timings[engine.name] for engine in engines), key=lambda timing: timing.median)
    return [Row("inference", c.name, timings[c.name].median, timings[c.name].ratio(best), error)
            for c, error in zip(candidates, errors, strict=True)]


def training(config: BenchConfig, dense: nn.Module, sparse: dict[float, nn.Module], x: Tensor) -> list[Row]:
    """Forward, backward and SGD with momentum; checked by the classifier's gradient against float64."""
    label = torch.arange(len(x)) % config.classes
    candidates, references = [], []
    for name, model in [("torch", dense), *((_name(level, config), model) for level, model in sparse.items())]:
        double = sparsity.densify(copy.deepcopy(model)).double().train()
        references.append(_step(double, x.double(), label, torch.optim.SGD(double.parameters(), lr=0.0))())
        model = model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4)
        candidates.append(candidate(name, _step(model, x, label, optimizer)))
    errors = [check(c.name, c.output(), reference, 1e-3) for c, reference in zip(candidates, references, strict=True)]
    timings = paired(candidates, config.rounds)
    return [Row("training step", c.name, timings[c.name].median, timings[c.name].ratio(timings["torch"]), error)
            for c, error in zip(candidates, errors, strict=True)]


def temporal_convolutions(config: BenchConfig) -> list[Row]:
    """Forward of the temporal convolution of each width, against the better of torch's two memory layouts."""
    rows, block = [], sparsity.parse_block(config.block)
    for channels, frames in ((64, config.frames), (128, config.frames // 2), (256, config.frames // 4)):
        shape = (channels, channels, 9)
        x = torch.randn(config.batch * config.persons, channels, frames, 25)
        weight = torch.randn(shape) / (9 * channels) ** 0.5
        patterns = {level: masks.draw([masks.Layer("conv", shape, block)], level, density=config.density)["conv"]
                    for level in config.levels}
        last = x.contiguous(memory_format=torch.channels_last)
        dense = [candidate("torch", _conv(x, weight)), candidate("torch channels_last", _conv(last, weight))]
        ours = [candidate(_name(level, config), _sparse_conv(x, pattern.gather(weight), pattern))
                for level, pattern in patterns.items()]
        double = [_conv(x.double(), w.double())() for w in (weight, weight, *(weight * p.mask() for p in patterns.values()))]
        errors = [check(c.name, c.output(), want, 1e-5) for c, want in zip([*dense, *ours], double, strict=True)]
        timings = paired([*dense, *ours], config.rounds)
        best = min((timings[c.name] for c in dense), key=lambda timing: timing.median)
        what = f"temporal_conv C={channels} T={frames}"
        rows += [Row(what, c.name, timings[c.name].median, timings[c.name].ratio(best), error)
                 for c, error in zip([*dense, *ours], errors, strict=True)]
    return rows


def _conv(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.conv2d(x, weight.unsqueeze(-1), padding=(4, 0))


def _sparse_conv(x: Tensor, values: Tensor, pattern: BlockPattern) -> Callable[[], Tensor]:
    return lambda: temporal_conv(x, values, pattern)


def _name(level: float, config: BenchConfig) -> str:
    return f"sparse_stgcn {level:g} ({config.block})"


def _inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def _double_logits(model: nn.Module, x: Tensor) -> Tensor:
    return _inference(sparsity.densify(copy.deepcopy(model)).double().eval(), x.double())()


def _step(model: nn.Module, x: Tensor, label: Tensor, optimizer: torch.optim.Optimizer
          ) -> Callable[[], Tensor]:
    def run() -> Tensor:
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()
        return model.cls_head.fc_cls.weight.grad

    return run


def markdown(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    lines = ["| | | ms per batch | against the best dense engine |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {row.what} | {row.name} | {1e3 * row.seconds:.1f} | {row.speedup:.2f}x |" for row in rows]
    return "\n".join(lines)


def measure(config: BenchConfig) -> dict[str, Any]:
    """All rows with the settings and the environment that they depend on."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    if config.ops:
        with torch.inference_mode():
            rows = temporal_convolutions(config)
        return {"config": asdict(config), "environment": environment(), "rows": [asdict(row) for row in rows]}
    x = torch.randn(config.batch, config.persons, config.frames, 25, 3)
    dense = backbones.create_model(config.backbone, config.classes)
    sparse = {level: sparsity.compact(sparsity.sparsify(copy.deepcopy(dense), level, config.block, density=config.density))
              for level in config.levels}
    rows = inference(config, dense, sparse, x)
    if config.training:
        rows += training(config, dense, sparse, x)
    return {"config": asdict(config), "environment": environment(), "rows": [asdict(row) for row in rows]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    import tyro

    config = tyro.cli(BenchConfig, args=argv, prog="python -m sparse_stgcn.bench")
    config.validate()
    result = measure(config)
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()))
    print(markdown([Row(**row) for row in result["rows"]]))
    if config.out:
        path = Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
