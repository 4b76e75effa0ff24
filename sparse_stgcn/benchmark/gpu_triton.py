"""The launches of each product on the Triton kernels, counted from their loops: input of the static model in gpu_model.py."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import ClassVar

from .gpu_cards import Card, Launch, Problem

STORED = {"float32": "float32", "tf32": "tf32", "half": "bfloat16"}


class Triton:
    """The kernels of kernels/triton."""

    # Instructions of a warp per 32 gathered elements, without the multiply-adds of float32; from the SASS of the forward kernel
    # (kernels/triton/README.md): (family, arithmetic) -> narrow, wide.
    ISSUE: ClassVar[dict[tuple[int, str], tuple[float, float]]] = {
             (80, "half"): (12.4, 6.4), (90, "half"): (12.6, 8.1), (80, "tf32"): (17.3, 11.8), (90, "tf32"): (18.4, 16.1),
             (80, "float32"): (17.6, 13.1), (90, "float32"): (17.4, 12.9)}  # fmt: skip

    def __init__(self, card: Card) -> None:
        self.card = card

    def launches(self, p: Problem) -> list[Launch] | None:
        """The launches of a product, or None where triton is not installed to compile them."""
        from ..kernels.dispatch import missing_triton
        from ..kernels.triton import configs

        if missing_triton():
            return None

        self.configs = configs
        rows = p.bo if p.bo in configs.ROWS else 8
        columns = p.bi if p.bi in configs.ROWS else 8
        make = {"temporal_conv": self._temporal, "graph_conv": self._graph}[p.op]
        return make(p, rows, columns)

    def _compiled(self, kernel: str, p: Problem, rows: int, columns: int, wide: bool) -> tuple[int, int, int, Sequence]:
        """Threads, registers, shared bytes and the tile of a kernel."""
        from .triton_code import BLOCKS, Variant, compiled, config_of

        block = (rows, columns)
        if block not in BLOCKS[kernel]:
            block = (rows, 8)
        variant = Variant(kernel, STORED[p.arithmetic], block, wide)
        code = compiled(variant, self.card.capability)
        return 32 * code.warps, code.registers, code.shared, config_of(variant, self.card.capability)

    def _frames(self, p: Problem, reads: float, channels: int) -> tuple[bool, float, list[Launch]]:
        """Whether frames are copied to 16 bytes, the padded share of pixels, and the copy."""
        width = 16 // p.element
        stretch = ceil(p.V / width) * width / p.V
        family = self.configs.family(self.card.capability)
        if reads < self.configs.PACK_FROM[family, p.arithmetic]:
            return False, 1.0, []
        moved = p.activations(channels) * (1 + stretch)
        count = channels * p.pixels * stretch
        return (
            True,
            stretch,
            [
                Launch(
                    "pad_frames",
                    moved,
                    issue=count / 32 * 12,
                    wavefronts=count / 32 * 2,
                    programs=count / 1024,
                    threads=128,
                    registers=24,
                    flying=1024 * p.element,
                )
            ],
        )

    def _issue(self, p: Problem, wide: bool) -> float:
        return self.ISSUE[80 if self.card.capability < 90 else 90, p.arithmetic][wide]

    def _panel(self, p: Problem, elements: float, outputs: float, wide: bool) -> dict[str, float]:
        """Counts of gathering ``elements`` into shared memory and multiplying each with ``outputs`` weights."""
        fma = outputs if p.arithmetic == "float32" else 0.0
        lanes = 16 / p.element if wide else 1.0
        return {
            "l2": elements * p.element,
            "issue": elements / 32 * (self._issue(p, wide) + fma),
            "flops": 2 * elements * outputs,
            "wavefronts": elements / 32 / lanes * (4 if wide else 1) + 2 * elements * p.element / 128,
        }

    def _temporal(self, p: Problem, rows: int, columns: int) -> list[Launch]:
        if p.direction == "forward":
            slots, rows_of, per, source, kernel = p.I * p.K * p.cover(rows, p.bo), rows, rows, p.I, "temporal_conv_forward"
            groups = ceil(p.O / rows)
        elif p.direction == "dX":
            groups, per, source, kernel = ceil(p.I / columns), columns, p.O, "temporal_conv_dx"
            slots = p.O * p.K * p.cover(columns * max(1, rows // p.bo), p.bi)
            rows_of = rows
        else:
            return self._weights(p, rows)
        slots = ceil(slots / 16) * 16
        wide, stretch, copy = self._frames(p, slots * groups / source, source)
        threads, registers, shared, tile = self._compiled(kernel, p, rows_of, columns, wide)
        of_pixels = ceil(p.T * p.V * stretch / tile.pixels) * tile.pixels / (p.T * p.V)
        elements = groups * slots * p.pixels * of_pixels
        counts = self._panel(p, elements, per, wide)
        stored = p.activations(p.O if p.direction == "forward" else p.I)
        counts["issue"] += stored / p.element / 32 * 10
        x = p.activations(source) * stretch
        return [
            *copy,
            Launch(
                kernel,
                x + stored,
                **counts,
                arithmetic=p.arithmetic,
                threads=threads,
                registers=registers,
                shared=shared,
                programs=groups * p.N * ceil(p.T * p.V * stretch / tile.pixels),
                flying=tile.pixels * tile.slots * p.element * max(1, tile.stages - 1),
            ),
        ]

    def _weights(self, p: Problem, rows: int) -> list[Launch]:
        groups = ceil(p.O / rows)
        slots = p.I * p.K * p.cover(rows, p.bo)
        steps = ceil(slots / 16)
        reads = (slots * groups + steps * groups * rows) / (p.I + p.O)
        wide, stretch, copy = self._frames(p, reads, p.I + p.O)
        threads, registers, shared, tile = self._compiled("temporal_conv_dw", p, rows, 8, wide)
        pixels = p.N * ceil(p.T * p.V * stretch / tile.pixels) * tile.pixels
        elements = groups * steps * (16 + rows) * pixels
        counts = self._panel(p, elements, 0, wide)
        counts["flops"] = 2.0 * groups * steps * 16 * rows * pixels
        counts["issue"] += counts["flops"] / 64 if p.arithmetic == "float32" else 0
        splits = max(1, min(p.N * ceil(p.T * p.V * stretch / tile.pixels), self.configs.PROGRAMS_OF_DW // groups))
        partial = 4.0 * splits * p.live
        dram = p.activations(p.I + p.O) * stretch + partial
        return [
            *copy,
            Launch(
                "temporal_conv_dw",
                dram,
                **counts,
                arithmetic=p.arithmetic,
                threads=threads,
                registers=registers,
                shared=shared,
                programs=groups * splits,
                flying=tile.pixels * (16 + rows) * p.element * max(1, tile.stages - 1),
            ),
            self.second_pass(p.live, splits, p.element),
            self.sum_of_dy(p),
            *self.small("rounding of the bias's gradient", p.element == 2),
        ]

    def small(self, name: str, count: int) -> list[Launch]:
        """torch's launches on a few kB: what they cost is the launch."""
        return [Launch(name, 1e4, programs=float(self.card.multiprocessors))] * count

    def bias_through_graph(self, p: Problem) -> list[Launch]:
        """The gradient of graph_conv's biases from the sum of dy: two sums, a product and a rounding."""
        return self.small("bias through the graph", 3 + (p.element == 2))

    def second_pass(self, values: float, splits: int, element: int, at_once: int = 16) -> Launch:
        """at_once: shares that a program adds up side by side, of 32 values."""
        moved = 4.0 * splits * values
        outside = 0.0 if moved < self.card.l2_bytes / 2 else moved
        return Launch(
            "sum_parts",
            outside + values * element,
            l2=moved,
            issue=values * splits / 32 * 6,
            programs=ceil(values / 32),
            threads=128,
            registers=32,
            flying=32 * at_once * 4,
            serial=ceil(splits / at_once) * 160,
        )

    def sum_of_dy(self, p: Problem) -> Launch:
        """torch's sum of dy over samples and pixels."""
        return Launch("sum of dy", p.activations(p.O), issue=p.O * p.pixels / 32, programs=4.0 * self.card.multiprocessors)

    def _graph(self, p: Problem, rows: int, columns: int) -> list[Launch]:
        if p.direction == "forward":
            return self._through(p, "graph_conv_forward", rows, rows, rows, columns)
        if p.direction == "dX":
            return [*self._through(p, "graph_conv_dx", columns, rows, rows, columns), *self._adjacency(p, rows)]
        return self._graph_weights(p, rows)

    def _graph_product(self, p: Problem, count: float) -> dict[str, float]:
        """Counts of ``count`` rows of 32 joints, float32, through the graph: turned in shared memory, then multiplied."""
        times = 3 if p.arithmetic == "half" else 1  # three TF32 products keep 16 bits exact
        flops = 2.0 * count * 32 * 32 * times
        fma = flops / 64 if p.arithmetic == "float32" else flops / 64 / 32
        split = count * 4 if p.arithmetic == "half" else 0.0
        read = fma / 2 if p.arithmetic == "float32" else 0.0
        return {"flops": flops, "issue": count * 8 + fma + split, "wavefronts": count * 4.0 + read}

    def _join(self, p: Problem, panel: dict[str, float], graph: dict[str, float]) -> dict[str, float]:
        joined = {key: panel.get(key, 0.0) + graph.get(key, 0.0) for key in {*panel, *graph}}
        if p.arithmetic == "half":  # the graph's part runs at TF32's rate
            joined["flops"] += graph["flops"]
        return joined

    def _through(self, p: Problem, kernel: str, per: int, of: int, rows: int, columns: int) -> list[Launch]:
        forward = kernel == "graph_conv_forward"
        source, target = (p.I, p.O) if forward else (p.O, p.I)
        slots = source * (p.cover(rows, p.bo) if forward else p.cover(columns * max(1, rows // p.bo), p.bi))
        slots = ceil(slots / 16) * 16  # of one group and subset
        wide, stretch, copy = self._frames(p, slots * p.K * ceil(target / per) / source, source)
        threads, registers, shared, tile = self._compiled(kernel, p, rows, columns, wide)
        frames, groups = ceil(p.T / tile.frames) * tile.frames, ceil(target / per) * max(1, per // tile.rows)
        elements = groups * slots * p.K * p.N * frames * 32.0
        panel = self._panel(p, elements, tile.rows, wide)
        panel["l2"] *= p.V / 32
        counts = self._join(p, panel, self._graph_product(p, groups * tile.rows * p.K * p.N * frames))
        return [
            *copy,
            Launch(
                kernel,
                p.activations(source) * stretch + p.activations(target),
                **counts,
                arithmetic=p.arithmetic,
                threads=threads,
                registers=registers,
                shared=shared,
                programs=groups * p.N * ceil(p.T / tile.frames),
                flying=tile.frames * p.V * 16 * p.element * max(1, tile.stages - 1),
            ),
        ]

    def _adjacency(self, p: Problem, rows: int) -> list[Launch]:
        slots = ceil(p.I * p.cover(rows, p.bo) / 16) * 16
        threads, registers, shared, tile = self._compiled("graph_conv_dadjacency", p, rows, 8, False)
        frames, groups = ceil(p.T / tile.frames) * tile.frames, ceil(p.O / rows) * max(1, rows // tile.rows)
        elements = groups * slots * p.K * p.N * frames * 32.0
        panel = self._panel(p, elements, tile.rows, False)
        panel["l2"] = panel["l2"] * p.V / 32 + groups * tile.rows * p.K * p.N * frames * p.V * p.element
        counts = self._join(p, panel, self._graph_product(p, groups * tile.rows * p.K * p.N * frames))
        programs = groups * p.K * max(1, min(p.N * ceil(p.T / tile.frames), self.configs.PROGRAMS_OF_DW // (groups * p.K)))
        return [
            Launch(
                "graph_conv_dadjacency",
                p.activations(p.I + p.O),
                **counts,
                arithmetic=p.arithmetic,
                threads=threads,
                registers=registers,
                shared=shared,
                programs=programs,
                flying=tile.frames * p.V * 16 * p.element,
            ),
            self.second_pass(p.K * p.V * p.V, programs // p.K, 4),
        ]

    def _graph_weights(self, p: Problem, rows: int) -> list[Launch]:
        slots = p.I * p.cover(rows, p.bo)
        steps = ceil(slots / 16)
        threads, registers, shared, tile = self._compiled("graph_conv_dw", p, rows, 8, False)
        frames, groups = ceil(p.T / tile.frames) * tile.frames, ceil(p.O / rows) * max(1, rows // tile.rows)
        each = groups * p.K * steps * p.N * frames * 32.0  # (step of 16 slots, pixel)
        panel = self._panel(p, each * (16 + tile.rows), 0, False)
        panel["l2"] *= p.V / 32
        product = self._graph_product(p, each / 32 * tile.rows)
        extra = 2 * each * 16 * tile.rows * (3 if p.arithmetic == "half" else 1)
        product["flops"] += extra
        product["issue"] += extra / 64 if p.arithmetic == "float32" else 0
        splits = max(1, min(p.N * ceil(p.T / tile.frames), self.configs.PROGRAMS_OF_DW // groups))
        return [
            Launch(
                "graph_conv_dw",
                p.activations(p.I + p.O) + 4.0 * splits * p.live,
                **self._join(p, panel, product),
                arithmetic=p.arithmetic,
                threads=threads,
                registers=registers,
                shared=shared,
                programs=groups * splits,
                flying=tile.frames * p.V * 32 * p.element,
            ),
            self.second_pass(p.live, splits, p.element),
            self.sum_of_dy(p),
            *self.bias_through_graph(p),
        ]
