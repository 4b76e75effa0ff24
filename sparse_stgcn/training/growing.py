"""Training of nested sparsity levels one after the other: each adds weights to the one inside it.

The sparsest level is trained first, by the two-stage method (see ``generator``): it is the network that it would be alone.
Every wider level l then begins as the one inside it, l - 1, with new weights at the blocks of M_l that are not in M_{l-1}, and
trains these, its batch norms and its classifier on the labels:

    W_l = W_{l-1} + D_l,    D_l live on M_l \\ M_{l-1} only,    D_l ~ N(0, (scale * rms W_{l-1})^2) at first.

With scale 0 a level begins as the function of the one inside it; from random weights it comes to answers of its own, which is
what an ensemble lives on. What a level has learned is never changed by a wider one, and all of them together store the weights
of the widest.
"""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data.dataset import SkeletonDataset
from ..kernels import BlockPattern
from ..recognizer import Recognizer
from ..sparsity import summary
from .batches import Part
from .distributed import World
from .generator import TwoStage
from .levels import Levels
from .multilevel import LevelsTrainer
from .report import Report
from .step import Step
from .stop import StopRequest

__all__ = ["GrowingTrainer"]


class GrowingTrainer(LevelsTrainer):
    """A ``Trainer`` of the sparsest level that goes on with the wider ones.

    Every record of the history has the ``level`` that was trained. The learning rate begins anew with every level.

    Args:
        growth: epochs of each wider level; the sparsest one has those of ``config``.
        scale: of the new weights of a wider level, see ``Levels.around``.
        network: with the patterns of the sparsest level; to resume, the network or the levels that exist.
        patterns, own_classifier: see ``LevelsTrainer``.
    """

    def __init__(self, config: TrainConfig, network: Recognizer | Levels, patterns: Mapping[float, Mapping[str, BlockPattern]],
                 train_set: SkeletonDataset, test_set: SkeletonDataset, work_dir: Path | None = None,
                 report: Report | None = None, growth: int = 1, scale: float = 0.5,
                 own_classifier: bool = True) -> None:
        lengths = [config.epochs or 1, *[growth] * (len(patterns) - 1)]
        report = report or Report(sum(lengths))
        super().__init__(config, network, patterns, train_set, test_set, work_dir, report, own_classifier)
        self.epochs, self._lengths, self.scale = sum(lengths), lengths, scale
        self._begins = [0, *accumulate(lengths[:-1])]
        if self.levels is not None:
            self._train_widest(self.levels)

    @property
    def level(self) -> float:
        """The sparsity of the level that is trained."""
        return sorted(self.patterns, reverse=True)[self._trained_levels() - 1]

    def _trained_levels(self) -> int:
        return 1 if self.levels is None else len(self.levels.members)

    def _place(self) -> int:
        """Which level this epoch belongs to; 0 is the sparsest."""
        return bisect_right(self._begins, self.epoch) - 1

    def _schedule(self) -> tuple[int, int]:
        return self._begins[self._place()], self._lengths[self._place()]

    def _begin_epoch(self) -> None:
        if self._trained_levels() <= self._place():
            self._grow()
        super()._begin_epoch()

    def _grow(self) -> None:
        """The next wider level, which is trained from now on."""
        inner = [self.model] if self.levels is None else list(self.levels.members)
        level = sorted(self.patterns, reverse=True)[len(inner)]
        held = summary(inner[0])
        self.levels = Levels.around(inner, self.patterns[level], self.own_classifier, self.scale)  # type: ignore[arg-type]
        self.model = self.levels.widest
        self._train_widest(self.levels)
        self.report.line(f"level {level:g}: {summary(self.model)}; {held.kept:,} of them stay as they are")

    def _train_widest(self, levels: Levels) -> None:
        config, widest = self.config, levels.widest
        inside = {id(parameter) for parameter in levels.members[1].parameters()}
        own = [parameter for parameter in widest.parameters() if id(parameter) not in inside]
        levels.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.SGD(own, lr=config.learning_rate, momentum=config.momentum, nesterov=True,
                                         weight_decay=config.weight_decay, fused=True)
        self.method = TwoStage(widest, self.warmup_epochs)
        self.step = GrowingStep(config, levels, self.method, self.optimizer)

    def _train_epoch(self, stop: StopRequest) -> dict[str, Any]:
        return {**super()._train_epoch(stop), "level": self.level}

    def _evaluation_due(self) -> bool:
        begin, epochs = self._schedule()
        return super()._evaluation_due() or self.epoch + 1 == begin + epochs


class GrowingStep(Step):
    """Steps of the widest of ``levels``, after which the values of the level inside it are what they were."""

    def __init__(self, config: TrainConfig, levels: Levels, method: TwoStage, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(config, levels.widest, method, optimizer, None, World())
        self.levels = levels

    def __call__(self, parts: Iterable[tuple[Part, Tensor, Tensor]], coefficient: float) -> tuple[float, float, int]:
        result = super().__call__(parts, coefficient)
        self.levels.hold()
        return result
