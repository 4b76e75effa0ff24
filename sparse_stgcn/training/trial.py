"""Trials: short trainings of copies on live weights, to compare choices of masks before one of them is trained in full.

Clips of a trial are those of epochs that the run itself never sees, and nothing of the run is touched.
"""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masks
from ..config import TrainConfig
from ..data.dataset import SkeletonDataset
from ..kernels import BlockPattern
from ..recognizer import Recognizer
from ..sparsity import compact, maskable_convs
from .loop import Trainer
from .report import Report

__all__ = ["HELD_OUT", "HeldOut", "batches", "held_out", "patterns", "sparsest", "trained_loss"]

EPOCH = 1 << 20  # first epoch of the clips of trials
HELD_OUT = 5  # the last of every so many training sequences of a class is held out


def patterns(layers: Sequence[masks.Layer], counts: np.ndarray, config: TrainConfig) -> dict[str, BlockPattern]:
    """Masks with these counts by the run's method and seed."""
    density = {layer.name: count / layer.num_blocks for layer, count in zip(layers, counts.tolist(), strict=True)}
    return masks.draw(layers, 0.0, config.method, density, seed=config.seed)


def batches(trainer: Trainer, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(keypoint, label) of ``count`` training batches on the network's device; the data set's epoch is left as it was."""
    data, size, epoch = trainer.train_set, trainer.batch_size, trainer.train_set.epoch
    try:
        made = 0
        while made < count:
            for keypoint, label, _ in data.batches(size, EPOCH + made):
                yield keypoint.to(trainer.device), label.to(trainer.device)
                made += 1
                if made == count:
                    break
    finally:
        data.set_epoch(epoch)


def trained_loss(trainer: Trainer, masks_of: Mapping[str, BlockPattern], steps: int) -> float:
    """Mean loss over the second half of ``steps`` steps of SGD that a copy with these masks makes on its live weights."""
    config, model = trainer.config, copy.deepcopy(trainer.model).train()
    for name, conv in maskable_convs(model).items():
        conv.attach(masks_of[name])
    compact(model)
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, config.momentum, nesterov=True,
                                weight_decay=config.weight_decay)
    losses = [_step(model, optimizer, keypoint, label) for keypoint, label in batches(trainer, steps)]
    return float(np.mean(losses[steps // 2:]))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, keypoint: Tensor, label: Tensor) -> float:
    loss = F.cross_entropy(model(keypoint), label)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class HeldOut:
    """Accuracy of new networks on a part of the training sequences, after a short training on the others.

    Args:
        trainer: of the run: data, network and recipe are its own.
        epochs: of each training.
    """

    def __init__(self, trainer: Trainer, epochs: int) -> None:
        self.device, self.network = trainer.device, dict(trainer.model.config)  # type: ignore[arg-type]  # a Recognizer
        fit, held = held_out(trainer.train_set)
        self.fit, self.held = _part(trainer.train_set, fit, True), _part(trainer.train_set, held, False)
        self.config = replace(trainer.config, epochs=epochs, warmup_epochs=0, eval_every=epochs)

    def accuracy(self, masks_of: Mapping[str, BlockPattern] | None) -> float:
        """Top-1 with these masks, or dense; the initial weights are always those of the run's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = Recognizer.from_config(self.network).to(self.device)
        for name, conv in maskable_convs(model).items():
            if masks_of is not None:
                conv.attach(masks_of[name])
        epochs = self.config.epochs or 1
        history = Trainer(self.config, model, self.fit, self.held, report=Report(epochs, Console(quiet=True))).fit()
        return float(history[-1]["test_accuracy"])


def sparsest(levels: Sequence[float], lost: Callable[[float], float], limit: float) -> float:
    """The highest of ascending ``levels`` at which ``lost(level)`` is at most ``limit``, by bisection.

    ``lost`` is taken to rise with the level, and is called about log2 of the number of levels times. Where even the lowest
    level loses more, it is the answer, with a warning.
    """
    good, bad = -1, len(levels)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if lost(levels[middle]) <= limit else (good, middle)
    if good < 0:
        warnings.warn(f"every sparsity from {levels[0]:g} on lost more than {100 * limit:g} points on held-out training "
                      f"sequences; {levels[0]:g} is trained.", stacklevel=2)
    return levels[max(good, 0)]


def held_out(data: SkeletonDataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the archive of the training sequences to fit, and of those to hold out: a fifth of every class.

    A class of fewer than five sequences is only fitted.
    """
    labels = data.labels.numpy()
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    held = rank % HELD_OUT == HELD_OUT - 1
    return data.members[~held], data.members[held]


def _part(data: SkeletonDataset, members: np.ndarray, train: bool) -> SkeletonDataset:
    """The same clips of a part of a data set's sequences, at random or fixed."""
    return SkeletonDataset(data.archive, members, data.stream, data.clip_len, 1, train, data.seed, data.num_person,
                           data.preparation.align, data.rotate if train else 0.0, data.scale if train else 0.0,
                           data.preparation.missing, data.preparation.sampler, box=data.preparation.box)
