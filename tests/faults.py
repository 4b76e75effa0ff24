"""Machines that die while a network trains: ``python -m tests.faults [--moments 30] [--out FILE.json]`` (Linux).

Each fault happens to a real process, and what is compared are bytes: the file of the finished network and the history. A
short version is part of the suite (``test_faults.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch

from sparse_stgcn import errors, train
from sparse_stgcn.checkpoint import read_tensors

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("seconds", "samples_per_second", "test_seconds")
RECIPE = ["--sparsity", "0.8", "--block", "4x1", "--base-channels", "8", "--batch-size", "8", "--clip-len", "8", "--eval-clips",
          "1", "--eval-every", "2", "--lr-reference-batch", "8", "--threads", "1", "--device", "cpu", "--save-every-steps", "1",
          "--ema", "0.9"]


def command(data: Path, work_dir: Path, epochs: int = 4) -> list[str]:
    """Flags of the small training: both stages, a state after every step."""
    if (work_dir / "config.yaml").exists():
        return ["--resume", str(work_dir)]
    return ["--data", str(data), "--work-dir", str(work_dir), "--epochs", str(epochs), "--warmup-epochs", str(epochs // 2),
            *RECIPE]


def start(work: Callable[[], int]) -> int:
    """Run ``work`` in a process of its own, which has all modules already; its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            code = work()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """Wait for it; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trained(argv: list[str]) -> Callable[[], int]:
    return lambda: errors.run(train.main, argv)


def remains(work_dir: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """All that a finished run leaves, but for times."""
    history = json.loads((work_dir / "result.json").read_text())["history"]
    return (work_dir / "model.safetensors").read_bytes(), [{k: v for k, v in record.items() if k not in TIMED}
                                                           for record in history]


def unreadable(work_dir: Path) -> list[str]:
    """Files under their final names that cannot be read."""
    bad = []
    for path in work_dir.glob("[!.]*.safetensors"):
        try:
            read_tensors(path)
        except ValueError:
            bad.append(path.name)
    return bad


def kill_and_resume(folder: Path, moments: int, seed: int = 0) -> dict[str, Any]:
    """Kill -9 at random moments of a training, each time resumed to its end and compared with the one that was left alone.

    A training that ends before its moment is no proof: it counts as missed, and the moments after it come from a shorter time.
    """
    data = tiny.write_npz(folder / "tiny.npz")
    begin = time.monotonic()
    assert end(start(trained(command(data, folder / "whole")))) == 0
    duration, expected = time.monotonic() - begin, remains(folder / "whole")
    draw, span, missed, outcomes = random.Random(seed), duration, 0, []
    while len(outcomes) < moments:
        work_dir = folder / f"cut{len(outcomes)}_{missed}"
        child = start(trained(command(data, work_dir)))
        moment = draw.uniform(0.02, 1.0) * span
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if end(child) != -signal.SIGKILL or (work_dir / "result.json").exists():
            span, missed = moment, missed + 1
            continue
        log = work_dir / "log.jsonl"
        outcome = {"second": round(moment, 3), "epochs": len(log.read_text().splitlines()) if log.exists() else 0,
                   "part files": len(list(work_dir.glob(".*.part"))), "unreadable": unreadable(work_dir)}
        outcome["resumed"] = end(start(trained(command(data, work_dir))))
        outcome["equal"] = remains(work_dir) == expected
        outcome["left over"] = [path.name for path in work_dir.iterdir() if path.name.startswith(".")]
        outcomes.append(outcome)
    return {"seconds of the whole training": round(duration, 2), "missed": missed, "moments": outcomes}


def disk_full(folder: Path) -> dict[str, Any]:
    """The limit of a file's size falls below that of the state while a training runs; raised again, the run is resumed."""
    data, work_dir, message = tiny.write_npz(folder / "tiny.npz"), folder / "full", folder / "message"
    assert end(start(trained(command(data, folder / "whole")))) == 0

    def limited() -> int:
        from sparse_stgcn.config import parse
        from sparse_stgcn.training.run import prepare

        job = prepare(parse(command(data, work_dir)))
        job.trainer.fit(until=1)
        before = (work_dir / "resume.safetensors").read_bytes()
        least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, most))
        try:
            job.fit()
        except errors.TrainingError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
            message.write_text(str(error))
            return 0 if (work_dir / "resume.safetensors").read_bytes() == before else 3
        return 4

    code = end(start(limited))
    resumed = end(start(trained(command(data, work_dir))))
    return {"previous state intact": code == 0, "message": message.read_text() if message.exists() else "",
            "unreadable": unreadable(work_dir), "resumed": resumed,
            "equal": remains(work_dir) == remains(folder / "whole")}


def torchrun(*flags: str) -> list[str]:
    """The command that starts two processes of ``train``."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]


def rank_killed(folder: Path, restarts: int, compare: bool = False) -> dict[str, Any]:
    """Kill -9 one of two processes of torchrun after the second epoch.

    Args:
        restarts: of ``--max-restarts``.
        compare: also train without the fault, and compare the bytes.
    """
    data = tiny.write_npz(folder / "tiny.npz")
    argv = lambda name: [*torchrun("--max-restarts", str(restarts)), "-m", "sparse_stgcn.train",
                         *command(data, folder / name, epochs=6)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    work_dir = folder / f"restarts{restarts}"
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(argv(work_dir.name), stdout=log, stderr=log, env=environment, cwd=ROOT)
        deadline = time.monotonic() + 300
        while lines(work_dir / "log.jsonl") < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        victims = [pid for pid, rank in workers(process.pid) if rank == "1"]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        code = process.wait(300)
        log.seek(0)
        said = log.read()
    outcome = {"killed": len(victims), "code": code, "unreadable": unreadable(work_dir), "states": sorted(
        path.name for path in work_dir.glob("resume*.safetensors")), "said": said}
    if compare and code == 0:
        subprocess.run(argv("whole2"), check=True, env=environment, cwd=ROOT, capture_output=True)
        outcome["equal"] = remains(work_dir) == remains(folder / "whole2")
    return outcome


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers(parent: int) -> Iterator[tuple[int, str]]:
    """(process id, RANK) of the processes that torchrun has started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        yield from ((int(child), text[5:].decode()) for text in variables if text.startswith(b"RANK="))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-torchrun", action="store_true")
    parser.add_argument("--out")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for name, fault in (("kill -9", lambda folder: kill_and_resume(folder, asked.moments, asked.seed)),
                        ("disk full", disk_full),
                        ("rank killed, restarted", lambda folder: rank_killed(folder, 1, compare=True)),
                        ("rank killed, not restarted", lambda folder: rank_killed(folder, 0))):
        if asked.skip_torchrun and name.startswith("rank"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = fault(Path(folder))
            found.pop("said", None)  # torchrun's words, full of this machine's paths: for test_faults.py
            result[name] = {key: value.replace(folder, "") if isinstance(value, str) else value for key, value in found.items()}
        if asked.out:
            Path(asked.out).write_text(json.dumps(result, indent=1))
    if not asked.out:
        print(json.dumps(result, indent=1))
    moments = result["kill -9"]["moments"]
    print(f"kill -9: {len(moments)} killed ({result['kill -9']['missed']} more had ended before), "
          f"{sum(m['equal'] and m['resumed'] == 0 for m in moments)} resumed to the same bytes, "
          f"{sum(bool(m['unreadable']) for m in moments)} with an unreadable file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
