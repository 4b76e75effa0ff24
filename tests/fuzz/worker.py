"""One target in one process: file after file, each under a limit of time and memory, and watched for what no reader may do."""
from __future__ import annotations

import io
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from .mutate import mutate
from .targets import Target

__all__ = ["Watch", "Worker"]

SECONDS = 20  # for one file; the slowest valid one takes well under one
MEMORY = 1 << 30  # bytes of address space beyond what the process has after the valid files
# What a reader may raise: a UserError or another ValueError, and what the system says of a file.
ALLOWED = (ValueError, OSError)
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "socket.bind", "pickle.find_class", "ctypes.dlopen", "os.chmod", "os.chown", "os.link", "os.symlink", "os.putenv")
WRITING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


class Watch:
    """An audit hook: while it is on, a reader may open files below ``folder``, read those of Python and of the package, and
    do nothing else to the system. ``seen`` has what it did nevertheless."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = os.path.realpath(folder), False
        package = Path(__file__).resolve().parents[2]
        readable = (sys.prefix, sys.base_prefix, package, os.devnull, "/proc", "/sys", "/usr", "/lib")
        self.readable = tuple(os.path.realpath(path) for path in readable)
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event}{arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode, flags = arguments
            path = os.path.realpath(os.fsdecode(path))
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" not in str(mode)
            if not path.startswith(self.folder) and (writes or not path.startswith(self.readable)):
                self.seen.append(f"open({path!r}, writing={writes})")
        elif event in WRITING and not os.path.realpath(os.fsdecode(arguments[0])).startswith(self.folder):
            self.seen.append(f"{event}{arguments!r:.200}")


class Worker:
    """Reads damaged files of one target; ``report`` says what became of them.

    Args:
        name: what the report calls it.
        target: what is read, and how.
        folder: an empty directory for the files.
        limited: bound the memory of this process from now on.
    """

    def __init__(self, name: str, target: Target, folder: Path, limited: bool = True) -> None:
        self.target, self.folder = target, folder
        self.files = target.make(folder)
        self.contents = {file: file.read_bytes() for file in self.files}
        self.watch = Watch(folder)
        self.report: dict[str, Any] = {"target": name, "files": 0, "accepted": 0, "refused": 0, "slowest_seconds": 0.0,
                                       "findings": {}}
        self.refusals: Counter[str] = Counter()
        with _quiet():
            for file in self.files:
                self.target.read(folder, file)  # a valid file that is refused would make the rest worthless
        self.start = _peak()
        if limited:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _too_long)

    def try_one(self, file: Path, content: bytes) -> str | None:
        """Read ``content`` in the place of ``file``; what was wrong with that, or None."""
        file.write_bytes(content)
        self.report["files"] += 1
        begin, problem = time.perf_counter(), None
        signal.alarm(SECONDS)
        self.watch.on = True
        try:
            with _quiet():
                self.target.read(self.folder, file)
            self.report["accepted"] += 1
        except ALLOWED as error:
            self.report["refused"] += 1
            self.refusals[type(error).__name__] += 1
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {str(error)[:120]}"
        finally:
            self.watch.on = False
            signal.alarm(0)
            file.write_bytes(self.contents[file])
        self.report["slowest_seconds"] = max(self.report["slowest_seconds"], round(time.perf_counter() - begin, 3))
        if self.watch.seen:
            problem = self.watch.seen[0]
            self.watch.seen.clear()
        return problem

    def run(self, count: int, seed: int, keep: Path | None) -> dict[str, Any]:
        """``count`` damaged files, the same for the same seed; those with findings are kept in ``keep``."""
        rng = random.Random(f"{self.report['target']} {seed}")
        for number in range(count):
            file, other = rng.choice(self.files), rng.choice(self.files)
            content = mutate(self.contents[file], rng, self.contents[other])
            problem = self.try_one(file, content)
            if problem is not None:
                found = self.report["findings"]
                kind = problem.split(":")[0] + ":" + problem.split(":")[1] if ":" in problem else problem
                if kind not in found and keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{self.report['target']}-{seed}-{number}{file.suffix}").write_bytes(content)
                found.setdefault(kind, {"first": number, "times": 0, "example": problem})["times"] += 1
        self.report["memory_growth_mb"] = round((_peak() - self.start) / 1024, 1)
        self.report["refusals"] = dict(self.refusals.most_common())
        return self.report


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
