"""The two-stage method: a dense warm-up that drains the masked weights, then training of the live blocks.

Stage 1, warm-up. Which blocks live is drawn from the seed before the first step and never changes. Every
weight is trained, with the loss

    L = CE + lambda * sum over groups g of || W*_g ||_2        (paper, Eq. 9)

where W*_g are all masked weights of group g, a group is one of the ten network blocks by default, and lambda
grows linearly over the warm-up or is constant.

Stage 2, fine-tuning. The masked weights, their gradients and their momentum are dropped, not multiplied by
zero; what is left trains on through the sparse kernels with the momentum it had.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..kernels import group_lasso
from ..sparsity import compact_parameters, groups_of, maskable_convs, stage

__all__ = ["TwoStage", "carry_state"]

DENSE, WARMUP, FINETUNE = "dense", "warm-up", "fine-tune"


class TwoStage:
    """The method's state machine around a sparsified network.

    Args:
        model: a network after ``sparsify`` (two stages) or without any pattern (dense throughout, no
            penalty).
        warmup_epochs: epochs of stage 1; the penalty acts in epochs 0 .. warmup_epochs - 1.
        strength: lambda.
        schedule: ``linear``: lambda times the finished fraction of the warm-up; ``constant``: lambda.
        group: ``block``: one norm per network block; ``tensor``: one per weight; ``global``: one in all.

    Attributes:
        stage: ``dense``, ``warm-up`` or ``fine-tune``.
    """

    def __init__(self, model: nn.Module, warmup_epochs: int, strength: float = 1.0, schedule: str = "linear",
                 group: str = "block") -> None:
        self.model, self.warmup_epochs = model, warmup_epochs
        self.strength, self.schedule, self.group = strength, schedule, group
        self.watch()

    def watch(self) -> None:
        """Take the stage and the patterns of the network as they are now."""
        self.stage = {"dense": DENSE, "warmup": WARMUP, "compact": FINETUNE}[stage(self.model)]
        self._layers = {name: (conv, conv.pattern) for name, conv in maskable_convs(self.model).items()
                        if conv.pattern is not None}
        self._blocks = groups_of(list(self._layers))
        count = len(self._layers)
        labels = {"block": self._blocks, "tensor": list(range(count)), "global": [0] * count}[self.group]
        ids: dict[int, int] = {}
        self._groups = [ids.setdefault(label, len(ids)) for label in labels]

    def begin_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> bool:
        """Switch to stage 2 if ``epoch`` (from 0) is its first; True if it did.

        The optimizer then holds the new parameters, with the state that the live weights had.
        """
        if self.stage != WARMUP or epoch < self.warmup_epochs:
            return False
        carry_state(optimizer, compact_parameters(self.model))
        self.stage = FINETUNE
        return True

    def coefficient(self, progress: float) -> float:
        """lambda when ``progress`` in [0, 1] of the warm-up is done; 0 outside the warm-up."""
        if self.stage != WARMUP:
            return 0.0
        return self.strength * (min(progress, 1.0) if self.schedule == "linear" else 1.0)

    def penalty(self) -> Tensor:
        """Scalar: the sum over groups of the norm of the group's masked weights, without lambda.

        Its gradient is W* / ||W*_g|| on masked weights and 0 on kept ones, and 0 where the norm is 0.
        """
        weights = [conv.weight_oik() for conv, _ in self._layers.values()]
        return group_lasso(weights, [pattern for _, pattern in self._layers.values()], self._groups)

    def shrink(self, amount: float) -> None:
        """The proximal step of ``amount`` times the penalty: W*_g becomes W*_g max(0, 1 - amount / ||W*_g||).

        Unlike a gradient step it does not overshoot: masked weights reach 0 and stay there. (Block soft
        threshold; Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.1.)
        """
        if self.stage != WARMUP or amount == 0:
            return
        norms = self._norms(self._groups)
        with torch.no_grad():
            for group, (conv, pattern) in zip(self._groups, self._layers.values(), strict=True):
                factor = max(0.0, 1 - amount / norms[group]) if norms[group] > 0 else 0.0
                weight = conv.weight_oik()
                weight.copy_(torch.where(pattern.mask(), weight, factor * weight))

    def masked_norms(self) -> list[float]:
        """2-norm of the masked weights of each network block, in order; empty outside the warm-up."""
        if self.stage != WARMUP:
            return []
        norms = self._norms(self._blocks)
        return [norms[block] for block in sorted(norms)]

    @torch.no_grad()
    def _norms(self, groups: list[int]) -> dict[int, float]:
        """2-norm of the masked weights of each group; ``groups`` has the group of every layer."""
        squares = dict.fromkeys(groups, torch.zeros((), dtype=torch.float64))
        for group, (conv, pattern) in zip(groups, self._layers.values(), strict=True):
            masked = conv.weight_oik().masked_fill(pattern.mask(), 0)
            squares[group] = squares[group] + torch.linalg.vector_norm(masked, dtype=torch.float64).cpu() ** 2
        return {group: float(square) ** 0.5 for group, square in squares.items()}


def carry_state(optimizer: torch.optim.Optimizer,
                replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]) -> None:
    """Put new parameters in the place of old ones in ``optimizer``, in the same groups and order.

    State of the old parameter's shape (momentum) goes through the parameter's function (the gather of its
    live blocks); other state (step counts) is kept. The old parameters and their state are gone from the
    optimizer.
    """
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, (new, gather) in replaced.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                k: gather(v).detach().clone() if isinstance(v, Tensor) and v.shape == old.shape else v
                for k, v in optimizer.state.pop(old).items()}
