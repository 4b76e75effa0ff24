"""python -m sparse_stgcn.lottery D: masks learned on frozen weights, pre-trained against random, over sparsity."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import tyro

from . import plots
from .config import TrainConfig
from .errors import UserError, one_of, run
from .options import OptionalFloat, OptionalInt, OptionalStr, check_device

__all__ = ["LotteryConfig", "main"]


@dataclass
class LotteryConfig:
    """Find winning tickets (the paper's Figure 3): test accuracy over sparsity, from pre-trained and random weights.

    Data, network and schedule are those of a run in D; its network is the pre-trained one. No weights are averaged here,
    even if D was trained with --ema. The results are in lottery.json; what is there already is not computed again, and an
    interrupted command goes on when it is repeated.
    """

    work_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="D")]
    """Work directory of a dense run: train --sparsity 0 --work-dir D."""
    out: OptionalStr = None
    """Directory of the results. Default: lottery in D."""
    methods: tuple[str, ...] = ("scores",)
    """scores: frozen weights, learned masks; magnitude: the largest weights, trained on; iterative: magnitude in rounds,
    each from the early weights again."""
    inits: tuple[str, ...] = ("pretrained", "random")
    """Initial weights: of the network in D, or random from the seed."""
    sparsities: tuple[float, ...] = (0.6, 0.8, 0.95, 0.99)
    """Fractions of the maskable weights that are masked."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of random weights, scores, order and sampling."""
    block: str = "1x1"
    """Weight block, output x input channels. 1x1 is the paper's."""
    density: str = "uniform"
    """uniform, or erk."""
    scope: str = "global"
    """Pool in which blocks are ranked: the whole network, each network block, or each layer."""
    absolute: bool = False
    """Rank by |score|, as edge-popup does."""
    score_init: str = "uniform"
    """First scores: uniform (one law for all layers), fan_in (the authors'), or magnitude (of the weights)."""
    score_lr: float = 1.0
    """Learning rate of the scores per --lr-reference-batch sequences of the run in D."""
    train_norm: bool = False
    """Also train scale and shift of the batch norms with the scores."""
    train_head: bool = False
    """Also train the classifier with the scores."""
    rate: float = 0.5
    """Largest fraction of the weights left that one round of the iterative method cuts."""
    rewind_epoch: int = 0
    """Epoch whose weights and learning rate the iterative method goes back to; 0 is the start."""
    epochs: OptionalInt = None
    """Epochs of each training. Default: those of the run in D."""
    lr: OptionalFloat = None
    """Learning rate of weights. Default: that of the run in D."""
    device: OptionalStr = None
    """cpu, cuda or cuda:N."""
    threads: OptionalInt = None
    """CPU threads."""
    workers: OptionalInt = None
    """Processes that load data."""
    figure: bool = False
    """Draw lottery.png, accuracy over sparsity (the paper's Figure 3). Needs matplotlib."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(LotteryConfig, args=argv, prog="python -m sparse_stgcn.lottery")
    base = check(asked)
    if asked.figure:
        plots.require()

    from .training import run as training
    from .training.tickets import Lottery, Recipe

    archive = training.open_archive(base)
    base = training.resolve(base, archive)
    training.set_up_torch(base)
    archive.check_classes("train")
    recipe = Recipe(**{field.name: getattr(asked, field.name) for field in fields(Recipe)})
    pretrained = Path(asked.work_dir) / "model.safetensors" if "pretrained" in asked.inits else None
    out = Path(asked.out or Path(asked.work_dir) / "lottery")
    experiment = Lottery(base, archive, pretrained, recipe, out)
    try:
        points = experiment.run(asked.methods, asked.inits, asked.sparsities, asked.seeds)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise
    print("\n".join(table(points)))
    if asked.figure:
        dense = experiment.result["pretrained"]["test"]
        plots.save(plots.lines(values(points), "sparsity", dense=[dense["top1"]] if dense else ()), out / "lottery.png")
    print(f"results   {out / 'lottery.json'}")
    return 0


def check(asked: LotteryConfig) -> TrainConfig:
    """The configuration of the run in D with what the command line changes.

    Raises:
        UserError: no such run, or a value out of range.
    """
    from .masks import DENSITIES, SCOPES
    from .sparsity import parse_block
    from .training.lottery import SCORE_INITS
    from .training.tickets import INITS, METHODS

    folder = Path(asked.work_dir)
    for name in ["config.yaml", "model.safetensors"] if "pretrained" in asked.inits else ["config.yaml"]:
        if not (folder / name).is_file():
            raise UserError(f"Expected D to be the work directory of a finished run. Got {folder} without {name}; make it "
                            f"with python -m sparse_stgcn.train --sparsity 0 --work-dir {folder}.")
    for flag, values, allowed in (("--methods", asked.methods, METHODS), ("--inits", asked.inits, INITS)):
        if not values:
            raise UserError(f"Expected {flag} to name at least one of {', '.join(allowed)}. Got none.")
        for value in values:
            one_of(flag, value, allowed)
    one_of("--score-init", asked.score_init, SCORE_INITS)
    one_of("--scope", asked.scope, SCOPES)
    one_of("--density", asked.density, DENSITIES)
    try:
        parse_block(asked.block)
    except ValueError as error:
        raise UserError(f"--block: {error}") from error
    if not asked.sparsities or not all(0 < s < 1 for s in asked.sparsities):
        raise UserError(f"Expected --sparsities in (0, 1). Got {' '.join(map(str, asked.sparsities)) or 'none'}.")
    if not asked.seeds or min(asked.seeds) < 0:
        raise UserError(f"Expected --seeds to be whole numbers >= 0. Got {' '.join(map(str, asked.seeds)) or 'none'}.")
    if not 0 < asked.rate < 1:
        raise UserError(f"Expected --rate in (0, 1), the fraction cut in a round. Got {asked.rate:g}.")
    if not asked.score_lr > 0:
        raise UserError(f"Expected --score-lr > 0. Got {asked.score_lr:g}.")
    base = TrainConfig.read(folder / "config.yaml")
    if asked.device is None and base.device not in (None, "cpu"):
        try:
            check_device(base.device or "cpu")
        except UserError:
            base.device = None
    names = ("epochs", "lr", "device", "threads", "workers")
    base = replace(base, sparsity=0.0, budget=None, warmup_epochs=0, method="random", mask_file=None, init=None,
                   ema=None,  # what is cut, rewound, tested and saved are the weights that are trained
                   **{k: v for k in names if (v := getattr(asked, k)) is not None})
    base.validate()
    if not 0 <= asked.rewind_epoch < (base.epochs or 1):
        raise UserError(f"Expected --rewind-epoch from 0 to below --epochs ({base.epochs}). Got {asked.rewind_epoch}.")
    return base


def values(points: Sequence[dict[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Top-1 of each seed by method and initial weights, then by sparsity."""
    made: dict[str, dict[float, list[float]]] = {}
    for point in sorted(points, key=lambda point: (point["method"], point["init"])):
        made.setdefault(f"{point['method']}, {point['init']}", {}).setdefault(point["sparsity"], []).append(point["top1"])
    return made


def table(points: Sequence[dict[str, Any]]) -> list[str]:
    """Top-1 over sparsity, one line for each method and initial weights, the mean over seeds."""
    columns = sorted({point["sparsity"] for point in points})
    lines = ["top-1     " + " " * 22 + "".join(f"{column:>9g}" for column in columns)]
    for name, cells in values(points).items():
        lines.append(f"          {name:<22}" + "".join(f"{mean(cells[c]):>9.2%}" if c in cells else " " * 9 for c in columns))
    return lines


if __name__ == "__main__":
    sys.exit(run(main))
