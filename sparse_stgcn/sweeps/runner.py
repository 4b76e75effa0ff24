"""Run what is missing: one ``sparse_stgcn.train`` process per run, each in its own work directory.

A run's directory holds ``options.yaml`` (what the grid asked for), ``train.log`` (what the process said), ``lock`` and
what ``train`` writes. The process itself holds the lock, so a run whose sweep was killed counts as running as long as it
runs, and two sweeps of one grid share the work.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..config import TrainConfig
from ..errors import UserError
from ..options import read_mapping
from ..work_dir import Lock, is_taken, take
from .grid import Run

__all__ = ["Machine", "Status", "changes", "check", "data_name", "differences", "drive", "processors", "status"]

GRACE = 60.0  # seconds that a process has to end after an interrupt; it has nothing to write then
# Where a run is computed is no part of what it is.
_FREE = ("data", "device", "threads", "workers", "work_dir", "tensorboard", "config", "resume")


@dataclass(frozen=True)
class Machine:
    """Where and how the processes run.

    Args:
        root: directory of the work directories.
        data: directory of relative data paths, or None.
        jobs: processes at a time.
        threads: CPU threads of each.
        devices: devices that the jobs take in turn; empty: train's own choice.
    """

    root: Path
    data: Path | None = None
    jobs: int = 1
    threads: int = 1
    devices: tuple[str, ...] = ()

    def archive(self, run: Run) -> str | None:
        """Where the data of a run are; None is the synthetic set."""
        path = run.config.data
        return path if path is None or self.data is None else str(self.data / path)

    def command(self, run: Run, slot: int = 0) -> list[str]:
        """The command that starts a run, or goes on with it."""
        work_dir = self.root / run.name
        words = [sys.executable, "-m", "sparse_stgcn.train"]
        words += (["--resume", str(work_dir)] if (work_dir / "config.yaml").exists() else
                  ["--config", str(work_dir / "options.yaml"), "--work-dir", str(work_dir)])
        if (archive := self.archive(run)) is not None:
            words += ["--data", archive]
        if self.devices:
            words += ["--device", self.devices[slot % len(self.devices)]]
        return [*words, "--threads", str(self.threads)]


@dataclass(frozen=True)
class Status:
    """State of a run: finished, recorded (elsewhere), running, failed (with its last words), stopped, missing, or other (its
    directory was made with other options); its epochs."""

    state: str
    done: int = 0
    epochs: int | None = None
    top1: float | None = None
    error: str = ""


def status(run: Run, root: Path) -> Status:
    """What the work directory of a run says."""
    work_dir = root / run.name
    if changed := changes(run, work_dir):
        return Status("other", error=f"{work_dir} has another {', '.join(changed)}")
    if (work_dir / "result.json").exists():
        result = json.loads((work_dir / "result.json").read_text())
        return Status("finished", len(result["history"]), len(result["history"]), result["test"]["top1"])
    done, epochs = len(_history(work_dir)), _epochs(work_dir)
    if is_taken(work_dir / "lock"):
        return Status("running", done, epochs)
    if (work_dir / "failed").exists():
        return Status("failed", done, epochs, error=(work_dir / "failed").read_text().strip())
    return Status("stopped" if epochs is not None else "missing", done, epochs)


def check(runs: Sequence[Run], machine: Machine) -> None:
    """Check, before anything is started, the data of all runs and that no directory belongs to another run.

    Raises:
        UserError: data that do not exist, or a directory made with other options or of another data set.
    """
    for archive in {machine.archive(run) for run in runs} - {None}:
        if not Path(str(archive)).exists():
            raise UserError(f"Expected the grid's data at {archive}. Got nothing there; name the directory that holds it "
                            "with --data, or in the environment variable SPARSE_STGCN_DATA.")
    for run in runs:
        if changed := changes(run, machine.root / run.name):
            raise UserError(f"Expected {machine.root / run.name} to hold a run of this grid. Got one with another "
                            f"{', '.join(changed)}; move the directory away, or name another one with --runs.")


def changes(run: Run, work_dir: Path) -> list[str]:
    """The options that a run's directory was made with and the grid has otherwise; none where nothing was begun."""
    recorded = work_dir / "options.yaml"
    return differences(read_mapping(recorded), run, recorded) if recorded.exists() else []


def differences(options: Mapping[str, Any], run: Run, source: Path) -> list[str]:
    """The options of a run, as ``options.yaml`` has them, that the grid has otherwise; where it is computed does not count."""
    there = TrainConfig.from_mapping(options, source)
    changed = [f.name for f in fields(there)
               if f.name not in _FREE and getattr(there, f.name) != getattr(run.config, f.name)]
    # An older version did not write down the data set.
    return changed + (["data"] if "data" in options and data_name(there.data) != data_name(run.config.data) else [])


def data_name(data: str | None) -> str | None:
    """What tells a data set from another one: the name of its file, which may lie elsewhere on another machine."""
    return None if data is None else Path(data).name


