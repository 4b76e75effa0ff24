"""One setting of the benchmark: candidates that are checked, timed in turn, and turned into rows."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .measure import Candidate, Expected, check, machine_peaks, paired
from .table import OURS, Row


@dataclass(frozen=True)
class Entrant:
    """A candidate with its reference, its pattern and what it has to do.

    Attributes:
        reference: makes the right output, in float64; ``Expected`` where the candidate has several.
        sparsity, block, density: None for a dense engine.
        multiply_adds: that a run needs.
        traffic: bytes that a run reads and writes at least.
        memory: measures the peak, or None.
    """

    candidate: Candidate
    reference: Callable[[], Tensor | Expected]
    multiply_adds: int
    traffic: int
    sparsity: float | None = None
    block: str | None = None
    density: str | None = None
    memory: Callable[[], int] | None = None


def compare(what: str, subject: str, batch: int, threads: int, entrants: list[Entrant], rounds: int,
            tolerance: float, settle: int = 0) -> list[Row]:
    """Check every entrant, then time all of them in turn; ``settle``: see ``measure.paired``.

    Raises:
        WrongResult: an output differs from its reference by more than ``tolerance``, or one of several by more than its own: no
            row is made then.
    """
    errors = []
    for e in entrants:
        name, output, reference = f"{subject} {what}: {e.candidate.name}", e.candidate.output(), e.reference()
        errors.append(reference.check(name, output, tolerance) if isinstance(reference, Expected) else
                      check(name, output, reference, tolerance))
    before = machine_peaks(threads)
    timings = paired([e.candidate for e in entrants], rounds, settle=settle)
    after = machine_peaks(threads)
    gflops, bytes_per_second = max(before[0], after[0]), max(before[1], after[1])
    best = min((timings[e.candidate.name] for e in entrants if e.sparsity is None), key=lambda timing: timing.median)
    own = next((timings[e.candidate.name] for e in entrants if e.sparsity == 0), None)
    rows = []
    for entrant, error in zip(entrants, errors, strict=True):
        timing = timings[entrant.candidate.name]
        rate = 2 * entrant.multiply_adds / timing.median
        rows.append(Row(
            what, subject, entrant.candidate.name if entrant.sparsity is None else OURS, batch, threads, entrant.sparsity,
            entrant.block, entrant.density, timing.median, timing.ratio(best),
            timing.ratio(own) if own and entrant.sparsity is not None else None, rate / 1e9, rate / gflops if gflops else None,
            entrant.traffic / timing.median / bytes_per_second if bytes_per_second else None,
            entrant.memory() if entrant.memory else None, error))
    return rows
