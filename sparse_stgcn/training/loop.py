"""The epoch loop: SGD, cosine learning rate, evaluation, history, and a state to continue from exactly."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from ..config import TrainConfig
from ..data.dataset import SkeletonDataset
from ..errors import TrainingError
from ..scores import accuracy
from ..sparsity import masked, summary
from .checkpoint import load_state, save_state
from .generator import TwoStage
from .memory import keep_freed_memory
from .report import Report

__all__ = ["Trainer", "cosine"]

LOG, STATE = "log.jsonl", "resume.safetensors"


def cosine(rate: float, step: int, steps: int) -> float:
    """rate / 2 * (1 + cos(pi * step / steps)): ``rate`` before the first step, 0 after the last."""
    return 0.5 * rate * (1 + math.cos(math.pi * step / steps))


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
        work_dir: an existing directory for ``log.jsonl`` and ``resume.safetensors``; None writes nothing.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, train_set: SkeletonDataset,
                 test_set: SkeletonDataset, work_dir: Path | None = None,
                 report: Report | None = None) -> None:
        self.config, self.model, self.work_dir = config, model, work_dir
        self.train_set, self.test_set = train_set, test_set
        self.epochs, self.eval_every = _known(config, "epochs"), _known(config, "eval_every")
        self.warmup_epochs, self.batch_size = _known(config, "warmup_epochs"), _known(config, "batch_size")
        self.workers = config.workers or 0
        self.device = next(model.parameters()).device
        self.method = TwoStage(model, self.warmup_epochs, config.lasso, config.lasso_schedule,
                               config.lasso_group)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate,
                                         momentum=config.momentum, nesterov=True,
                                         weight_decay=config.weight_decay, fused=True)
        self.loader = DataLoader(train_set, batch_size=self.batch_size, sampler=_EpochOrder(train_set),
                                 num_workers=self.workers, pin_memory=self.device.type == "cuda")
        self.report = report or Report(self.epochs)
        self.history: list[dict[str, Any]] = []
        self.epoch = 0

    def resume(self) -> None:
        """Continue from ``work_dir/resume.safetensors``: momentum, random state, epoch and history.

        The weights and the stage of the network come from the same file by ``checkpoint.load_model``, before
        this object is made.
        """
        if self.work_dir is None:
            raise ValueError("Expected a trainer with work_dir. Got None, so there is nothing to resume "
                             "from.")
        self.epoch, self.history = load_state(self.work_dir / STATE, self.model, self.optimizer)
        text = "".join(json.dumps(record) + "\n" for record in self.history)
        (self.work_dir / LOG).write_text(text, encoding="utf-8")

    def fit(self, until: int | None = None) -> list[dict[str, Any]]:
        """Train the remaining epochs and return the history.

        Args:
            until: stop before this epoch (from 0); another call goes on from there.

        Raises:
            TrainingError: the loss is not finite; the state on disk is that of the last whole epoch.
        """
        keep_freed_memory()
        with self.report:
            while self.epoch < (self.epochs if until is None else min(until, self.epochs)):
                if self.method.begin_epoch(self.epoch, self.optimizer):
                    self.report.line(f"fine-tuning: {summary(self.model)}")
                record = self._train_epoch()
                if self._evaluation_due():
                    record.update(self._evaluate())
                self.history.append(record)
                self.report.epoch(record)
                self.epoch += 1
                self._write(record)
        return self.history

    def _train_epoch(self) -> dict[str, Any]:
        config, method, steps = self.config, self.method, len(self.loader)
        first, total = self.epoch * steps, self.epochs * steps
        warmup_steps = max(1, self.warmup_epochs * steps)
        self.train_set.set_epoch(self.epoch)
        self.model.train()
        self.report.begin(self.epoch, method.stage, steps)
        seen, correct, loss_sum, lasso_sum, rate = 0, 0, 0.0, 0.0, 0.0
        start = time.perf_counter()
        for step, (keypoint, label, _) in enumerate(self.loader, start=first):
            rate = cosine(config.learning_rate, step, total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, lasso, hits = self._step(keypoint, label, method.coefficient(step / warmup_steps))
            if not math.isfinite(loss + lasso):
                raise TrainingError(
                    f"Expected a finite loss. Got loss {loss:g} and lasso {lasso:g} in epoch "
                    f"{self.epoch + 1}, step {step - first + 1}, at learning rate {rate:.4g}; lower --lr, or "
                    "look for outliers in the data.")
            count = len(label)
            seen, correct = seen + count, correct + hits
            loss_sum, lasso_sum = loss_sum + loss * count, lasso_sum + lasso * count
            speed = seen / (time.perf_counter() - start)
            self.report.step(loss=loss_sum / seen, lasso=lasso_sum / seen, accuracy=correct / seen,
                             speed=speed)
        seconds = time.perf_counter() - start
        return {"epoch": self.epoch, "stage": method.stage, "loss": loss_sum / seen,
                "lasso": lasso_sum / seen, "masked_norms": method.masked_norms(),
                "train_accuracy": correct / seen, "learning_rate": rate,
                "samples_per_second": seen / seconds, "seconds": seconds}

    def _step(self, keypoint: Tensor, label: Tensor, coefficient: float) -> tuple[float, float, int]:
        """One step of SGD; (cross entropy, lambda * penalty, number of right answers) of the batch."""
        keypoint = keypoint.to(self.device, non_blocking=True)
        label = label.to(self.device, non_blocking=True)
        logits = self.model(keypoint)
        loss = F.cross_entropy(logits, label)
        penalty = self.method.penalty() if self.method.stage == "warm-up" else loss.new_zeros(())
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.lasso_step == "gradient":
            (loss + coefficient * penalty).backward()
            self.optimizer.step()
        else:
            loss.backward()
            self.optimizer.step()
            # Momentum makes a constant gradient count 1 / (1 - momentum) times; so does the penalty then.
            rate = self.optimizer.param_groups[0]["lr"] / (1 - self.config.momentum)
            self.method.shrink(rate * coefficient)
        hits = int((logits.argmax(1) == label).sum())
        return float(loss.detach()), coefficient * float(penalty.detach()), hits

    def _evaluation_due(self) -> bool:
        done = self.epoch + 1
        last_of_warmup = self.method.stage == "warm-up" and done == self.warmup_epochs
        return done % self.eval_every == 0 or done == self.epochs or last_of_warmup

    def _evaluate(self) -> dict[str, float]:
        start = time.perf_counter()
        options = {"batch_size": 2 * self.batch_size, "workers": self.workers}
        with masked(self.model):
            result = {"test_accuracy": accuracy(self.model, self.test_set, **options)}
        if self.method.stage == "warm-up":
            result["test_accuracy_unmasked"] = accuracy(self.model, self.test_set, **options)
        result["test_seconds"] = time.perf_counter() - start
        return result

    def _write(self, record: dict[str, Any]) -> None:
        if self.work_dir is None:
            return
        with (self.work_dir / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        save_state(self.work_dir / STATE, self.model, self.optimizer, self.epoch, self.history)


class _EpochOrder(Sampler[int]):
    """The data set's own order of its epoch: a function of (seed, epoch), the same in a resumed run."""

    def __init__(self, dataset: SkeletonDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(self.dataset.order().tolist())


def _known(config: TrainConfig, name: str) -> int:
    value = getattr(config, name)
    if value is None:
        raise ValueError(f"Expected a resolved configuration, as config.resolved(preset) gives. Got "
                         f"{name}=None.")
    return value
