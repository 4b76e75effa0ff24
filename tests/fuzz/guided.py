"""Damage guided by coverage: ``PYTHONPATH=tests python -m fuzz.guided TARGET[:FILE] -runs=N [libFuzzer's other options]``.

Needs atheris (``pip install atheris``). libFuzzer keeps what reaches new lines of the package and damages that again, half the
time with its own faults, half with those of :mod:`fuzz.mutate`. FILE is the number of the damaged file, where a target has
several. It stops at the first finding and keeps the file as ``crash-*`` in the working directory.
"""
from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

from sparse_stgcn.errors import one_of

with atheris.instrument_imports(include=["sparse_stgcn"], enable_loader_override=False):
    from .mutate import mutate
    from .targets import TARGETS
    from .worker import Worker


def main() -> None:
    """Run libFuzzer, which ends the process."""
    name, _, number = sys.argv.pop(1).partition(":") if len(sys.argv) > 1 else ("", "", "")
    one_of("TARGET", name, list(TARGETS))
    folder = Path(tempfile.mkdtemp())
    (folder / "files").mkdir()
    worker = Worker(name, TARGETS[name], folder / "files", limited=False)
    file = worker.files[int(number or 0)]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "valid").write_bytes(worker.contents[file])

    def try_one(content: bytes) -> None:
        if (problem := worker.try_one(file, content)) is not None:
            raise AssertionError(problem)

    def damage(content: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = atheris.Mutate(content, most) if rng.random() < 0.5 else mutate(content, rng, worker.contents[file])
        return changed[:most]

    # SIGALRM is the worker's.
    options = ["-handle_alrm=0", f"-max_len={4 * len(worker.contents[file])}", str(folder / "corpus")]
    atheris.Setup([*sys.argv, *options], try_one, custom_mutator=damage)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
