"""The largest batch that fits into memory, from the same figures on every run of the same machine.

What a step holds grows linearly with its sequences: two small steps are measured, on the GPU by the allocator's peak, on the
CPU by what the backward pass keeps (``torch.autograd.graph.saved_tensors_hooks``) and the largest tensor in it, and a line
is drawn through them. The room is that of the whole machine, not what happens to be free, and the answer a power of two:
both so that it does not change with the weather. It is written to config.yaml, and a resumed run does not ask again.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TrainConfig
from ..errors import UserError
from .distributed import World

__all__ = ["StepMemory", "choose", "largest_batch", "memory_limit", "smallest_parts", "step_memory"]

SHARE = {"cuda": 0.9, "cpu": 0.7}  # of the memory; the rest is for the context, the cache of the data and other programs
WORKING = 4  # gradients and results of the largest layer that exist beside what is kept for the backward pass
# Resident memory of a step on a CPU over what is counted here: workspace, and holes between the tensors. Measured: 1.15 to 1.61
# (four backbones, dense and at 0.95, 4 and 8 sequences of 64 frames).
RESIDENT = 1.6
_PROBES = (2, 4)  # sequences
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step of n sequences: ``fixed + n * each``."""

    fixed: float
    each: float

    def fitting(self, limit: float) -> int:
        """The largest number of sequences whose step stays below ``limit`` bytes; may be 0."""
        return max(0, int((limit - self.fixed) / self.each))


def choose(config: TrainConfig, chosen: int | None, model: nn.Module, shape: tuple[int, ...], sequences: int,
           world: World) -> None:
    """Set ``batch_size``, or ``accumulate`` where the batch size was chosen.

    Args:
        config: a resolved configuration, changed in place.
        chosen: the batch size that was asked for, or None.
        model: the network of the first stage, which needs the most memory, on its device.
        shape: (M, T, V, C) of a sequence.
        sequences: in the training set.
        world: the processes that share a step; those of a machine share its memory.

    Raises:
        UserError: not one sequence fits.
    """
    device = next(model.parameters()).device
    memory = step_memory(model, shape, config.precision, averaged=config.ema is not None)
    limit = SHARE[device.type] * memory_limit(device) / (1 if device.type == "cuda" else world.local_size)
    fitting = min(int(least) for least in world.gather(memory.fitting(limit)))  # the smallest machine decides
    if fitting < 1:
        raise UserError(f"Expected a step of one sequence to fit into {limit / 1e9:.1f} GB. Got {memory.fixed / 1e9:.1f} GB "
                        f"for the network and {memory.each / 1e9:.2f} GB for each sequence; lower --clip-len or "
                        "--base-channels.")
    if chosen is None:
        config.batch_size = largest_batch(fitting * config.accumulate * world.size, sequences)
    else:
        config.accumulate = smallest_parts(chosen, fitting * world.size)


def largest_batch(fitting: int, sequences: int) -> int:
    """The largest power of two up to both numbers.

        >>> largest_batch(100, 400), largest_batch(1000, 400)
        (64, 256)
    """
    return 1 << (max(1, min(fitting, sequences)).bit_length() - 1)


def smallest_parts(batch_size: int, fitting: int) -> int:
    """Into how many parts a step has to be cut, so that each has at most ``fitting`` sequences.

        >>> smallest_parts(128, 100), smallest_parts(128, 128)
        (2, 1)
    """
    return -(-batch_size // fitting)


def memory_limit(device: torch.device) -> int:
    """Bytes of the device's memory; on a CPU those of the machine, or of the container (cgroup) that the process is in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = []
    if (table := Path("/proc/meminfo")).exists():
        total = next(line for line in table.read_text().splitlines() if line.startswith("MemTotal"))
        limits.append(1024 * int(total.split()[1]))
    for path in _CGROUP_LIMITS:
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    if not limits:
        raise UserError("Expected --auto-batch on a system that tells its memory (Linux, or a GPU). Got another; give "
                        "--batch-size.")
    return min(limits)


def step_memory(model: nn.Module, shape: tuple[int, ...], precision: str = "float32", averaged: bool = False) -> StepMemory:
    """What a training step of ``model`` holds, measured on two small batches of zeros; the model is left as it was.

    Args:
        shape: (M, T, V, C) of a sequence.
        precision: ``float32`` or ``bf16``, as in the configuration.
        averaged: whether an average of the weights is kept beside them.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    probe = copy.deepcopy(model).train()
    device = next(probe.parameters()).device
    small, large = (_measure(probe, torch.zeros(n, *shape, device=device), precision) for n in _PROBES)
    # Tensor by tensor: the largest one may be a copy of a weight, which does not grow with the batch.
    growth = [(b - a) / (_PROBES[1] - _PROBES[0]) for a, b in zip(small, large, strict=True)]
    each, fixed = sum(growth), max(0.0, sum(small) - _PROBES[0] * sum(growth))
    if device.type == "cpu":
        each, fixed = RESIDENT * (each + WORKING * max(growth)), RESIDENT * fixed
    # Weights, gradients and momentum, and the average.
    return StepMemory((4 if averaged else 3) * parameters + fixed, each)


def _measure(model: nn.Module, keypoint: Tensor, precision: str) -> list[int]:
    """Bytes of each tensor that a step keeps for its backward pass beside the parameters; on a GPU its peak instead."""
    device, label = keypoint.device, torch.zeros(len(keypoint), dtype=torch.long, device=keypoint.device)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other tensor takes its address
        return tensor

    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = F.cross_entropy(model(keypoint).float(), label)
    if device.type == "cuda":
        kept.clear()
        loss.backward()
        peak = torch.cuda.max_memory_allocated(device) - before
        model.zero_grad(set_to_none=True)
        return [peak]
    return [keypoint.nbytes, *(size for size, _ in kept.values())]
