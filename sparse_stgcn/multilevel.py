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
# Epochs relative to those of a single run: shared weights get the gradients of several levels in every step.
EPOCHS = 0.9


@dataclass
class MultiLevelConfig(TrainConfig):
    """Train several levels of sparsity inside each other as one network, any of which can be used alone.

    The masks are nested, so all levels together store the weights of the widest, plus norms. After the warm-up every step
    trains the widest level on the labels, and the sparsest and some between on the widest's answer. The other options are
    those of sparse_stgcn.train.
    """

    levels: tuple[float, ...] = LEVELS
    """Sparsities, at least two. The lowest is the widest network."""
    between: int = 1
    """How many levels between the widest and the sparsest are trained in a step, drawn anew each time; of two levels none."""
    distillation: float = 1.0
    """Share of the widest's answer in the target of the other levels, in [0, 1]; the labels have the rest."""
    classifier: str = "own"
    """own: one classifier for each level, like the norms; shared: one for all."""
    sparsity: tyro.conf.Suppress[float] = LEVELS[0]
    method: str = "nested"
    """Which blocks live: nested or random (balanced over the rows of a layer), iid, or fan_in."""
    mask_file: tyro.conf.Suppress[str | None] = None

    def __post_init__(self) -> None:
        self.levels = tuple(float(level) for level in self.levels)
        self.sparsity = min(self.levels, default=0.0)
        if self.between == 1 and len(self.levels) == 2:
            self.between = 0  # there is none between two

    @property
    def sorted_levels(self) -> list[float]:
        """From the widest to the sparsest."""
        return sorted(self.levels)

    def resolved(self, preset: str) -> MultiLevelConfig:
        full = super().resolved(preset)
        if self.epochs is None and full.epochs is not None:
            full.epochs = round(EPOCHS * full.epochs)
            full.validate()
        return full

    def validate(self) -> None:
        if len(set(self.levels)) < max(2, len(self.levels)) or not all(0 < level < 1 for level in self.levels):
            raise UserError(f"Expected --levels to be at least two different numbers in (0, 1). "
                            f"Got {' '.join(f'{level:g}' for level in self.levels) or 'none'}.")
        one_of("--method", self.method, METHODS)
        one_of("--classifier", self.classifier, CLASSIFIERS)
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
    levels = " ".join(f"{level:g}" for level in config.sorted_levels)
    return [*of_train(config, job),
            f"levels    {levels}; {2 + config.between} in a step, {config.distillation:.0%} of the targets from the widest, "
            f"{config.classifier} classifier"]


def conclusion(result: dict[str, Any]) -> str:
    """Where the time went."""
    return "time      " + ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())


if __name__ == "__main__":
    sys.exit(run(main))
