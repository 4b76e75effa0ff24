"""Peak memory of a training step, measured in a process of its own."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["StepMemory", "peak_memory"]


@dataclass(frozen=True)
class StepMemory:
    """A training step to measure: forward, backward and SGD of a backbone on random input.

    Attributes:
        backbone: as in ``create_model``.
        sparsity: 0 is the dense network.
        block: rows x columns, as in ``sparsify``.
        plain: without this package's native kernels: PyTorch's own layers alone (only for ``sparsity`` 0).
        penalty: the dense warm-up step of ``sparsity``, with the group lasso, in place of the compact one.
    """

    backbone: str = "stgcn"
    sparsity: float = 0.95
    block: tuple[int, int] = (8, 1)
    plain: bool = False
    penalty: bool = False
    batch: int = 8
    persons: int = 2
    frames: int = 100
    classes: int = 60
    threads: int = 2
    steps: int = 2


def peak_memory(step: StepMemory) -> int:
    """Bytes by which the step raises the peak of resident memory above what the process held before its first step.

    The model, the optimiser and the input exist before; gradients, momentum, activations and workspace count. More than one
    step is run, because momentum appears in the first one and takes part in the peak of the second. Memory is kept between
    layers as every training run keeps it (``training.memory``), with ``plain``, too.

    Raises:
        RuntimeError: the step failed; the message is the end of its error output.
        ValueError: ``plain`` with a sparsity.
    """
    _check(step)
    package = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(asdict(step))], env=environment, capture_output=True,
                          text=True)
    if done.returncode != 0:
        raise RuntimeError(f"Expected the step of {step.backbone} to run. Got: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def _check(step: StepMemory) -> None:
    if step.plain and step.sparsity:
        raise ValueError(f"Expected plain only for a dense network. Got sparsity {step.sparsity}.")


def _peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    try:  # not ru_maxrss: on Linux it starts at what the parent held when it forked
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _measure(step: StepMemory) -> int:
    from ..kernels.dispatch import forced_backend

    _check(step)
    with forced_backend("reference") if step.plain else nullcontext():
        return _of_a_step(step)


def _of_a_step(step: StepMemory) -> int:
    import torch
    from torch.nn import functional as F

    from .. import create_model, sparsity
    from ..training.generator import TwoStage
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(step.threads)
    torch.manual_seed(0)
    model = create_model(step.backbone, step.classes)
    if step.sparsity:
        sparsity.sparsify(model, step.sparsity, tuple(step.block))
        if not step.penalty:
            sparsity.compact(model)
    method = TwoStage(model.train(), warmup_epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    x = torch.randn(step.batch, step.persons, step.frames, len(model.backbone.skeleton), 3)
    label = torch.arange(step.batch) % step.classes
    before = _peak()
    for _ in range(step.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), label)
        (loss + method.penalty() if step.penalty else loss).backward()
        del loss  # as in training/step.py: the small pieces of a dead graph lie between the holes that the next one needs
        optimizer.step()
    return _peak() - before


if __name__ == "__main__":
    print(_measure(StepMemory(**json.loads(sys.argv[1]))))
