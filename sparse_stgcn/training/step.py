"""One step of SGD: the parts of its batch forward and backward, the penalty, the update, the average of the weights."""
from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import TrainConfig
from .batches import Part
from .distributed import World
from .generator import TwoStage

__all__ = ["Average", "Step"]


class Average(AveragedModel):
    """E_0 = W_1, E_t = d E_{t-1} + (1 - d) W_{t+1}: the mean of the weights and of the running statistics over the last steps.

    Args:
        model: the network. When it is made compact, ``module`` has to be, too.
        decay: d.
    """

    module: nn.Module

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def update(self, model: nn.Module) -> None:
        """Take the weights after a step into the average; counters are copied."""
        self.update_parameters(model)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if not ours.is_floating_point():
                ours.copy_(theirs)


class Step:
    """Steps of one training.

    Args:
        config: precision, momentum, ``lasso_step``.
        model, method, optimizer: the network, its stage, and what updates its parameters.
        average: is told of every step.
        world: the processes that share each batch.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, method: TwoStage, optimizer: torch.optim.Optimizer,
                 average: Average | None, world: World) -> None:
        self.config, self.model, self.method, self.optimizer = config, model, method, optimizer
        self.average, self.world = average, world
        self.device = next(model.parameters()).device
        self.rewrap()

    def rewrap(self) -> None:
        """Exchange the gradients of the parameters that the model has now."""
        self.network = self.world.wrap(self.model)

    def __call__(self, parts: Iterable[tuple[Part, Tensor, Tensor]], coefficient: float) -> tuple[float, float, int]:
        """Compute the parts, exchange gradients once, update.

        Args:
            parts: each part of the step with its input (B, M, T, V, C) and its labels (B,).
            coefficient: lambda of the penalty.

        Returns:
            Sum of the cross entropies of this process, lambda * penalty, and the right answers of this process.
        """
        loss_sum, hits = 0.0, 0
        penalty = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for part, keypoint, label in parts:
            with self._exchange(part.last):
                keypoint = keypoint.to(self.device, non_blocking=True)
                label = label.to(self.device, non_blocking=True)
                logits = self.forward(self.network, keypoint)
                loss = F.cross_entropy(logits, label)
                objective = loss if part.weight == 1 else part.weight * loss
                if part.last and self.method.stage == "warm-up":
                    penalty = self.method.penalty()
                    if self.config.lasso_step == "gradient":
                        objective = objective + coefficient * penalty
                objective.backward()
            loss_sum += float(loss.detach()) * len(label)
            hits += int((logits.argmax(1) == label).sum())
            del logits, loss, objective  # the small pieces of a dead graph lie between the holes that the next one needs
        self.optimizer.step()
        if self.config.lasso_step == "proximal":
            # Momentum makes a constant gradient count 1 / (1 - momentum) times; so does the penalty then.
            rate = self.optimizer.param_groups[0]["lr"] / (1 - self.config.momentum)
            self.method.shrink(rate * coefficient)
        if self.average is not None:
            self.average.update(self.model)
        return loss_sum, coefficient * float(penalty.detach()), hits

    def forward(self, network: nn.Module, keypoint: Tensor) -> Tensor:
        """Logits; with ``--precision bf16`` convolutions and products in bfloat16, parameters and the loss in float32."""
        if self.config.precision == "float32":
            return network(keypoint)
        with torch.autocast(self.device.type, torch.bfloat16):
            return network(keypoint).float()

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Gradients of the parts before the last one stay in the process."""
        return nullcontext() if last or not isinstance(self.network, DistributedDataParallel) else self.network.no_sync()
