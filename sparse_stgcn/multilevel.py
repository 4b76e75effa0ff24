"""python -m sparse_stgcn.multilevel: train several levels of sparsity inside each other as one network."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from .config import TrainConfig, parse_as
from .errors import UserError, one_of, run
from .masks import LEVELS

if TYPE_CHECKING:
    from .training.multilevel_run import MultiLevelRun

__all__ = ["MultiLevelConfig", "main"]

CLASSIFIERS = ("own", "shared")
METHODS = ("nested", "random", "iid", "fan_in")
SCHEDULES = ("growing", "together")
# Epochs relative to those of a single run: weights that levels train together get several gradients in every step.
EPOCHS = 0.9


@dataclass
class MultiLevelConfig(TrainConfig):
    """Train several levels of sparsity inside each other as one network, any of which can be used alone.

    The masks are nested, so all levels together store the weights of the widest, plus norms. The sparsest is trained first, and
    each wider one adds weights to it, or every step after the warm-up trains several levels. The other options are those of
    sparse_stgcn.train; with --schedule growing, --epochs are those of the level that is trained first.
    """

    levels: tuple[float, ...] = LEVELS
    """Sparsities, at least two. The lowest is the widest network."""
    schedule: str = "growing"
    """growing: the sparsest as if alone, then each wider one, which leaves the weights of those inside it as they are;
    together: a step trains the widest level on the labels, and the sparsest and some between on the widest's answer."""
    growth: float = 0.5
    """With --schedule growing: epochs of every wider level, relative to --epochs."""
    new_weights: float = 0.5
    """With --schedule growing: root mean square of the new, random weights of a wider level, relative to that of the weights
    it has from the level inside it, layer by layer; 0 begins as the function of that level."""
    between: int = 1
    """With --schedule together: how many levels between the widest and the sparsest are trained in a step, drawn anew each
    time; of two levels none."""
    distillation: float = 1.0
    """With --schedule together: share of the widest's answer in the target of the other levels, in [0, 1]; the labels have the
    rest."""
    classifier: str = "own"
    """own: one classifier for each level, like the norms; shared: one for all."""
    sparsity: tyro.conf.Suppress[float] = LEVELS[0]
    method: str = "nested"
    """Which blocks live: nested or random (balanced over the rows of a layer), iid, or fan_in."""
    mask_file: tyro.conf.Suppress[str | None] = None

    def __post_init__(self) -> None:
        self.levels = tuple(float(level) for level in self.levels)
        first = max if self.schedule == "growing" else min
        self.sparsity = first(self.levels, default=0.0)
        if self.between == 1 and len(self.levels) == 2:
            self.between = 0  # there is none between two

    @property
    def sorted_levels(self) -> list[float]:
        """From the widest to the sparsest."""
        return sorted(self.levels)

    @property
    def growth_epochs(self) -> int:
        """Epochs of every wider level of a resolved configuration."""
        return max(1, round(self.growth * (self.epochs or 1)))

    def resolved(self, preset: str) -> MultiLevelConfig:
        full = super().resolved(preset)
        if self.epochs is None and full.epochs is not None and self.schedule == "together":
            full.epochs = round(EPOCHS * full.epochs)
            full.validate()
        return full

    def validate(self) -> None:
        if len(set(self.levels)) < max(2, len(self.levels)) or not all(0 < level < 1 for level in self.levels):
            raise UserError(f"Expected --levels to be at least two different numbers in (0, 1). "
                            f"Got {' '.join(f'{level:g}' for level in self.levels) or 'none'}.")
        one_of("--method", self.method, METHODS)
        one_of("--classifier", self.classifier, CLASSIFIERS)
        one_of("--schedule", self.schedule, SCHEDULES)
        if not 0 < self.growth <= 10:
            raise UserError(f"Expected --growth in (0, 10], epochs of a wider level relative to --epochs. Got {self.growth:g}.")
        if not 0 <= self.new_weights < float("inf"):
            raise UserError(f"Expected --new-weights to be at least 0 and finite. Got {self.new_weights:g}.")
        if not 0 <= self.between <= len(self.levels) - 2:
            raise UserError(f"Expected --between from 0 to {len(self.levels) - 2}, the levels that are neither widest nor "
                            f"sparsest. Got {self.between}.")
        if self.ema is not None or self.auto_batch:
            raise UserError("Expected several levels without --ema and --auto-batch, which are for a single network. Remove "
                            "them.")
        if self.density == "auto":
            raise UserError("Expected --density uniform or erk, as the masks of several levels lie inside each other. Got "
                            "auto.")
        if not 0 <= self.distillation <= 1:
            raise UserError(f"Expected --distillation in [0, 1]. Got {self.distillation:g}.")
        super().validate()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    config = parse_as(MultiLevelConfig, argv, "python -m sparse_stgcn.multilevel")
    from .ensemble import lines
    from .training.multilevel_run import FILE, prepare

    job = prepare(config)
    report = job.trainer.report.line
    for text in introduction(job):
        report(text)
    try:
        job.fit()
    except KeyboardInterrupt:
        print(f"\nstopped; continue with: python -m sparse_stgcn.multilevel --resume {job.work_dir}", file=sys.stderr)
        raise
    result = job.finish()
    for text in [*lines({**result, "bytes": result["file"]["bytes"]}), conclusion(result)]:
        report(text)
    report(f"files     {job.work_dir / FILE}, and a directory for each level; test one again with: "
           f"python -m sparse_stgcn.evaluate {job.work_dir / f'{job.config.sorted_levels[-1]:g}'}")
    return 0


def introduction(job: MultiLevelRun) -> list[str]:
    """What is about to happen: what ``train`` says, and the levels."""
    from .train import introduction as of_train

    config = job.config
    levels = [f"{level:g}" for level in config.sorted_levels]
    if config.schedule == "growing":
        how = f"{' '.join(reversed(levels))} one after the other, {config.growth_epochs} epochs for each after the first"
    else:
        how = f"{' '.join(levels)}; {2 + config.between} in a step, {config.distillation:.0%} of the targets from the widest"
    return [*of_train(config, job), f"levels    {how}, {config.classifier} classifier"]


def conclusion(result: dict[str, Any]) -> str:
    """Where the time went."""
    return "time      " + ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())


if __name__ == "__main__":
    sys.exit(run(main))
