"""Damage files and read them: ``PYTHONPATH=tests python -m fuzz [--count N] [--targets ...]``, from the repository's root."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sparse_stgcn.errors import one_of, run
from sparse_stgcn.options import OptionalStr

from .targets import TARGETS
from .worker import Worker


@dataclass
class FuzzConfig:
    """Damage valid files at random and read them; says what was accepted, refused, and found.

    Each target is a process of its own with a limit on memory and on the time of each file, in which an audit hook watches for
    programs started, modules unpickled, and files touched outside of the target's folder.
    """

    count: int = 2000
    """Files per target."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Kinds of files."""
    seed: int = 0
    """Seed of the damage."""
    jobs: int = 1
    """Processes at a time."""
    out: OptionalStr = None
    """JSON file of the reports."""
    keep: str = "runs/fuzz"
    """Directory for the files that something was found with."""
    worker: bool = False
    """Work on the one target here, and print its report (used by the command itself)."""


def report_of(config: FuzzConfig, target: str) -> dict[str, Any]:
    """The report of a worker process; of one that died, what is known of its end."""
    words = [sys.executable, "-m", "fuzz", "--worker", "--targets", target, "--count", str(config.count),
             "--seed", str(config.seed), "--keep", config.keep]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no words"])[-1]
    return {"target": target, "files": config.count,
            "findings": {f"the process ended with {done.returncode}": {"example": last, "times": 1}}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if anything was found."""
    config = tyro.cli(FuzzConfig, args=argv, prog="python -m fuzz")
    for name in config.targets:
        one_of("--targets", name, list(TARGETS))
    if config.worker:
        with tempfile.TemporaryDirectory() as folder:
            name = config.targets[0]
            print(json.dumps(Worker(name, TARGETS[name], Path(folder)).run(config.count, config.seed, Path(config.keep))))
        return 0
    with ThreadPoolExecutor(config.jobs) as pool:
        reports = list(pool.map(lambda target: report_of(config, target), config.targets))
    for report in reports:
        print(f"{report['target']:<18} {report['files']:>7} files  {report.get('accepted', 0):>7} accepted  "
              f"{len(report['findings'])} kinds of findings")
        for kind, found in report["findings"].items():
            print(f"    {found['times']} x {kind}\n        {found['example']}")
    total = sum(report["files"] for report in reports)
    print(f"{total} files, {sum(len(report['findings']) for report in reports)} kinds of findings")
    if config.out is not None:
        chosen = "" if config.targets == tuple(TARGETS) else f" --targets {' '.join(config.targets)}"
        command = f"PYTHONPATH=tests python -m fuzz --count {config.count} --seed {config.seed}{chosen} --out {config.out}"
        Path(config.out).write_text(json.dumps({"command": command, "files": total, "reports": reports}, indent=1) + "\n")
    return int(any(report["findings"] for report in reports))


if __name__ == "__main__":
    sys.exit(run(main))
