"""Paired, interleaved timing, and the gate that no unchecked result passes."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REST = 0.02  # seconds before every timing: other engines' threads spin that long for more work, on the core of the next one


class WrongResult(RuntimeError):
    """A candidate's output does not match the reference: it must not be timed."""


@dataclass(frozen=True)
class Candidate:
    """A named way to compute something: ``run()`` is timed, ``output()`` is checked: a tensor, or several by name."""

    name: str
    run: Callable[[], object]
    output: Callable[[], Tensor | Mapping[str, Tensor]]


def check(name: str, output: Tensor, reference: Tensor, tolerance: float = 1e-4) -> float:
    """Largest |output - reference| over the largest |reference|.

    Raises:
        WrongResult: it exceeds ``tolerance``, the shapes differ, or a value is not finite.
    """
    if output.shape != reference.shape:
        raise WrongResult(f"{name}: expected shape {tuple(reference.shape)}, got {tuple(output.shape)}")
    error = relative_error(output, reference)
    if not error <= tolerance:
        raise WrongResult(f"{name}: relative error {error:.3g} exceeds {tolerance:.3g}")
    return error


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Largest |output - reference| over the largest |reference|."""
    return ((output.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


@dataclass(frozen=True)
class Expected:
    """The right outputs of a candidate that has several, by name; all but the first are held to ``tolerance``."""

    outputs: Mapping[str, Tensor]
    tolerance: float

    def check(self, name: str, outputs: Mapping[str, Tensor], tolerance: float) -> float:
        """``check`` each output by its own largest value, the first by the ``tolerance`` given; the error of the first.

        Raises:
            WrongResult: like ``check``, with the output's name, or other outputs than these.
        """
        if outputs.keys() != self.outputs.keys():
            raise WrongResult(f"{name}: expected {', '.join(self.outputs)}, got {', '.join(outputs)}")
        errors = [check(f"{name}, {part}", outputs[part], reference, self.tolerance if number else tolerance)
                  for number, (part, reference) in enumerate(self.outputs.items())]
        return errors[0]


@dataclass(frozen=True)
class Timing:
    """Seconds per run of each round, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def ratio(self, other: Timing) -> float:
        """Median over the rounds of other / self: how many times faster this one is, each pair in the same moment."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def paired(candidates: list[Candidate], rounds: int = 11, warmup: int = 2, settle: int = 0) -> dict[str, Timing]:
    """Time all candidates in turn, round by round, so that a drift of the machine hits all of them alike.

    ``settle`` runs of the same candidate that are not timed come before each one that is: the caches then hold what it leaves
    there itself, as in a loop of nothing else, and not what another one left.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    for candidate in candidates:
        for _ in range(warmup):
            candidate.run()
    for number in range(rounds):
        shift = number % len(candidates)
        for candidate in candidates[shift:] + candidates[:shift]:
            time.sleep(REST)
            for _ in range(settle):
                candidate.run()
            begin = time.perf_counter()
            candidate.run()
            seconds[candidate.name].append(time.perf_counter() - begin)
    return {name: Timing(values) for name, values in seconds.items()}


def machine_peaks(threads: int, seconds: float = 0.05) -> tuple[float, float]:
    """(multiply-add peak in flop/s, copy bandwidth in bytes/s, read and written) of ``threads`` threads together, right now.

    Independent multiply-adds in registers, and a copy between buffers that no cache holds; (0, 0) without the native module.
    """
    from concurrent.futures import ThreadPoolExecutor

    from ..kernels import _native

    if _native.module is None:
        return 0.0, 0.0
    module, size = _native.module, 64 << 20
    time.sleep(5 * REST)
    with ThreadPoolExecutor(threads) as pool:
        flops = sum(pool.map(lambda _: module.fma_peak(seconds), range(threads)))
        copied = sum(pool.map(lambda _: module.copy_bandwidth(size, seconds), range(threads)))
    return flops * 1e9, copied * 1e9


def environment() -> dict[str, str | int]:
    """What a figure depends on: processor, instruction set, threads, versions, commit and date."""
    import platform
    import subprocess
    from datetime import date

    from ..kernels import _native

    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), processor)
    except OSError:
        pass
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {"processor": processor, "isa": _native.isa, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "commit": commit or "unknown", "date": date.today().isoformat()}
