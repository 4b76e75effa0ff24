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
        for kernel in ("gather_kernel", "weight_gradient_kernel", "outer"):
            if kernel in name and (found := re.search(r"REG:(\d+)", line)):
                used[kernel] = max(used.get(kernel, 0), int(found[1]))
    return used


class Cuda:
    """The kernels of csrc/cuda; their tiles are those that the module itself chooses for the card."""

    PIXELS: ClassVar[dict[str, int]] = {"half": 64, "tf32": 32, "float32": 64}  # of a warp's step of the gather

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
                few = 1 + (p.element == 2)
                return tile and [*self._weights(p, p.I, tile), *Triton(self.card).small("the bias's gradient", few)]
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
            back = replace(p, I=p.O, O=p.I, bo=p.bi, bi=p.bo)
            factor = self._tile(back, "GraphConv", "forward", (5,))  # W_k' dy, of which dA is made: a gather for every subset
            between, gather = p.activations(p.I * p.K), self._gather(p, False, 1, factor, phases=p.K) if factor else []
            outer = self._outer(p, between + p.activations(p.I), p.I * p.K, tile["splits"])
            return [*self._gather(p, False, p.K, tile, graph=True), *gather, outer]
        return [*self._weights(p, p.I, tile, graph=True), *Triton(self.card).bias_through_graph(p)]

    def _plan(self, slots: int, groups: int, chunks: int, graph: bool = False) -> list[Launch]:
        """plan_slots: each thread compares its key with its part of the group's slots, twice; plan_live_rows is one program."""
        plan = Launch("plan", 0, programs=groups, threads=128, serial=2 * 6.0 * slots / (128 // (8 * chunks)) + 4000)
        live = Launch("plan", 0, programs=self.card.multiprocessors, threads=256, serial=slots * groups / 256 * 40 + 4000)
        return [plan, live] if graph else [plan]

    def _gather(self, p: Problem, forward: bool, taps: int, tile: dict, phases: int = 1, graph: bool = False) -> list[Launch]:
        high, source, target = (p.bo, p.I, p.O) if forward else (p.bi, p.O, p.I)
        rows, per_pixels = tile["rows"], self.PIXELS[p.arithmetic]
        groups, blocks = phases * ceil(target / rows), p.N * tile["tiles"]
        slots = source * taps * p.cover(rows, high)
        step, wavefronts, issue, more_wavefronts, more_issue = cuda.module.gather_step(STORED[p.arithmetic])
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
            self._add_made_rows(counts, p, p.made_rows(forward) * copies)
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
        return [*self._plan(ceil(slots), groups, tile["chunks"], graph), work]

    def _add_made_rows(self, counts: dict[str, float], p: Problem, channels: float) -> None:
        """Rows (channel, subset) that are brought through the graph in shared memory, added to a launch's counts."""
        made = p.N * p.T * channels
        counts["flops"] += 2.0 * made * 32 * 32
        counts["wavefronts"] += made * (p.V * p.element * 2 + 32 * p.element) / 128
        counts["issue"] += made * (32 if p.arithmetic == "float32" else 6)

    def _weights(self, p: Problem, sources: int, tile: dict, graph: bool = False) -> list[Launch]:
        rows = tile["rows"]
        groups, tiles, pixels = ceil(p.O / rows), p.N * tile["tiles"], tile["frames"] * p.V
        slots = p.I * p.K * p.cover(rows, p.bo)
        step, wavefronts, issue, more_wavefronts, more_issue = cuda.module.weight_step(STORED[p.arithmetic])
        if p.arithmetic == "float32":
            eights, width, finish = 1, 32, 70.0
        else:
            eights, width = min(rows // 8, 4 if p.element == 2 else 2), 64 if p.element == 2 else 32
            finish = 8.0 * eights
        wavefronts, issue = wavefronts + (eights - 1) * more_wavefronts, issue + (eights - 1) * more_issue
        tasks, runs, unit = groups * (slots / step + 0.5) * rows / (8 * eights), ceil(pixels / width), step * 8 * eights
        # made rows have another pitch than the staged ones
        pitch = tile["frames"] * p.V + 8 if graph else tile["pitch"]
        staged = (sources * max(1, tile["slices"]) + p.O) * pitch * p.element
        splits = tile["splits"]
        sums = p.O * p.V  # of dy, by joint
        share = (groups * ceil(slots / 16) * 16 * rows + sums) * 4.0
        summed = tiles * p.O * tile["frames"] * ceil(p.V / 32)  # frames of dy that a warp adds up
        counts = {
            "l2": tiles * staged + tiles * tasks * finish * 128 / 2,
            "wavefronts": tiles * (tasks * (runs * wavefronts + finish) + staged / 128) + summed,
            "issue": tiles * (tasks * (runs * issue + 4 * finish) + staged / 16 / 32 * 8) + 5 * summed,
            "flops": 2.0 * tiles * tasks * runs * unit * width,
        }
        if graph:
            self._add_made_rows(counts, p, p.made_rows(True) * max(1, tile["slices"]))
        one = p.arithmetic == "float32"
        return [
            *self._plan(ceil(slots), groups, tile["chunks"], graph),
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
            Triton(self.card).second_pass(p.live + sums, splits, p.element, at_once=8),
        ]

    def _outer(self, p: Problem, moved: float, channels: int, splits: int) -> Launch:
        """outer_joints: dA as a sum of outer products of frames.

        A warp stages two rows of V values in so many passes of 32. Then, in IEEE float32 or above 32 vertices, each of
        (J / 4)^2 threads reads 2 x 4 values and multiplies 4 x 4 of them; else a warp takes 8 rows as a product of 32 x 32.
        """
        rows, J, passes = float(p.N * p.T * channels), ceil(p.V / 4) * 4, ceil(p.V / 32)
        matrix = p.arithmetic != "float32" and p.V <= 32
        warps = (J / 4) ** 2 / 32
        return Launch(
            "outer_joints",
            moved,
            l2=moved,
            issue=rows * (passes * 14 + (28 / 8 if matrix else warps * 21)),
            wavefronts=rows * (passes * 4 + (16 / 8 if matrix else warps * 4)),
            flops=2 * rows * (32 * 32 if matrix else J * J),
            arithmetic="tf32" if matrix else "float32",
            mma=matrix,
            programs=splits * p.K,
            registers=_usage(self.card.capability).get("outer", 64),
            shared=32 << 10,
            flying=2 * (64 if matrix else 32) * p.V * p.element,
            overlaps=False,
        )
