"""Several processes that train one network: torchrun's environment, what they agree on, and what they exchange.

Every process holds the whole network and works on its share of each batch. After the backward pass their gradients are
averaged by ``torch.nn.parallel.DistributedDataParallel``; that is nearly all that is exchanged, see :func:`traffic`. Process
0 alone writes files.
"""
from __future__ import annotations

import atexit
import gc
import inspect
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError, UserError

__all__ = ["Traffic", "World", "launched", "meet", "traffic"]

MEETING = timedelta(minutes=5)  # that a process may start later than the others
TIMEOUT = timedelta(minutes=30)  # that a process may be behind the others: loading data takes long on the first machine
# What gloo and NCCL say when the other end of a connection is gone.
_LOST = ("connection closed", "connection reset", "broken pipe", "socket", "timed out", "timeout", "nccl", "remote process")


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class World:
    """The processes of one training; a single one by default.

    Attributes:
        rank: number of this process, from 0.
        size: processes in all.
        local_rank, local_size: the same among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def join(cls, device: str | None) -> World:
        """Meet the other processes: with NCCL if they compute on GPUs, with gloo on CPUs.

        Args:
            device: of ``--device``: cpu, cuda (each process takes its own GPU), or None for cuda where there is one.

        Raises:
            UserError: a machine has fewer GPUs than processes, or ``device`` names one GPU for all of them.
            TrainingError: some of the processes did not come within ``MEETING``.
        """
        if not launched():
            return cls()
        rank, size, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in (
            ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
        found = torch.cuda.device_count()
        if device not in (None, "cpu", "cuda"):
            raise UserError(f"Expected --device cpu or cuda with several processes, each of which takes a GPU of its own. "
                            f"Got {device}; leave the number out.")
        on_gpu = device == "cuda" or (device is None and found > 0)
        if on_gpu and found < local_size:
            raise UserError(f"Expected a GPU for each of the {local_size} processes of a machine. Got {found}; lower "
                            "--nproc-per-node, or use --device cpu.")
        if not dist.is_initialized():
            if on_gpu:
                torch.cuda.set_device(local_rank)
            store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
            dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.PrefixStore(meet(store, rank, size), store),
                                    rank=rank, world_size=size, timeout=TIMEOUT)
            if not on_gpu:
                atexit.register(part)
        return cls(rank, size, local_rank, local_size)

    def leave(self) -> None:
        """Part from the others after the work is done."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: its own GPU for ``cuda``."""
        return torch.device("cuda", self.local_rank) if name == "cuda" and self.size > 1 else torch.device(name)

    def share(self, items: Sequence[int]) -> list[int]:
        """This process's part of ``items``: consecutive, its length the same as that of the others up to one."""
        least, more = divmod(len(items), self.size)
        begin = self.rank * least + min(self.rank, more)
        return list(items[begin:begin + least + (self.rank < more)])

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes, in float64, the same in all of them."""
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device())
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, which anything can be that pickle takes."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def copy_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of process 0: running statistics differ where norms are not synchronised."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, **values: Any) -> None:
        """Check that every process has the same value of each name.

        Raises:
            UserError: the name, and the processes that differ from process 0; raised in all of them.
        """
        found = self.gather(values)
        for name in values:
            others = [rank for rank, theirs in enumerate(found) if theirs[name] != found[0][name]]
            if others:
                raise UserError(f"Expected the same {name} in all {self.size} processes. Got {_short(found[0][name])} in "
                                f"process 0 and {_short(found[others[0]][name])} in process {others[0]}; start all of them "
                                "with the same command, files and version.")

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients that are averaged over the processes; itself if there is one.

        Call it again after parameters were replaced: what is exchanged is what is a parameter then.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        # torch 2.13 renames the option; running statistics are equal already, or are copied when they are needed.
        known = inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                                       **options)

    @contextmanager
    def watched(self, saved: Callable[[], str]) -> Iterator[None]:
        """Say what has happened where another process is gone; ``saved`` tells what was saved last.

        Raises:
            TrainingError: in place of the error of the connection.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or isinstance(error, TrainingError) or not any(word in text for word in _LOST):
                raise
            raise TrainingError(f"Expected all {self.size} processes to go on. Got a lost connection in process {self.rank}: "
                                f"another one has ended. {saved()}") from error

    def _device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else torch.device("cpu")


def part() -> None:
    """Let gloo's threads end before the interpreter does: one that puts down its last tensor after that aborts the process.

    They end with the last reference to the group, which a wrapped network holds too; at exit only cycles still hold one.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def meet(store: dist.Store, rank: int, size: int, limit: timedelta = MEETING) -> str:
    """A name for this start of the processes, the same in all of them and never used before in ``store``.

    torchrun keeps one store for all its restarts, so a process would find what the processes before the restart had written,
    and wait at the addresses of the dead (pytorch issue 135712). The count of restarts does not tell two starts apart: every
    machine has its own. Here each process leaves a word of its own; process 0 hands round a name with the words that it
    found, again and again, until each process has found its word beside the name and has said so.

    Args:
        store: that all processes see; what earlier processes have left in it does no harm.
        rank, size: as in ``World``.
        limit: of waiting for the others.

    Raises:
        TrainingError: the processes that did not come.
    """
    word, deadline, missing = uuid.uuid4().hex, time.monotonic() + limit.total_seconds(), [0]
    store.set(f"word/{rank}", word)
    while time.monotonic() < deadline:
        if rank == 0:
            words = [store.get(f"word/{other}").decode() if store.check([f"word/{other}"]) else "" for other in range(size)]
            store.set("start", json.dumps([word, words]))
            missing = [other for other in range(1, size) if not store.check([f"here/{word}/{other}"])]
            if not missing:
                return word
        elif store.check(["start"]):
            name, words = json.loads(store.get("start"))
            if words[rank:rank + 1] == [word]:
                store.set(f"here/{name}/{rank}", "")
                return name
        time.sleep(0.05)
    raise TrainingError(f"Expected {size} processes to meet within {limit.total_seconds():.0f} s. Got no sign of "
                        f"{'process' if len(missing) == 1 else 'processes'} {', '.join(map(str, missing))} in process {rank}; "
                        "see what they say, and whether MASTER_ADDR can be reached from each machine.")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step exchanges.

    Attributes:
        gradients: of all trainable parameters; a ring all-reduce sends 2 (K - 1) / K of them from each of K processes.
        statistics: of synchronised norms, sent to all others in the forward pass and summed in the backward pass.
    """

    gradients: int
    statistics: int

    def __str__(self) -> str:
        text = f"{_megabytes(self.gradients)} of gradients"
        return text + (f" and {_megabytes(self.statistics)} of norm statistics" if self.statistics else "")


def traffic(model: nn.Module, synchronised: bool = False) -> Traffic:
    """What a step of ``model`` in its present stage exchanges: every trainable parameter once, masked weights only in the
    warm-up; with synchronised norms also mean, variance and count of every channel, and two sums of the backward pass."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if synchronised else []
    return Traffic(sum(p.numel() * p.element_size() for p in parameters),
                   sum((4 * m.num_features + 1) * m.weight.element_size() for m in norms))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.3f} MB"


def _short(value: Mapping[str, Any] | object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
