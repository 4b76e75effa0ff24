"""Which engine runs a clip length: the compiled program, or torch's dense one where that is measured to be faster."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import BlockPattern
from ..layers import SparseConv2d, TemporalUnit
from ..recognizer import Recognizer
from ..sparsity import densify, maskable_convs

ENGINES = ("fused", "fused in 8x1", "torch", "torch channels_last")
MEASURED_ABOVE = 0.5  # density; with fewer live weights the program does less than half of the dense work
WIDENED_ABOVE = 0.25  # density; single weights cost about three times as much each as those of 8x1, and 8 of them fill a block
_ROUNDS = 3


def density(model: nn.Module) -> float:
    """Live fraction of the maskable weights as the convolutions run them."""
    convs = maskable_convs(model).values()
    live = sum((conv.weight if conv.values is None else conv.values).numel() for conv in convs)
    return live / sum(out * inputs * taps for out, inputs, taps in (conv.shape_oik for conv in convs))


def candidates(model: nn.Module) -> tuple[str, ...]:
    """The engines that can be the fastest one for a model, the program first."""
    program, wide, *torchs = ENGINES
    names = [program]
    if any(map(_widens, maskable_convs(model).values())):
        names.append(wide)
    if density(model) > MEASURED_ABOVE:
        names += torchs
    return tuple(names)


@torch.no_grad()
def widened(model: Recognizer) -> Recognizer:
    """A copy in which convolutions of more than ``WIDENED_ABOVE`` of their weights, in blocks of fewer than 8 outputs, have
    the blocks (8, 1) that cover theirs, with zeros inside: the same function."""
    made = copy.deepcopy(model)
    for conv in filter(_widens, maskable_convs(made).values()):
        weight = conv.weight_oik()
        rows = F.pad(conv.pattern.mask(), (0, 0, 0, 0, 0, -len(weight) % 8))  # True where a weight is kept
        conv.pattern = BlockPattern.from_blocks(rows.unflatten(0, (-1, 8)).any(1), conv.shape_oik, (8, 1))
        conv.values = nn.Parameter(conv.pattern.gather(weight), requires_grad=False)
    return made


def dense(model: Recognizer, engine: str) -> Recognizer:
    """A dense copy of a model in eval mode, batch norms behind convolutions folded in, in the memory layout of ``engine``."""
    made = densify(copy.deepcopy(model)).eval()
    for unit in made.modules():
        if isinstance(unit, TemporalUnit) and isinstance(unit.bn, nn.BatchNorm2d):
            _fold(unit.conv, unit.bn)
            unit.bn = nn.Identity()
        elif isinstance(unit, nn.Sequential) and len(unit) == 2 and isinstance(unit[0], SparseConv2d) \
                and isinstance(unit[1], nn.BatchNorm2d):
            _fold(unit[0], unit[1])
            unit[1] = nn.Identity()
    return made.to(memory_format=torch.channels_last if engine == "torch channels_last" else torch.contiguous_format)


def fastest(engines: list[tuple[str, Callable[[Tensor], Tensor]]], keypoint: Tensor) -> str:
    """The engine with the least time of a few runs on ``keypoint``, each after one that does not count."""
    times = []
    for name, run in engines:
        run(keypoint)
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            run(keypoint)
            times.append((time.perf_counter() - begin, name))
    return min(times)[1]


@torch.no_grad()
def _fold(conv: SparseConv2d, norm: nn.BatchNorm2d) -> None:
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * gain
    conv.weight.mul_(gain[:, None, None, None])
    conv.bias = nn.Parameter(shift if conv.bias is None else shift + conv.bias * gain, requires_grad=False)


def _widens(conv: SparseConv2d) -> bool:
    return conv.values is not None and conv.pattern is not None and conv.pattern.block[0] < 8 and conv.shape_oik[0] >= 8 \
        and conv.pattern.density > WIDENED_ABOVE
