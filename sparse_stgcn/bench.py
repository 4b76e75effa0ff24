"""`python -m sparse_stgcn.bench`: ops, inference and training steps at every level against every dense engine, paired."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from . import backbones, sparsity
from .benchmark import gpu_model, networks, ops, prediction, scaling, triton_count
from .benchmark.gpu_cards import CARDS
from .benchmark.measure import environment
from .benchmark.networks import Pattern, Setting
from .benchmark.table import Row, markdown, pivot
from .errors import UserError, one_of, run, validating

WHAT = ("ops", "inference", "ensemble", "training", "warmup", "scaling", "predict")
TRITON_COUNT = "triton-count"


@dataclass
class BenchConfig:
    """Time sparse networks against every dense engine; a row whose output is wrong is an error.

    Without flags it runs the whole table, which takes hours on two cores: ops; inference of four backbones at five levels, five
    blocks and two density rules, for batches of 8, 1 and 64 on 2 and 1 threads; training and warm-up steps. Every flag narrows
    it, but for scaling and predict: they time networks at 0.95 whatever --levels, --density and --batches say, predict in
    blocks of 8x1 (its first stream dense, too), its calls and its start with ST-GCN. A part of which flags leave nothing is an
    error. The file is written after every setting.
    """

    what: tuple[str, ...] = WHAT
    """Which parts: ops, inference, ensemble (all sparse levels of the first block in one call), training (a step on live
    blocks), warmup (a dense step with the group lasso), scaling (how the cost grows with N, M, T and the live blocks), predict
    (a user's wait: start, one call, streams). Or triton-count alone: compile the Triton kernels for three GPU architectures
    and count what their code is made of; no GPU is needed and nothing is measured."""
    backbones: tuple[str, ...] = tuple(backbones.BACKBONES)
    levels: tuple[float, ...] = (0.0, 0.6, 0.8, 0.95, 0.99)
    """Sparsities of the maskable weights; 0 is this package's own dense network."""
    blocks: tuple[str, ...] = ("8x1", "1x1", "4x1", "4x4", "16x16")
    density: tuple[str, ...] = ("uniform", "erk")
    """Share of each layer; beside uniform, erk is timed with the first block only. Ops, ensemble and warmup are uniform."""
    batches: tuple[int, ...] = (8, 1, 64)
    """Samples. Training uses the first one."""
    threads: tuple[int, ...] = (2, 1)
    persons: int = 2
    frames: int = 100
    classes: int = 60
    rounds: int = 7
    """Each round times every candidate once, in turn; medians are printed."""
    calls: int = 2000
    """Calls of Predictor in a row."""
    stream_frames: int = 100_000
    """Frames of the stream whose memory is watched, that of the first backbone."""
    compile: bool = True
    """Include torch.compile among the dense engines."""
    gpu_model: str | None = None
    """h100 or a100: print what a static model predicts for the GPU kernels on that card instead, at ST-GCN's shapes; no GPU is
    needed and nothing is measured."""
    part: str = "1/1"
    """Which share of the Triton kernels triton-count compiles, such as 1/4; --out keeps the rows of the other shares."""
    out: str | None = None
    """JSON file for the rows and what they depend on; a markdown file is written beside it."""

    def validate(self) -> None:
        """Raise UserError for a flag that cannot be right."""
        for what in self.what:
            one_of("--what", what, [*WHAT, TRITON_COUNT])
        if TRITON_COUNT in self.what and len(self.what) > 1:
            raise UserError(f"Expected --what {TRITON_COUNT} alone. Got {' '.join(self.what)}.")
        triton_count.part_of(self.part)
        if self.gpu_model is not None:
            one_of("--gpu-model", self.gpu_model, list(CARDS))
        for name in self.backbones:
            one_of("--backbones", name, list(backbones.BACKBONES))
        for rule in self.density:
            one_of("--density", rule, ["uniform", "erk"])
        with validating("--blocks"):
            for block in self.blocks:
                sparsity.parse_block(block)
        for name in ("persons", "frames", "classes", "rounds", "calls", "stream_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected --{name} to be at least 1. Got {getattr(self, name)}.")
        for name in ("backbones", "what", "levels", "blocks", "density", "batches", "threads"):
            if not getattr(self, name):
                raise UserError(f"Expected --{name} to name at least one value. Got none.")
        for name in ("batches", "threads"):
            if min(getattr(self, name)) < 1:
                raise UserError(f"Expected --{name} to be at least 1. Got {getattr(self, name)}.")
        if not all(0 <= level < 1 for level in self.levels):
            raise UserError(f"Expected --levels to be at least 0 and below 1. Got {self.levels}.")
        self._check_parts()

    def _check_parts(self) -> None:
        # What was asked for and cannot be timed is said now: hours later it would be missing from the table.
        uniform = [what for what in ("ops", "ensemble", "warmup") if what in self.what]
        if uniform and "uniform" not in self.density:
            raise UserError(f"Expected --density with uniform, the only one of --what {' '.join(uniform)}. Got "
                            f"{' '.join(self.density)}; add uniform, or name other parts with --what.")
        sparse = [what for what in ("ensemble", "warmup") if what in self.what]
        if sparse and not any(self.levels):
            raise UserError(f"Expected --levels with one above 0, as --what {' '.join(sparse)} has sparse networks. Got "
                            f"{' '.join(f'{level:g}' for level in self.levels)}; add one, or name other parts with --what.")

    def patterns(self) -> list[Pattern]:
        """Every block at uniform density (or at the only one that is asked for), and the other rules with the first block."""
        every = "uniform" if "uniform" in self.density else self.density[0]
        rules = [(block, every) for block in self.blocks] + [(self.blocks[0], rule) for rule in self.density if rule != every]
        return [Pattern(level, block, rule) for block, rule in rules for level in self.levels]


def parts(config: BenchConfig) -> Iterator[tuple[int, Callable[[], list[Row]]]]:
    """(threads, function that makes the rows) of each setting, in the order of the table."""
    patterns, rounds = config.patterns(), config.rounds
    uniform = [p for p in patterns if p.density == "uniform"]
    first, level = config.batches[0], max(config.levels)
    for threads in config.threads:
        if "ops" in config.what:
            shape = (first * config.persons, config.frames, threads)
            yield threads, partial(ops.temporal_convolutions, *shape, uniform, rounds)
            yield threads, partial(ops.graph_convolutions, *shape, uniform, rounds)
        for backbone in config.backbones:
            sizes = (config.persons, config.frames, config.classes)
            for batch in config.batches if "inference" in config.what else ():
                here = Setting(backbone, batch, threads, *sizes)
                yield threads, partial(networks.inference, here, patterns, rounds, config.compile)
            here = Setting(backbone, first, threads, *sizes)
            together = [p for p in uniform if p.block == config.blocks[0] and p.sparsity > 0]
            if "ensemble" in config.what:
                yield threads, partial(networks.ensemble, here, together, rounds, config.compile)
            if "training" in config.what:
                yield threads, partial(networks.training, here, patterns, rounds, config.compile)
            if "warmup" in config.what:
                yield threads, partial(networks.warmup, here, Pattern(level, config.blocks[0]), rounds, config.compile)


def measure(config: BenchConfig, save: Callable[[list[Row]], None] | None = None) -> list[Row]:
    """All rows; ``save`` gets those made so far after every setting."""
    rows: list[Row] = []
    for threads, part in parts(config):
        torch.set_num_threads(threads)
        rows += part()
        if save:
            save(rows)
    return rows


def growth(config: BenchConfig) -> list[scaling.Growth]:
    """How the cost of the first backbone at 0.95, and of one convolution, grows; on the first number of threads."""
    threads = config.threads[0]
    torch.set_num_threads(threads)
    here = Setting(config.backbones[0], 1, threads, 1, config.frames, config.classes)
    return scaling.network(here, Pattern(0.95, config.blocks[0]), config.rounds) + scaling.live_blocks(threads, config.rounds)


def waits(config: BenchConfig) -> prediction.Waits:
    """What a user waits for: ST-GCN on every number of threads, a fresh process, every backbone as a stream on one thread."""
    settings = [Setting("stgcn", 1, threads, config.persons, config.frames, config.classes) for threads in config.threads]
    latencies = []
    for setting in settings:
        torch.set_num_threads(setting.threads)
        latencies.append(prediction.latency(setting, config.calls, config.rounds))
    torch.set_num_threads(1)
    first, *others = (replace(settings[0], backbone=name) for name in config.backbones)
    rows = prediction.streams(first, frames=config.stream_frames) + prediction.streams(first, sparsity=0)
    rows += [row for other in others for row in prediction.streams(other)]
    return prediction.Waits(latencies, prediction.start(settings[0]), rows)


def write(path: Path, config: BenchConfig, rows: list[Row], grown: list[scaling.Growth], waited: prediction.Waits | None = None
          ) -> None:
    """The rows with the settings and the environment that they depend on, as JSON and as markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"config": asdict(config), "environment": environment(), "rows": [asdict(row) for row in rows],
              "scaling": [asdict(row) for row in grown], **({"predict": asdict(waited)} if waited else {})}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(tables(rows, grown, waited) + "\n", encoding="utf-8")


def tables(rows: list[Row], grown: list[scaling.Growth], waited: prediction.Waits | None = None) -> str:
    """The pivot, all rows, the growth of the cost, and a user's wait, as far as they were measured."""
    made = [pivot(rows), markdown(rows)] if rows else []
    made += [scaling.markdown(grown)] if grown else []
    return "\n\n".join(made + ([prediction.markdown(waited)] if waited else []))


def predict(card: str, out: Path | None) -> str:
    """The static model's table for a card; with ``out`` its rows as JSON and as markdown, marked as predictions.

    Raises:
        UserError: neither triton nor the CUDA module is there to take registers and tiles from.
    """
    rows = gpu_model.predictions(CARDS[card])
    if not rows:
        raise UserError("Expected triton or the CUDA module, whose compilers' reports the model reads. Got neither; "
                        "pip install triton.")
    summary = gpu_model.summary(CARDS[card], rows)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in environment().items() if name in ("torch", "commit", "date")}
        out.write_text(gpu_model.to_json({**gpu_model.report(card, rows), "environment": kept}), encoding="utf-8")
        out.with_suffix(".md").write_text(summary + "\n", encoding="utf-8")
    return summary


def count(part: str, out: Path | None) -> str:
    """The table of a share of the compiled Triton kernels; with ``out`` of all that its file holds then.

    Raises:
        UserError: triton is not installed.
    """
    rows = list(triton_count.counts(*triton_count.part_of(part)))
    return triton_count.markdown(triton_count.write(out, rows) if out else rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    import tyro

    config = tyro.cli(BenchConfig, args=argv, prog="python -m sparse_stgcn.bench")
    config.validate()
    out = Path(config.out) if config.out else None
    if config.gpu_model:
        print(predict(config.gpu_model, out))
        return 0
    if config.what == (TRITON_COUNT,):
        print(count(config.part, out))
        return 0
    rows = measure(config, (lambda rows: write(out, config, rows, [])) if out else None)
    grown = growth(config) if "scaling" in config.what else []
    waited = waits(config) if "predict" in config.what else None
    if out:
        write(out, config, rows, grown, waited)
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(tables(rows, grown, waited))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
