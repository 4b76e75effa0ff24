"""What a card can do, as published, a product to be computed, and how long a launch takes by what it moves and issues.

A launch is a list of counts. The prediction is a bottleneck model: every unit of the card works at its own rate, the slowest
decides, and what does not overlap is added. It ranks kernels and shows which unit binds; no figure here was measured.

Patterns are random with equal rows, so that a cover of m channels is live with probability 1 - (1 - density)^m.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Card:
    """Published figures of a card, and three assumptions, marked as such.

    Attributes:
        capability: 90 for 9.0. clock: boost, Hz. dram, l2_bytes: bytes/s and bytes.
        peak: flop/s, dense, by arithmetic: tensor cores for tf32 and half, CUDA cores for float32.
        shared: bytes of shared memory of a multiprocessor; one block may take 1 kB less.
        l2: bytes/s from L2 to the multiprocessors (assumption: no published figure).
        mma: share of the peak that mma.sync reaches (assumption; wgmma and Ampere's mma.sync: 1).
        launch: seconds from one launch to the next on a stream (assumption).
    """

    name: str
    capability: int
    multiprocessors: int
    clock: float
    dram: float
    l2_bytes: int
    peak: dict[str, float]
    shared: int
    l2: float
    mma: float
    launch: float = 2e-6
    registers: int = 65536
    threads: int = 2048
    latency: float = 6e-7

    def cycles(self, count: float) -> float:
        """Seconds for ``count`` cycles of work, dealt out over all multiprocessors."""
        return count / (self.multiprocessors * self.clock)

    def per_clock(self, arithmetic: str) -> float:
        """flop per cycle of one multiprocessor."""
        return self.peak[arithmetic] / (self.multiprocessors * self.clock)


CARDS = {
    "h100": Card("H100 SXM 80GB", 90, 132, 1.83e9, 3.35e12, 50 << 20, {"half": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
                 228 << 10, l2=5.5e12, mma=0.62),
    "a100": Card("A100 SXM 80GB", 80, 108, 1.41e9, 2.039e12, 40 << 20, {"half": 312e12, "tf32": 156e12, "float32": 19.5e12},
                 164 << 10, l2=4.0e12, mma=1.0),
}  # fmt: skip
DRAM_SHARE = 0.92  # of the published bandwidth that a long copy reaches (assumption)


@dataclass(frozen=True)
class Launch:
    """What one launch moves and issues, all programs together.

    Attributes:
        dram, l2: bytes from and to memory; bytes from L2 to the multiprocessors.
        issue: instructions of a warp; wavefronts: accesses of 128 bytes to L1 and shared memory; flops: on the unit of
            ``arithmetic``, padding included; mma: they are issued as mma.sync.
        programs, threads, registers (of a thread), shared: bytes of a program.
        flying: bytes that a program has asked memory for at a time.
        overlaps: loads run ahead of the arithmetic of the same program; else only other programs' arithmetic hides them.
        serial: cycles of one program that nothing can share.
    """

    name: str
    dram: float
    l2: float = 0.0
    issue: float = 0.0
    wavefronts: float = 0.0
    flops: float = 0.0
    arithmetic: str = "float32"
    mma: bool = False
    programs: float = 1.0
    threads: int = 256
    registers: int = 32
    shared: int = 0
    flying: float = 1e9
    overlaps: bool = True
    serial: float = 0.0

    def resident(self, card: Card) -> int:
        """Programs that a multiprocessor holds at a time."""
        of_registers = card.registers // (ceil(self.registers / 8) * 8 * self.threads)
        of_shared = card.shared // (self.shared + 1024)
        return max(1, min(of_registers, of_shared, card.threads // self.threads, 32))

    def parts(self, card: Card) -> dict[str, float]:
        """Seconds of every unit, before waves and launch."""
        peak = card.peak[self.arithmetic] * (card.mma if self.mma else 1.0)
        asked = min(1.0, self.resident(card) * card.multiprocessors * self.flying / (card.dram * card.latency))
        return {
            "DRAM": self.dram / (card.dram * DRAM_SHARE * asked),
            "L2": self.l2 / card.l2,
            "issue": card.cycles(self.issue / 4),
            "L1 and shared memory": card.cycles(self.wavefronts),
            "arithmetic": self.flops / peak,
        }

    def seconds(self, card: Card) -> float:
        """Predicted seconds, with the launch."""
        parts = self.parts(card)
        memory, work = max(parts["DRAM"], parts["L2"]), max(v for k, v in parts.items() if k not in ("DRAM", "L2"))
        resident = self.resident(card)
        hidden = 0.0 if self.overlaps else min(memory, work) / (1.0 if resident == 1 else 4.0)
        waves = self.programs / (card.multiprocessors * resident)
        uneven = ceil(waves) / waves if waves > 1 else max(1.0, card.multiprocessors / self.programs)
        return card.launch + (max(memory, work) + hidden) * uneven + self.serial / card.clock

    def bound(self, card: Card) -> str:
        """The unit that takes longest."""
        if self.serial / card.clock > max(self.parts(card).values()):
            return "planning"
        return max(self.parts(card).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Problem:
    """One product: (N, I, T, V) -> (N, O, T, V) with K taps or subsets, blocks (bo, bi)."""

    op: str
    direction: str
    arithmetic: str
    N: int
    I: int
    O: int
    T: int
    V: int
    K: int
    bo: int
    bi: int
    sparsity: float

    @property
    def element(self) -> int:
        return 2 if self.arithmetic == "half" else 4

    @property
    def pixels(self) -> int:
        return self.N * self.T * self.V

    @property
    def blocks(self) -> int:
        """Live blocks; every row of blocks keeps at least one."""
        rows, cells = ceil(self.O / self.bo), ceil(self.I / self.bi) * self.K
        return rows * max(1, round((1 - self.sparsity) * cells))

    @property
    def live(self) -> int:
        return self.blocks * self.bo * self.bi

    @property
    def density(self) -> float:
        return self.live / (self.I * self.O * self.K)

    @property
    def rows_of_graph(self) -> float:
        """Rows (channel, subset) that pass through the graph: live inputs, or all outputs if they are fewer."""
        alive = 1 - (1 - self.density) ** ceil(self.O / self.bo)
        return min(self.I * self.K * alive, self.O * self.K)

    def made_rows(self, forward: bool) -> float:
        """Rows (channel, subset) of x, or of dy for dX, that any block reads."""
        sources, readers = (self.I, ceil(self.O / self.bo)) if forward else (self.O, ceil(self.I / self.bi))
        return sources * self.K * (1 - (1 - self.density) ** readers)

    def cover(self, rows: int, of: int) -> float:
        """Share of slots that are live for a group of ``rows`` channels, where blocks have ``of``."""
        return 1 - (1 - self.density) ** max(1, rows // of)

    def activations(self, channels: int) -> float:
        return float(channels * self.pixels * self.element)
