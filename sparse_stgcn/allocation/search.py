"""From a rule and a budget to live blocks per layer: the most that the budget pays for."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from ..masks import spread
from .budget import Budget
from .costs import Costs

__all__ = ["Allocator"]


@dataclass(frozen=True)
class Allocator:
    """Live blocks of every layer for a target, a rule and a budget.

    Attributes:
        costs: of the network.
        lowest: the fewest blocks of every layer.
    """

    costs: Costs
    lowest: np.ndarray

    @classmethod
    def of(cls, costs: Costs) -> Allocator:
        """With the floor of random masks: one block in each row of every layer."""
        return cls(costs, np.array([layer.grid[0] for layer in costs.layers], dtype=float))

    def counts(self, share: np.ndarray, target: float) -> np.ndarray:
        """Counts with densities in proportion to ``share`` that keep ``target`` weights up to half a block."""
        return spread(self.costs.layers, share, target, self.lowest)

    def cost(self, kind: str, counts: np.ndarray) -> float:
        """A cost of ``counts`` of a kind that ``Budget`` has."""
        if kind == "seconds":
            seconds = self.costs.seconds(counts)
            if seconds is None:
                raise ValueError("Expected a network with a latency table. Got none.")
            return seconds
        return self.costs.weights(counts) / self.costs.maskable if kind == "weights" else self.costs.bytes(counts)

    def within(self, share: np.ndarray, budget: Budget) -> np.ndarray:
        """The counts of the largest target that costs no more than ``budget``; up to half a block for kept weights.

        Raises:
            UserError: the fewest blocks cost more already, or all of them less.
        """
        self.check(budget)
        if budget.kind == "weights":
            return self.counts(share, budget.value * self.costs.maskable)
        return self._largest(lambda target: self.counts(share, target), budget)

    def check(self, budget: Budget) -> None:
        """Raise a UserError unless ``budget`` lies between the network with the fewest blocks and the dense one."""
        everything = np.array([layer.num_blocks for layer in self.costs.layers], dtype=float)
        least, most = self.cost(budget.kind, self.lowest), self.cost(budget.kind, everything)
        if budget.value < least:
            raise UserError(f"Expected {budget.option} to leave at least {budget.format(least)}, which this network costs with "
                            f"one block in every row. Got {budget.text}; use smaller blocks, or fewer --base-channels.")
        if budget.value >= most:
            raise UserError(f"Expected {budget.option} to leave less than {budget.format(most)}, the cost of the dense "
                            f"network. Got {budget.text}; train that one with --sparsity 0.")

    def _largest(self, counts: Callable[[float], np.ndarray], budget: Budget) -> np.ndarray:
        """By bisection over the target, down to a weight: costs never fall where it rises."""
        low, high = self.costs.weights(self.lowest), float(self.costs.maskable)
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(budget.kind, counts(middle)) <= budget.value else (low, middle)
        return counts(low)
