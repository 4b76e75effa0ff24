"""Training of nested sparsity levels together: sandwich rule and in-place distillation.

Stage 1 is the ordinary warm-up (see ``generator``) of one network with the mask of the lowest level. In stage 2 it is
compact, and every sparser level is a network of its own on fewer of the same weights (see ``levels``). A step trains the
widest level on the labels y, then the sparsest and some of those between, drawn anew, on the widest's answer p = softmax(z_1),
which is held fixed:

    L = CE(z_1, y) + sum over active levels l > 1 of (1 - d) CE(z_l, y) + d CE(z_l, p)

with d = 1 in the source: Yu and Huang, Universally Slimmable Networks and Improved Training Techniques, ICCV 2019, sections 3.2
(sandwich rule) and 3.3 (in-place distillation). CE(z, p) differs from the Kullback-Leibler divergence by the entropy of p.
"""
from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TrainConfig
from ..data.dataset import SkeletonDataset
from ..kernels import BlockPattern
from ..recognizer import Recognizer
from ..scores import predict_all
from ..sparsity import summary
from .batches import Part
from .distributed import World
from .generator import TwoStage
from .levels import Levels
from .loop import Trainer
from .report import Report
from .step import Step
from .stop import StopRequest

__all__ = ["LevelsTrainer", "MultiLevelTrainer"]


class LevelsTrainer(Trainer):
    """What the trainers of several levels have in common: what they save and what they test.

    Once there are levels, ``test_accuracy`` of the history is that of all of them together (mean probability) and
    ``test_accuracy_levels`` has each level's own, the widest first.

    Args:
        network: of the warm-up, with the patterns of one level; or, to resume, the levels.
        patterns: sparsity -> name of convolution -> pattern, as ``masks.draw_levels`` gives them.
        own_classifier: see ``Levels``.

    Attributes:
        levels: those that exist; None before the second stage.
    """

    def __init__(self, config: TrainConfig, network: Recognizer | Levels, patterns: Mapping[float, Mapping[str, BlockPattern]],
                 train_set: SkeletonDataset, test_set: SkeletonDataset, work_dir: Path | None = None,
                 report: Report | None = None, own_classifier: bool = True) -> None:
        self.levels = network if isinstance(network, Levels) else None
        super().__init__(config, network if self.levels is None else self.levels.widest, train_set, test_set, work_dir, report)
        self.patterns, self.own_classifier = patterns, own_classifier

    def _trained(self) -> nn.Module:
        return self.model if self.levels is None else self.levels

    def _evaluate(self) -> dict[str, Any]:
        if self.levels is None:
            return super()._evaluate()
        start = time.perf_counter()
        scores = predict_all(list(self.levels.members), self.test_set, None, 2 * self.batch_size, self.workers)
        mean = sum(s.probability for s in scores) / len(scores)
        return {"test_accuracy": float((mean.argmax(1) == scores[0].label).mean()),
                "test_accuracy_levels": [s.metrics()["top1"] for s in scores],
                "test_seconds": time.perf_counter() - start}


class MultiLevelTrainer(LevelsTrainer):
    """A ``Trainer`` whose second stage trains all levels; the network of its warm-up has the patterns of the lowest.

    ``loss`` and ``train_accuracy`` of the history are those of the widest level.

    Args:
        between: how many levels between the widest and the sparsest are trained in a step.
        distillation: d, the share of the widest's answer in the target of the other levels, in [0, 1].
        network, patterns, own_classifier: see ``LevelsTrainer``.
    """

    def __init__(self, config: TrainConfig, network: Recognizer | Levels, patterns: Mapping[float, Mapping[str, BlockPattern]],
                 train_set: SkeletonDataset, test_set: SkeletonDataset, work_dir: Path | None = None,
                 report: Report | None = None, between: int = 1, distillation: float = 1.0,
                 own_classifier: bool = True) -> None:
        super().__init__(config, network, patterns, train_set, test_set, work_dir, report, own_classifier)
        self.between, self.distillation = between, distillation
        if self.levels is not None:
            self._optimise(self.levels)

    def _begin_epoch(self) -> None:
        super()._begin_epoch()
        if self.levels is None and self.method.stage == "fine-tune":
            _, *sparser = (self.patterns[level] for level in sorted(self.patterns))
            self.levels = Levels.of(self.model, sparser, self.own_classifier)  # type: ignore[arg-type]
            self._optimise(self.levels)
            wide = summary(self.model)
            self.report.line(f"levels: {', '.join(f'{level:g}' for level in sorted(self.patterns))}; "
                             f"{self.levels.stored_parameters():,} parameters in all, {wide.kept:,} of them maskable")

    def _optimise(self, levels: Levels) -> None:
        # A level that is not active in a step has no gradients; the fused optimizer needs all or none of a group.
        for parameters in levels.own_parameters():
            self.optimizer.add_param_group({"params": parameters})
        self.step = LevelsStep(self.config, levels, self.method, self.optimizer, self.between, self.distillation)

    def _train_epoch(self, stop: StopRequest) -> dict[str, Any]:
        if self.levels is not None:
            self.levels.train()
        return super()._train_epoch(stop)


class LevelsStep(Step):
    """Steps of stage 2, see the module; returns what a ``Step`` returns of the widest level.

    Args:
        levels: the networks.
        between, distillation: see ``MultiLevelTrainer``.
    """

    def __init__(self, config: TrainConfig, levels: Levels, method: TwoStage, optimizer: torch.optim.Optimizer, between: int,
                 distillation: float) -> None:
        super().__init__(config, levels.widest, method, optimizer, None, World())
        self.levels, self.between, self.distillation = levels, between, distillation

    def __call__(self, parts: Iterable[tuple[Part, Tensor, Tensor]], coefficient: float) -> tuple[float, float, int]:
        loss_sum, hits, active = 0.0, 0, self._active()
        self.optimizer.zero_grad(set_to_none=True)
        for part, keypoint, label in parts:
            keypoint = keypoint.to(self.device, non_blocking=True)
            label = label.to(self.device, non_blocking=True)
            logits = self.forward(self.model, keypoint)
            loss = F.cross_entropy(logits, label)
            (part.weight * loss).backward()
            answer, losses = logits.detach().softmax(1), [loss.detach()]
            for index in active:
                scores = self.forward(self.levels.members[index], keypoint)
                distilled = F.cross_entropy(scores, answer) if self.distillation > 0 else scores.new_zeros(())
                direct = F.cross_entropy(scores, label) if self.distillation < 1 else scores.new_zeros(())
                loss = (1 - self.distillation) * direct + self.distillation * distilled
                (part.weight * loss).backward()
                self.levels.collect(index)
                losses.append(loss.detach())
            # A loss that is not finite ends the training, whichever level has it.
            broken = [float(value) for value in losses if not math.isfinite(value)]
            loss_sum += (broken[0] if broken else float(losses[0])) * len(label)
            hits += int((logits.argmax(1) == label).sum())
        self.optimizer.step()
        self.levels.update()
        return loss_sum, 0.0, hits

    def _active(self) -> list[int]:
        """The levels of a step besides the widest: some between, from torch's random state, and the sparsest."""
        last = len(self.levels.members) - 1
        return [*(1 + torch.randperm(last - 1)[:self.between]).sort().values.tolist(), last]
