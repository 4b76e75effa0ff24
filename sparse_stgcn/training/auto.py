"""Automatic sparsity: the level and the density of every layer are chosen under a budget, early in the warm-up.

The first ``measure_epochs`` of the warm-up are dense and without penalty. Then gradients of a few batches say how much the
loss depends on every layer (``allocation.sensitivity``), rules make densities of that, short trials on live weights compare
the rules, and the winner's masks are attached; the rest is the two-stage method. What was chosen is in ``auto.json`` before
it is used, so that a run that is interrupted goes on with it.
"""
from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..allocation.budget import Budget
from ..allocation.costs import Costs
from ..allocation.front import Point, front, table, to_csv
from ..allocation.latency import LatencyTable, measure, measure_network
from ..allocation.rules import shares
from ..allocation.search import Allocator
from ..allocation.sensitivity import sensitivity
from ..checkpoint import write_atomically
from ..config import TrainConfig
from ..kernels import BlockPattern
from ..recognizer import Recognizer
from ..sparsity import mask_layers, maskable_convs, summary
from . import trial
from .generator import DENSE, TwoStage
from .loop import Trainer

__all__ = ["FILE", "Automatic", "Problem", "verified"]

FILE = "auto.json"
BATCHES = 32  # of gradients
STEPS = 64  # of SGD, of each trial
COMPARED_AT = 0.95  # sparsity of the trials that compare rules where the budget is a loss of accuracy
LEVELS = (0.6, 0.8, 0.9, 0.95, 0.98, 0.99)  # sparsities of the points beside the chosen one


@dataclass(frozen=True)
class Problem:
    """What is to be chosen, and under which budget.

    Attributes:
        found: content of ``auto.json`` of the run that goes on, or None.
    """

    budget: Budget
    allocator: Allocator
    found: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: TrainConfig, model: Recognizer, meta: Mapping[str, Any]) -> Problem:
        """Of a resolved configuration and its dense network; a budget in seconds is measured for now.

        Args:
            meta: what the checkpoint will hold beside the network.

        Raises:
            UserError: the budget cannot be kept, or buys the dense network.
            ValueError: a budget in seconds without a fused program for the network.
        """
        budget = config.limit()
        found = read(config.resume)
        layers = mask_layers(model, config.block)
        frames, persons = config.clip_len or 1, config.num_person or 1
        if found is not None:
            latency = None if found["latency"] is None else LatencyTable.from_dict(found["latency"])
        elif config.sparsity == "auto":
            latency = latency_of(model, config, required=budget.kind == "seconds")
        else:
            latency = None
        costs = Costs.of(model, layers, frames, persons, meta, latency)
        allocator = Allocator.of(costs)
        if budget.kind != "points":
            allocator.check(budget)
        return cls(budget, allocator, found)


def latency_of(model: Recognizer, config: TrainConfig, required: bool) -> LatencyTable | None:
    """The table of this machine; None where there is no fused program and none is required."""
    try:
        return measure(model, config.block, config.clip_len or 1, config.num_person or 1)
    except ValueError:
        if required:
            raise
        return None


def read(work_dir: str | Path | None) -> dict[str, Any] | None:
    """``auto.json`` of a work directory, or None."""
    path = None if work_dir is None else Path(work_dir) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None


