"""What must hold of several processes, computed by each: ``torchrun --nproc-per-node 2 -m tests.distributed_cases OUT``.

Process 0 writes the figures as JSON; ``test_distributed.py`` starts this and judges them. Networks and inputs are float64, so
that an equality that holds in theory holds to rounding.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from sparse_stgcn import compact, create_model, sparsify
from sparse_stgcn.data import SkeletonDataset
from sparse_stgcn.errors import UserError
from sparse_stgcn.training.batches import Batches
from sparse_stgcn.training.distributed import World, traffic
from sparse_stgcn.training.loop import Trainer
from sparse_stgcn.training.report import Report
from sparse_stgcn.training.run import fixed_persons
from sparse_stgcn.training.synced_norm import synchronise

BACKBONES = ("stgcn", "aagcn", "ctrgcn", "dgstgcn")
SEQUENCES = 5  # of a step: the processes have three and two of them


class DoubleSet(SkeletonDataset):
    """Clips in float64."""

    def batch(self, indices: Any) -> tuple[Tensor, Tensor, Tensor]:
        keypoint, label, index = super().batch(indices)
        return keypoint.double(), label, index


def network(backbone: str, stage: str, frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = sparsify(create_model(backbone, 3, layout=tiny.SKELETON, base_channels=12, **fixed_persons(backbone, 1)), 0.7,
                     (4, 1))
    with torch.no_grad():  # scales that begin at 0 would hide what is behind them
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model = (compact(model) if stage == "compact" else model).double().train()
    for norm in model.modules():
        if frozen and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()
    return model


def gradients(model: nn.Module, keypoint: Tensor, label: Tensor, weight: float = 1.0) -> Tensor:
    model.zero_grad()
    (weight * nn.functional.cross_entropy(model(keypoint), label)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient_errors(world: World) -> dict[str, float]:
    """max |g - g_1| / max |g_1| of the gradients of several processes and of one, norms synchronised or frozen."""
    torch.manual_seed(1)
    keypoint, label = torch.randn(SEQUENCES, 1, 8, 5, 3, dtype=torch.double), torch.arange(SEQUENCES) % 3
    own = world.share(range(SEQUENCES))
    errors = {}
    for backbone in BACKBONES:
        for stage in ("warmup", "compact"):
            for frozen in (False, True):
                alone = network(backbone, stage, frozen)
                expected = gradients(alone, keypoint, label)
                shared = network(backbone, stage, frozen)
                if not frozen:
                    synchronise(shared)
                found = gradients(world.wrap(shared), keypoint[own], label[own], len(own) * world.size / SEQUENCES)
                name = f"{backbone} {stage} {'frozen' if frozen else 'synchronised'}"
                errors[name] = float((found - expected).abs().max() / expected.abs().max())
                statistics = [float((a - b).abs().max()) for a, b in zip(alone.buffers(), shared.buffers(), strict=True)]
                errors[f"{name} statistics"] = max(statistics)
    return errors


def local_statistics_differ(world: World) -> float:
    """The same error with norms over each process's share: not 0, so that the test above can fail."""
    torch.manual_seed(1)
    keypoint, label = torch.randn(4, 1, 8, 5, 3, dtype=torch.double), torch.arange(4) % 3
    own = world.share(range(4))
    expected = gradients(network("stgcn", "compact"), keypoint, label)
    found = gradients(world.wrap(network("stgcn", "compact")), keypoint[own], label[own])
    return float((found - expected).abs().max() / expected.abs().max())


def training(world: World, alone: bool, **changed: Any) -> dict[str, Any]:
    """Weights, momentum and history of a whole training through both stages; and the bytes that its last step of each
    stage exchanged."""
    data = tiny.archive()
    config = tiny.config(lr=0.02, **changed)
    model = tiny.model(config.sparsity).double()
    trainer = Trainer(config, model, DoubleSet(data, "train", clip_len=8), DoubleSet(data, "test", clip_len=8, train=False),
                      None, Report(4, Console(file=io.StringIO())), World() if alone else world)
    sent: dict[str, int] = {}
    if not alone:
        count(trainer, sent)
    history = trainer.fit()
    names = {parameter: name for name, parameter in model.named_parameters()}
    momentum = {names[p]: state["momentum_buffer"] for p, state in trainer.optimizer.state.items()}
    return {"state": trainer.network.state_dict(), "momentum": momentum, "history": history, "sent": sent, "model": model}


def count(trainer: Trainer, sent: dict[str, int]) -> None:
    """Count the bytes of the buckets of every step, by stage."""
    rewrap = trainer.step.rewrap

    def counted() -> None:
        rewrap()
        stage, network = trainer.method.stage, trainer.step.network
        current = {"bytes": 0}

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and ours are text
            current["bytes"] += bucket.buffer().nbytes
            if bucket.is_last():
                sent[stage], current["bytes"] = current["bytes"], 0
            return default_hooks.allreduce_hook(None, bucket)

        network.register_comm_hook(None, hook)

    trainer.step.rewrap = counted  # type: ignore[method-assign]
    counted()


def training_errors(world: World, **changed: Any) -> dict[str, float]:
    one, several = training(world, True, **changed), training(world, False, **changed)
    worst = lambda key: max(float((several[key][name].double() - tensor.double()).abs().max())
                            for name, tensor in one[key].items())
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(one["history"], several["history"], strict=True))
    tested = [(a.get("test_accuracy"), b.get("test_accuracy")) for a, b in zip(one["history"], several["history"], strict=True)]
    return {"state": worst("state"), "momentum": worst("momentum"), "loss": loss,
            "accuracies_equal": all(a == b for a, b in tested),
            "sent": several["sent"], "parameters": 8 * sum(p.numel() for p in several["model"].parameters()),
            "expected": traffic(several["model"]).gradients}


def patterns_that_differ(world: World) -> str:
    try:
        world.agree(patterns=f"digest {world.rank}", data="same")
    except UserError as error:
        return str(error)
    return "nothing was noticed"


def main(out: str) -> None:
    torch.set_num_threads(1)
    world = World.join("cpu")
    batches = Batches(tiny.datasets()[0], 8, 2, world)
    order = np.arange(20)
    mine = [part.indices for step in range(batches.steps) for part in batches.plan(step, order)]
    result = {
        "gradients": gradient_errors(world), "local": local_statistics_differ(world),
        "training": training_errors(world), "accumulated": training_errors(world, accumulate=2, sync_norm=True, ema=0.9),
        "agree": patterns_that_differ(world), "shares": world.gather(mine), "sums": world.sums([world.rank + 1.0, 0.5])}
    if world.first:
        Path(out).write_text(json.dumps(result))
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1])
