"""How the cost grows: with samples N, persons M and frames T of a network, and with the live blocks of one convolution."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ..kernels import temporal_conv
from ..runtime import optimize
from .measure import machine_peaks, paired
from .networks import Pattern, Setting, sparse_network
from .ops import draw
from .peers import candidate

FACTORS = (1, 4, 16)


@dataclass(frozen=True)
class Growth:
    """One size along one axis.

    Attributes:
        axis: ``N``, ``M``, ``T`` of ``subject``, or ``live blocks``.
        size: along the axis.
        seconds: median over the rounds.
        proportional: seconds / (seconds at the first size * size / first size): 1 is linear, below 1 better.
        floor: seconds that copying the input and the output once takes, for live blocks; else None.
    """

    subject: str
    axis: str
    size: float
    seconds: float
    proportional: float
    floor: float | None = None


def network(setting: Setting, pattern: Pattern, rounds: int) -> list[Growth]:
    """Fused inference with one axis grown 4 and 16 times; the two others stay at N = 4, M = 1, T = 100 (T: from 25)."""
    rows = []
    for axis, start in (("N", replace(setting, batch=4, persons=1)), ("M", replace(setting, batch=4, persons=1)),
                        ("T", replace(setting, batch=4, persons=1, frames=setting.frames // 4))):
        field = {"N": "batch", "M": "persons", "T": "frames"}[axis]
        first = getattr(start, field)
        candidates, sizes = [], [first * factor for factor in FACTORS]
        for size in sizes:
            here = replace(start, **{field: size})
            fast, x = optimize(sparse_network(here.network(), pattern).eval()), here.example()
            candidates.append(candidate(f"{axis} = {size}", lambda fast=fast, x=x: fast(x)))
        timings = paired(candidates, rounds)
        rows += _rows(f"{setting.backbone} {pattern.sparsity:g}", axis, sizes, [timings[c.name].median for c in candidates])
    return rows


def live_blocks(threads: int, rounds: int, block: str = "8x1", channels: int = 128, frames: int = 50, samples: int = 16
                ) -> list[Growth]:
    """The 9 x 1 temporal convolution over two decades of density, beside the time of moving its input and output once."""
    shape, x = (channels, channels, 9), torch.randn(samples, channels, frames, 25)
    weight, densities = torch.randn(shape), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    candidates = []
    for density in densities:
        pattern = draw(shape, Pattern(1 - density, block))
        values = pattern.gather(weight)
        candidates.append(candidate(f"{density:g}", lambda values=values, pattern=pattern: temporal_conv(x, values, pattern)))
    with torch.inference_mode():
        timings = paired(candidates, rounds)
    floor = 8 * x.numel() / machine_peaks(threads)[1]
    rows = _rows(f"temporal_conv C={channels} {block}", "live blocks", densities, [timings[c.name].median for c in candidates])
    return [replace(row, floor=floor) for row in rows]


def markdown(rows: Iterable[Growth]) -> str:
    """One line per size."""
    lines = ["| | | ms | against proportional cost | floor of the activations, ms |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [f"| {r.subject} | {r.axis} = {r.size:g} | {1e3 * r.seconds:.3g} | {r.proportional:.2f} | "
              f"{'' if r.floor is None else f'{1e3 * r.floor:.2g}'} |" for r in rows]
    return "\n".join(lines)


def _rows(subject: str, axis: str, sizes: Iterable[float], seconds: list[float]) -> list[Growth]:
    sizes = list(sizes)
    unit = seconds[0] / sizes[0]
    return [Growth(subject, axis, size, time, time / (unit * size)) for size, time in zip(sizes, seconds, strict=True)]