def drive(runs: Sequence[Run], machine: Machine, seconds: float | None = None,
          say: Callable[[str], None] = print, command: Callable[[Run, int], list[str]] | None = None,
          poll: float = 0.2) -> list[Run]:
    """Run ``runs`` in order, ``machine.jobs`` at a time, those already begun first; returns those that failed.

    After ``seconds`` every process is interrupted, and one whose next epoch would not end before then as soon as it has
    saved the one before, so that little is lost. Interrupted runs go on where they were the next time.
    """
    command = command or machine.command
    end = None if seconds is None else time.monotonic() + seconds
    waiting = sorted((run for run in runs if status(run, machine.root).state not in ("finished", "running")),
                     key=lambda run: not (machine.root / run.name / "config.yaml").exists())
    slots: dict[int, _Process] = {}
    failed = []
    try:
        while slots or (waiting and not _over(end)):
            for slot in range(machine.jobs):
                while slot not in slots and waiting and not _over(end):
                    run = waiting.pop(0)
                    process = _Process.start(run, machine, command(run, slot))
                    if process is not None:  # another sweep may have taken it since
                        slots[slot] = process
                        say(f"start     {run.name}")
            for slot, process in list(slots.items()):
                process.stop_before(end)
                if process.asked:
                    waiting.clear()  # there is no time left for an epoch of another one either
                if (code := process.popen.poll()) is not None:
                    del slots[slot]
                    process.close()
                    now = process.conclude(code, machine.root)
                    if now.state == "failed":
                        failed.append(process.run)
                    say(f"{now.state:<9} {process.run.name}" + (f"  top-1 {now.top1:.2%}" if now.top1 is not None else
                        f"  {now.error.splitlines()[-1]}" if now.error else f"  {now.done} epochs"))
            time.sleep(poll)
    finally:
        for process in slots.values():
            process.interrupt()
        for process in slots.values():
            process.wait()
    return failed


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process:
    """A running training."""

    def __init__(self, run: Run, work_dir: Path, popen: subprocess.Popen[bytes], lock: Lock) -> None:
        self.run, self.work_dir, self.popen, self.lock = run, work_dir, popen, lock
        self.seen, self.asked = len(_history(work_dir)), 0.0

    @classmethod
    def start(cls, run: Run, machine: Machine, command: Sequence[str]) -> _Process | None:
        """Start it, or None if another process has the lock, or has finished the run since the caller looked."""
        work_dir = machine.root / run.name
        work_dir.mkdir(parents=True, exist_ok=True)
        lock = take(work_dir / "lock")
        if lock is None:
            return None
        if status(run, machine.root).state == "finished":
            lock.release()
            return None
        (work_dir / "failed").unlink(missing_ok=True)
        if not (work_dir / "config.yaml").exists():
            options = {key: value for key, value in asdict(run.config).items()
                       if key not in _FREE and value is not None}
            options["data"] = data_name(run.config.data)  # also None, the synthetic set; --data says where it is
            (work_dir / "options.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        environment = {**os.environ, "OMP_NUM_THREADS": str(machine.threads)}
        with (work_dir / "train.log").open("ab") as log:
            # In a session of its own: Ctrl-C reaches it through us, once, and the lock goes with it.
            popen = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                     pass_fds=[lock.fileno()], start_new_session=True)
        return cls(run, work_dir, popen, lock)

    def stop_before(self, end: float | None) -> None:
        """Interrupt the process if ``end`` has come, or if it has just saved an epoch and the next would end later."""
        if self.asked and time.monotonic() - self.asked > GRACE:
            self.popen.kill()
        if end is None or self.asked:
            return
        history = _history(self.work_dir)
        longest = max((r["seconds"] + r.get("test_seconds", 0.0) for r in history[-2:]), default=0.0)
        if _over(end):
            self.interrupt()
        elif time.monotonic() + longest < end:
            self.seen = len(history)
        elif len(history) > self.seen and self._saved() and len(history) != _epochs(self.work_dir):
            self.interrupt()

    def _saved(self) -> bool:
        """Whether the last epoch's state is on the disk: its line in the log is written just before."""
        state = self.work_dir / "resume.safetensors"
        return state.exists() and state.stat().st_mtime_ns >= (self.work_dir / "log.jsonl").stat().st_mtime_ns

    def interrupt(self) -> None:
        if self.popen.poll() is None and not self.asked:
            self.popen.send_signal(signal.SIGINT)
            self.asked = time.monotonic()

    def wait(self) -> None:
        try:
            self.popen.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.close()

    def close(self) -> None:
        self.lock.release()

    def conclude(self, code: int, root: Path) -> Status:
        """The state after the process has ended with ``code``; a failure is written down."""
        if code != 0 and not self.asked:
            words = (self.work_dir / "train.log").read_text(errors="replace").strip().splitlines()[-20:]
            (self.work_dir / "failed").write_text("\n".join(words) or f"exit code {code}")
        return status(self.run, root)


def _over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


def _history(work_dir: Path) -> list[Mapping[str, Any]]:
    """The records of ``log.jsonl`` so far; a line that is still being written does not count."""
    try:
        text = (work_dir / "log.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _epochs(work_dir: Path) -> int | None:
    """Epochs of a run that has begun."""
    recorded = work_dir / "config.yaml"
    return TrainConfig.read(recorded).epochs if recorded.exists() else None
