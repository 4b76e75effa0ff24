"""Which sequences a process computes, and when: a function of (seed, epoch, step), whatever the number of processes.

The order of an epoch is that of the data set, cut into steps of ``batch_size`` sequences. A step is cut into parts that are
computed one after another (gradient accumulation), and a part into the shares of the processes. So a run can stop at any step
and go on there, on another number of processes as well.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from ..data.dataset import SkeletonDataset
from .distributed import World

__all__ = ["Batches", "Part"]


@dataclass(frozen=True)
class Part:
    """This process's share of a part of a step.

    Attributes:
        indices: the sequences.
        weight: of their mean loss, so that the average over the processes of the sum over the parts is the mean over the step.
        last: the gradients of the step are complete after it.
    """

    indices: list[int]
    weight: float
    last: bool


class Batches(Sampler[list[int]]):
    """The parts of the steps of an epoch, as a batch sampler.

    Args:
        dataset: its ``order`` and its epoch.
        batch_size: sequences of a step, of all processes together.
        parts: parts of a step.
        world: the processes.

    Attributes:
        start: the step of the epoch to begin with.

    A part with fewer sequences than processes, which only the rest at the end of an epoch can have, is computed whole by
    each of them (``divided`` is false then): a process without work could not take part in the exchange.
    """

    def __init__(self, dataset: SkeletonDataset, batch_size: int, parts: int = 1, world: World | None = None) -> None:
        self.dataset, self.batch_size, self.parts, self.world = dataset, batch_size, parts, world or World()
        self.start = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def size(self, step: int) -> int:
        """Sequences of a step, of all processes together."""
        return min(self.batch_size, len(self.dataset) - step * self.batch_size)

    def divided(self, step: int) -> bool:
        """Whether the processes share the step."""
        return self.size(step) >= self.world.size

    def plan(self, step: int, order: np.ndarray) -> list[Part]:
        """The parts of a step of the epoch of which ``order`` is the order."""
        batch = order[step * self.batch_size:][:self.size(step)]
        shared = self.divided(step)
        count = min(self.parts, len(batch) // self.world.size) if shared else 1
        plan = []
        for i, part in enumerate(np.array_split(batch, count)):
            own = self.world.share(part.tolist()) if shared else part.tolist()
            weight = len(own) * (self.world.size if shared else 1) / len(batch)
            plan.append(Part(own, weight, i == count - 1))
        return plan

    def __len__(self) -> int:
        return sum(len(self.plan(step, np.arange(len(self.dataset)))) for step in range(self.start, self.steps))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.dataset.order()
        for step in range(self.start, self.steps):
            yield from (part.indices for part in self.plan(step, order))
