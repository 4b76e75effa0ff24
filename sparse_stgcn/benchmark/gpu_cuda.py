"""The launches of each product on the CUDA kernels: input of the static model in gpu_model.py.

Bytes, products and tiles are counted from the loops; instructions are estimates read off the source.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import ClassVar

from ..kernels import cuda
from .gpu_cards import Card, Launch, Problem
from .gpu_triton import STORED, Triton


@lru_cache
def _usage(capability: int) -> dict[str, int]:
    """Most registers of each kernel of the compiled CUDA module, from ptxas' report in it; {} where no tool can read it."""
    try:
        from .triton_code import TOOL

        command = [str(TOOL), "-res-usage", "-arch", f"sm_{capability}", cuda.module.__file__]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (ImportError, OSError, subprocess.CalledProcessError, AttributeError):
        return {}
    used: dict[str, int] = {}
    for name, line in re.findall(r"Function (\S+?):\n\s*(.*)", text):
        for kernel in ("gather_kernel", "weight_gradient_kernel", "mix", "outer"):
            if kernel in name and (found := re.search(r"REG:(\d+)", line)):
                used[kernel] = max(used.get(kernel, 0), int(found[1]))
    return used


class Cuda:
    """The kernels of csrc/cuda; their tiles are those that the module itself chooses for the card."""

    # A warp's step of the gather: pixels, slots, then for 8 rows and for each 8 more: wavefronts, instructions.
    STEP: ClassVar[dict[str, tuple[int, int, int, int, int, int]]] = {
        "half": (64, 16, 32, 90, 4, 16),
        "tf32": (32, 8, 11, 44, 2, 10),
        "float32": (64, 1, 5, 24, 2, 17),
    }

    def __init__(self, card: Card) -> None:
        self.card = card

    def _tile(self, p: Problem, op: str, product: str, more: tuple[int, ...]) -> dict | None:
        size = (p.N, p.I, p.T, p.V, p.O, p.K, p.bo, p.bi, p.blocks)
        device = cuda.module.Device(self.card.shared - 1024, self.card.shared, self.card.multiprocessors)
        launch = getattr(cuda.module, op)(STORED[p.arithmetic], *size, *more, device, product)
        return None if launch.reason else {**launch.tile, "scratch": launch.scratch}

    def launches(self, p: Problem) -> list[Launch] | None:
        """The launches of a product, or None where the module is not built or has no kernel for it."""
        if cuda.module is None:
            return None
        if p.op == "temporal_conv":
            if p.direction == "dW":
                tile = self._tile(p, "TemporalConv", "weight_gradient", (1, 1))
                return tile and [*self._weights(p, p.I, tile), Triton(self.card).sum_of_dy(p)]
            forward = p.direction == "forward"
            tile = self._tile(p, "TemporalConv", "forward" if forward else "input_gradient", (1, 1))
            return tile and self._gather(p, forward, p.K, tile)
        name = {"forward": "forward", "dX": "input_gradient", "dW": "weight_gradient"}[p.direction]
        tile = self._tile(p, "GraphConv", name, (3,))
        if tile is None:
            return None
        if p.direction == "forward":
            return self._gather(p, True, p.K, tile, graph=True)
        if p.direction == "dX":
            between, gather = p.activations(p.I * p.K), self._gather(p, False, 1, tile, phases=p.K)
            gather[-1] = replace(gather[-1], dram=p.activations(p.O) + between)
            return [
                *gather,
                self._mix(p, between + p.activations(p.I), p.I * p.K),
                self._outer(p, between + p.activations(p.I), p.I * p.K, tile["splits"]),
            ]
        between = p.activations(p.I * p.K)
        return [
            self._mix(p, p.activations(p.I) + between, p.I * p.K),
            *self._weights(p, p.I * p.K, tile),
            Triton(self.card).sum_of_dy(p),
        ]

    def _plan(self, slots: int, groups: int) -> Launch:
        """plan_slots: each thread compares its key with every slot of the group, twice."""
        return Launch("plan", 0, programs=groups, threads=128, serial=2 * 6.0 * slots + 4000)

    def _rows(self, channels: int) -> int:
        return 32 if channels % 32 == 0 else 16 if channels % 16 == 0 else 8

    def _gather(self, p: Problem, forward: bool, taps: int, tile: dict, phases: int = 1, graph: bool = False) -> list[Launch]:
        high, source, target = (p.bo, p.I, p.O) if forward else (p.bi, p.O, p.I)
        rows, per_pixels = self._rows(high), self.STEP[p.arithmetic][0]
        groups, blocks = phases * ceil(target / rows), p.N * tile["tiles"]
        slots = source * taps * p.cover(rows, high)
        _, step, wavefronts, issue, more_wavefronts, more_issue = self.STEP[p.arithmetic]
        eights = rows // 8 - 1
        warps = ceil(tile["frames"] * p.V / per_pixels)
        steps = blocks * warps * groups * (slots / step + 0.5 * tile["chunks"])
        staged = tile["chunks"] * tile["chunk_channels"] * tile["pitch"] * p.element
        if graph:  # made rows have another pitch than the staged ones
            staged = source * (tile["frames"] * p.V + 8) * p.element
        copies = tile["slices"] if tile["chunks"] > 1 else 1
        stored = target * phases * p.pixels
        counts = {
            "l2": blocks * copies * staged,
            "wavefronts": steps * (wavefronts + eights * more_wavefronts) + blocks * copies * staged / 128 + stored * 8 / 128,
            "issue": steps * (issue + eights * more_issue) + blocks * copies * staged / 16 / 32 * 8 + stored / 32 * 6,
            "flops": 2.0 * steps * per_pixels * step * rows,
        }
        if graph:
            made = p.N * p.T * p.rows_of_graph * copies
            counts["flops"] += 2.0 * made * 32 * 32
            counts["wavefronts"] += made * (p.V * p.element * 2 + 32 * p.element) / 128
            counts["issue"] += made * (32 if p.arithmetic == "float32" else 6)
        work = Launch(
            "gather",
            p.activations(source) + stored * p.element,
            **counts,
            arithmetic=p.arithmetic,
            mma=True,
            programs=blocks * tile["split"],
            registers=_usage(self.card.capability).get("gather_kernel", 128),
            shared=tile["shared_bytes"],
            flying=staged,
            overlaps=False,
        )
        if p.arithmetic == "float32":
            work = replace(work, mma=False)
        return [self._plan(ceil(slots), groups), work]

    def _weights(self, p: Problem, sources: int, tile: dict) -> list[Launch]:
        rows = self._rows(p.bo)
        groups, tiles, pixels = ceil(p.O / rows), p.N * tile["tiles"], tile["frames"] * p.V
        slots = p.I * p.K * p.cover(rows, p.bo)
        eights = 1 if rows == 8 else 2
        if p.arithmetic == "float32":
            tasks, runs, wavefronts, issue, unit, width = (
                groups * (slots / 8 + 0.5) * rows / 8,
                ceil(pixels / 32),
                16,
                96,
                8 * 8,
                32,
            )
            finish = 70.0
        else:
            each = 9 if p.arithmetic == "half" else 8
            tasks, runs = groups * (slots / 16 + 0.5) * rows / (8 * eights), ceil(pixels / (64 if each == 9 else 32))
            wavefronts, issue = (2 + eights) * each, (2 + eights) * 24 + eights * 4
            unit, width, finish = 16 * 8 * eights, 64 if each == 9 else 32, 8.0 * eights
        staged = (sources + p.O) * tile["pitch"] * p.element * max(1, tile["slices"])
        splits = tile["splits"]
        share = groups * ceil(slots / 16) * 16 * rows * 4.0
        counts = {
            "l2": tiles * staged + tiles * tasks * finish * 128 / 2,
            "wavefronts": tiles * (tasks * (runs * wavefronts + finish) + staged / 128),
            "issue": tiles * (tasks * (runs * issue + 4 * finish) + staged / 16 / 32 * 8),
            "flops": 2.0 * tiles * tasks * runs * unit * width,
        }
        one = p.arithmetic == "float32"
        return [
            self._plan(ceil(slots), groups),
            Launch(
                "weight_gradient",
                p.activations(sources + p.O) + splits * share,
                **counts,
                arithmetic=p.arithmetic,
                mma=not one,
                programs=splits * tile["slices"],
                registers=255 if one else 128,
                shared=tile["shared_bytes"],
                flying=staged,
                overlaps=False,
            ),
            Triton(self.card).second_pass(p.live, splits, p.element),
        ]

    def _mix(self, p: Problem, moved: float, channels: int) -> Launch:
        """mix_joints: a product with the graph from memory to memory."""
        rows = float(p.N * p.T * channels)
        return Launch(
            "mix_joints",
            moved,
            l2=moved,
            issue=rows * (32 if p.arithmetic == "float32" else 8),
            wavefronts=rows * 3 * 32 * p.element / 128,
            flops=2 * rows * 32 * 32,
            arithmetic=p.arithmetic,
            mma=p.arithmetic != "float32",
            programs=rows / 256,
            registers=_usage(self.card.capability).get("mix", 96),
            shared=32 << 10,
            flying=16 << 10,
            overlaps=False,
        )

    def _outer(self, p: Problem, moved: float, channels: int, splits: int) -> Launch:
        """outer_joints: dA as a sum of outer products of frames."""
        rows = float(p.N * p.T * channels)
        return Launch(
            "outer_joints",
            moved,
            l2=moved,
            issue=rows * (32 if p.arithmetic == "float32" else 8),
            wavefronts=rows * 4 * 32 * p.element / 128,
            flops=2 * rows * 32 * 32,
            arithmetic=p.arithmetic,
            mma=p.arithmetic != "float32",
            programs=splits * p.K,
            registers=_usage(self.card.capability).get("outer", 96),
            shared=32 << 10,
            flying=16 << 10,
            overlaps=False,
        )