class Automatic(TwoStage):
    """The two-stage method with masks that are chosen after ``measure_epochs``.

    Args:
        trainer: of the dense network; its data give gradients and trials.
        problem: see ``Problem``.
    """

    def __init__(self, trainer: Trainer, problem: Problem) -> None:
        config = trainer.config
        super().__init__(trainer.model, trainer.warmup_epochs, config.lasso, config.lasso_schedule, config.lasso_group)
        self.trainer, self.problem = trainer, problem
        self.measure_epochs = min(config.measure_epochs, trainer.warmup_epochs)

    def begin_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> bool:
        """Choose and attach the masks when ``epoch`` is the first after the measurement; then like ``TwoStage``."""
        if self.stage == DENSE and epoch >= self.measure_epochs:
            if (found := self.problem.found) is None:
                with torch.random.fork_rng(devices=[]):  # a run that goes on with the choice has not made it
                    found = self._choose()
            self._attach(found["blocks"])
        return super().begin_epoch(epoch, optimizer)

    def _attach(self, blocks: Mapping[str, int]) -> None:
        layers = self.problem.allocator.costs.layers
        patterns = trial.patterns(layers, np.array([blocks[layer.name] for layer in layers]), self.trainer.config)
        # The average is of copies: it has to become compact with the network.
        average = self.trainer.average
        for model in (self.model,) if average is None else (self.model, average.module):
            for name, conv in maskable_convs(model).items():
                conv.attach(patterns[name])
        self.watch()

    def _choose(self) -> dict[str, Any]:
        """Measure, try and decide; the content of ``auto.json``, which is written with ``front.csv``."""
        trainer, allocator, start = self.trainer, self.problem.allocator, time.perf_counter()
        costs, budget = allocator.costs, self.problem.budget
        need = sensitivity(trainer.model, costs.layers, trial.batches(trainer, BATCHES))
        rules = shares(costs, need)
        counts = {name: self._within(share) for name, share in rules.items()}
        losses = {name: trial.trained_loss(trainer, self._patterns(option), STEPS) for name, option in counts.items()}
        winner = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))  # NaN: the trial diverged
        lost: dict[float, float] = {}
        chosen = self._sparsest(rules[winner], budget.value, lost) if budget.kind == "points" else None
        points = [self._point(name, option, need, losses[name], chosen=chosen is None and name == winner)
                  for name, option in counts.items()]
        for sparsity in LEVELS:
            points += [self._point(name, self._at(sparsity, share), need, None, lost.get(sparsity) if name == winner else None,
                                   name == winner and sparsity == chosen) for name, share in rules.items()]
        kept = counts[winner] if chosen is None else self._at(chosen, rules[winner])
        best = front(points)
        made = {
            "budget": budget.text, "rule": winner, "sparsity": 1 - costs.weights(kept) / costs.maskable,
            "blocks": dict(zip((layer.name for layer in costs.layers), kept.tolist(), strict=True)),
            "densities": costs.density(kept), "sensitivity": need, "trial_loss": losses, "lost_points": lost,
            "points": [{**point.to_dict(), "front": point in best} for point in points],
            "latency": None if costs.latency is None else costs.latency.to_dict(), "seconds": time.perf_counter() - start}
        if trainer.work_dir is not None:
            write_atomically(trainer.work_dir / "front.csv", to_csv(points).encode())
            write_atomically(trainer.work_dir / FILE, (json.dumps(made, indent=1) + "\n").encode())
        for line in table(points):
            trainer.report.line(line)
        return made

    def _within(self, share: np.ndarray) -> np.ndarray:
        """Counts under the budget; where that is accuracy, at the level at which rules are compared then."""
        budget = self.problem.budget
        return self._at(COMPARED_AT, share) if budget.kind == "points" else self.problem.allocator.within(share, budget)

    def _at(self, sparsity: float, share: np.ndarray) -> np.ndarray:
        return self.problem.allocator.counts(share, (1 - sparsity) * self.problem.allocator.costs.maskable)

    def _patterns(self, counts: np.ndarray) -> dict[str, BlockPattern]:
        return trial.patterns(self.problem.allocator.costs.layers, counts, self.trainer.config)

    def _sparsest(self, share: np.ndarray, limit: float, lost: dict[float, float]) -> float:
        """The sparsest level that loses at most ``limit`` on held-out sequences; ``lost`` takes what was measured."""
        held = trial.HeldOut(self.trainer, self.trainer.config.trial_epochs or 1)
        dense = held.accuracy(None)

        def measured(sparsity: float) -> float:
            lost[sparsity] = dense - held.accuracy(self._patterns(self._at(sparsity, share)))
            return lost[sparsity]

        return trial.sparsest(LEVELS, measured, limit)

    def _point(self, rule: str, counts: np.ndarray, need: Mapping[str, float], loss: float | None = None,
               lost: float | None = None, chosen: bool = False) -> Point:
        costs = self.problem.allocator.costs
        density = costs.density(counts)
        damage = sum(need[name] * (1 / density[name] - 1) for name in need)
        return Point(rule, costs.weights(counts) / costs.maskable, costs.bytes(counts), costs.multiply_adds(counts),
                     costs.seconds(counts), damage, loss, lost, chosen)


def verified(work_dir: Path, model: Recognizer, config: TrainConfig) -> dict[str, Any] | None:
    """``auto.json`` and what the trained network really has; None for a run without it.

    ``measured`` has the kept weights and, where a latency was predicted, the ``seconds`` of optimised inference, now.
    """
    found = read(work_dir)
    if found is None:
        return None
    measured: dict[str, float] = {"kept": summary(model).kept_fraction}
    if found["latency"] is not None:
        measured["seconds"] = measure_network(copy.deepcopy(model).cpu(), config.clip_len or 1, config.num_person or 1)
    return {**found, "measured": measured}
