"""The epoch loop: SGD, cosine learning rate, evaluation, history, and a state to continue from exactly."""
from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..checkpoint import write_atomically
from ..config import TrainConfig
from ..data.dataset import SkeletonDataset
from ..errors import Stopped, TrainingError
from ..scores import accuracy
from ..sparsity import compact, densify, masked, summary
from .batches import Batches
from .checkpoint import load_average, load_state, read_position
from .distributed import World, traffic
from .generator import TwoStage
from .kept import STATE, KeptStates, writing
from .memory import keep_freed_memory
from .report import Report
from .same_data import describe
from .step import Average, Step
from .stop import StopRequest
from .synced_norm import synchronise

__all__ = ["STATE", "Totals", "Trainer", "cosine"]

LOG = "log.jsonl"


def cosine(rate: float, step: int, steps: int) -> float:
    """rate / 2 * (1 + cos(pi * step / steps)): ``rate`` before the first step, 0 after the last."""
    return 0.5 * rate * (1 + math.cos(math.pi * step / steps))


@dataclass
class Totals:
    """Sums over the steps of an epoch so far, of all processes: what a run that stops inside an epoch has to keep.

    Attributes:
        step: steps done.
        seen, correct: sequences, and those that were classified right.
        loss, lasso: sums over the sequences.
        seconds: of training.
    """

    step: int = 0
    seen: int = 0
    correct: int = 0
    loss: float = 0.0
    lasso: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Trains a network with the two-stage method and keeps a history.

    The history is a list with one record per epoch: ``epoch`` (from 0), ``stage``, ``loss`` (cross entropy)
    and ``lasso`` (lambda times penalty), both means over the samples, ``masked_norms`` (per network block, at
    the end of the epoch), ``train_accuracy``, ``learning_rate`` (of the last step), ``samples_per_second``
    and ``seconds`` (of training, evaluation left out); in epochs with an evaluation ``test_accuracy`` (one
    clip, masked weights at 0) and in the warm-up ``test_accuracy_unmasked``, and ``test_seconds``.

    Args:
        config: a resolved configuration.
        model: the network, on its device, sparsified or dense.
        train_set, test_set: random training clips, and test clips.
        work_dir: an existing directory for ``log.jsonl`` and the resume files; None writes nothing.
        world: the processes that share each batch; this one alone by default.

    Attributes:
        network: what is tested and kept: the model, or the average of its weights with ``--ema``.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, train_set: SkeletonDataset,
                 test_set: SkeletonDataset, work_dir: Path | None = None,
                 report: Report | None = None, world: World | None = None) -> None:
        self.config, self.model, self.work_dir, self.world = config, model, work_dir, world or World()
        self.train_set, self.test_set = train_set, test_set
        self.epochs, self.eval_every = _known(config, "epochs"), _known(config, "eval_every")
        self.warmup_epochs, self.batch_size = _known(config, "warmup_epochs"), _known(config, "batch_size")
        self.workers = config.workers or 0
        self.device = next(model.parameters()).device
        self.synchronised = self.world.size > 1 and config.sync_norm
        if self.synchronised:
            synchronise(model)
        self.method = TwoStage(model, self.warmup_epochs, config.lasso, config.lasso_schedule,
                               config.lasso_group)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate,
                                         momentum=config.momentum, nesterov=True,
                                         weight_decay=config.weight_decay, fused=True)
        self.average = None if config.ema is None else Average(model, config.ema)
        self.step = Step(config, model, self.method, self.optimizer, self.average, self.world)
        self.batches = Batches(train_set, self.batch_size, config.accumulate, self.world)
        # A loader draws from its generator whenever it begins, also in the middle of an epoch: not from torch's.
        self.loader = DataLoader(train_set, batch_sampler=self.batches, num_workers=self.workers,
                                 pin_memory=self.device.type == "cuda", generator=torch.Generator())
        self.states = None if work_dir is None else KeptStates(work_dir, config.keep)
        self.data = None if work_dir is None else describe(train_set.archive)
        self.report = report or Report(self.epochs)
        self.history: list[dict[str, Any]] = []
        self.epoch, self.totals = 0, Totals()
        self._announced = ""

    def follow(self, method: TwoStage) -> None:
        """Train by this method from now on."""
        self.method = self.step.method = method

    @property
    def network(self) -> nn.Module:
        return self.model if self.average is None or self.average.n_averaged == 0 else self.average.module

    def resume(self, path: Path | None = None) -> None:
        """Continue from a resume file, ``work_dir/resume.safetensors`` by default: momentum, averages, random state, epoch,
        step and history.

        The weights and the stage of the network come from the same file by ``checkpoint.load_model``, before
        this object is made.
        """
        if self.work_dir is None:
            raise ValueError("Expected a trainer with work_dir. Got None, so there is nothing to resume "
                             "from.")
        path = path or self.work_dir / STATE
        self.epoch, self.history = load_state(path, self._trained(), self.optimizer)
        self.totals = Totals(**(read_position(path) or {}))  # type: ignore[arg-type]  # as _save wrote them
        if self.average is not None:
            self.average.module = densify(copy.deepcopy(self.model), forget=True)
            load_average(path, self.average.module)
            self.average.n_averaged.fill_(1)
        if self.world.first and self.states is not None:
            self.states.tidy()
            text = "".join(json.dumps(record) + "\n" for record in self.history)
            write_atomically(self.work_dir / LOG, text.encode())

    def fit(self, until: int | None = None) -> list[dict[str, Any]]:
        """Train the remaining epochs and return the history.

        Args:
            until: stop before this epoch (from 0); another call goes on from there.

        Raises:
            TrainingError: the loss is not finite, another process is gone, or the state cannot be written; the state on
                disk is the one that was saved last.
            Stopped: SIGTERM has come; the state on disk is that of the last step.
        """
        keep_freed_memory()
        with self.report, StopRequest() as stop, self.world.watched(self._saved):
            while self.epoch < (self.epochs if until is None else min(until, self.epochs)):
                self._begin_epoch()
                record = self._train_epoch(stop)
                if self._evaluation_due():
                    try:
                        with stop.at_once():
                            record.update(self._evaluate())
                    except Stopped:
                        self._stop()
                self.history.append(record)
                self.report.epoch(record)
                self.epoch, self.totals = self.epoch + 1, Totals()
                self._write(record)
                if self.world.sums([stop.asked])[0]:
                    self._stop(saved=True)
        return self.history

    def _begin_epoch(self) -> None:
        """Go over to the second stage if its first epoch begins."""
        if self.method.begin_epoch(self.epoch, self.optimizer):
            self.step.rewrap()
            if self.average is not None:
                compact(self.average.module)
            self.report.line(f"fine-tuning: {summary(self.model)}")
        if self.world.size > 1 and self._announced != self.method.stage:
            self._announced = self.method.stage
            self.report.line(f"exchange  {self.method.stage}: {traffic(self.model, self.synchronised)} per step")

    def _schedule(self) -> tuple[int, int]:
        """First epoch and number of epochs of the schedule of the learning rate that this epoch is in."""
        return 0, self.epochs

    def _trained(self) -> nn.Module:
        """What the resume file holds."""
        return self.model

    def _train_epoch(self, stop: StopRequest) -> dict[str, Any]:
        config, method, steps, totals = self.config, self.method, self.batches.steps, self.totals
        begin, epochs = self._schedule()
        first, total = (self.epoch - begin) * steps, epochs * steps
        warmup_steps = max(1, self.warmup_epochs * steps)
        self.train_set.set_epoch(self.epoch)
        self.batches.start = totals.step
        order, feed = self.train_set.order(), iter(self.loader)
        self.model.train()
        self.report.begin(self.epoch, method.stage, steps, totals.step)
        rate = cosine(config.learning_rate, first + steps - 1, total)
        before, start = totals.seconds, time.perf_counter()
        for number in range(totals.step, steps):
            step = first + number
            rate = cosine(config.learning_rate, step, total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            parts = ((part, *next(feed)[:2]) for part in self.batches.plan(number, order))
            loss_sum, lasso, hits = self.step(parts, method.coefficient(step / warmup_steps))
            copies = 1 if self.batches.divided(number) else self.world.size
            loss_sum, correct, asked = self.world.sums([loss_sum / copies, hits / copies, stop.asked])
            count = self.batches.size(number)
            if not math.isfinite(loss_sum + lasso):
                raise TrainingError(
                    f"Expected a finite loss. Got loss {loss_sum / count:g} and lasso {lasso:g} in epoch "
                    f"{self.epoch + 1}, step {number + 1}, at learning rate {rate:.4g}; lower --lr, or "
                    "look for outliers in the data.")
            totals.step, totals.seen, totals.correct = number + 1, totals.seen + count, totals.correct + round(correct)
            totals.loss, totals.lasso = totals.loss + loss_sum, totals.lasso + lasso * count
            totals.seconds = before + time.perf_counter() - start
            self.report.step(loss=totals.loss / totals.seen, lasso=totals.lasso / totals.seen,
                             accuracy=totals.correct / totals.seen, speed=totals.seen / totals.seconds)
            if asked:
                self._stop()
            if config.save_every_steps and (number + 1) % config.save_every_steps == 0 and number + 1 < steps:
                self._save()
        return {"epoch": self.epoch, "stage": method.stage, "loss": totals.loss / totals.seen,
                "lasso": totals.lasso / totals.seen, "masked_norms": method.masked_norms(),
                "train_accuracy": totals.correct / totals.seen, "learning_rate": rate,
                "samples_per_second": totals.seen / totals.seconds, "seconds": totals.seconds}

    def _evaluation_due(self) -> bool:
        done = self.epoch + 1
        last_of_warmup = self.method.stage == "warm-up" and done == self.warmup_epochs
        return done % self.eval_every == 0 or done == self.epochs or last_of_warmup

    def _evaluate(self) -> dict[str, Any]:
        start, network = time.perf_counter(), self.network
        self.world.copy_buffers(network)
        with masked(network):
            result = {"test_accuracy": self._accuracy(network)}
        if self.method.stage == "warm-up":
            result["test_accuracy_unmasked"] = self._accuracy(network)
        result["test_seconds"] = time.perf_counter() - start
        return result

    def _accuracy(self, network: nn.Module) -> float:
        """Top-1 on the test set, of which each process takes a share."""
        own = self.world.share(range(len(self.test_set)))
        hits = len(own) * accuracy(network, Subset(self.test_set, own), 2 * self.batch_size, self.workers) if own else 0
        return round(self.world.sums([hits])[0]) / len(self.test_set)

    def _write(self, record: dict[str, Any]) -> None:
        """The record of a finished epoch, and the state after it."""
        if self.work_dir is not None and self.states is not None and self.world.first:
            with writing(self.states), (self.work_dir / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        self._save()

    def _save(self) -> None:
        if self.states is not None and self.world.first:
            average = None if self.average is None else self.average.module
            position = asdict(self.totals) if self.totals.step else None
            self.states.save(self._trained(), self.optimizer, self.epoch, self.history, position, average, self.data)

    def _stop(self, saved: bool = False) -> None:
        if not saved:
            self._save()
        where = f"after step {self.totals.step} of epoch {self.epoch + 1}" if self.totals.step else f"after epoch {self.epoch}"
        state = f"{self.states.goes_on}." if self.states is not None else "nothing was saved."
        raise Stopped(f"SIGTERM came; stopped {where}; {state}")

    def _saved(self) -> str:
        if self.states is None or not self.states.files():
            return "Nothing was saved; start again."
        return f"What was saved last is whole; continue with --resume {self.work_dir} (torchrun --max-restarts does)."


def _known(config: TrainConfig, name: str) -> int:
    value = getattr(config, name)
    if value is None:
        raise ValueError(f"Expected a resolved configuration, as config.resolved(preset) gives. Got "
                         f"{name}=None.")
    return value
