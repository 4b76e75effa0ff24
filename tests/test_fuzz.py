"""A few damaged files of every kind; ``python -m fuzz`` (tests/fuzz) reads as many as one has time for."""
from __future__ import annotations

import os
import pickle
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fuzz.mutate import mutate
from fuzz.targets import TARGETS, Target
from fuzz.worker import Worker

from tests import apart

FILES = 30


# This and deeds run apart: an audit hook stays in its process, and every later call of id() there goes through it.
def damaged(name: str, folder: Path) -> dict[str, Any]:
    return Worker(name, TARGETS[name], folder, limited=False).run(FILES, seed=1, keep=None)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_read(name, tmp_path):
    report = apart.call(damaged, name, tmp_path)
    assert report["findings"] == {}
    assert report["files"] == FILES == report["accepted"] + report["refused"] and report["refused"] > 0


def deeds(folder: Path) -> list[tuple[str, str]]:
    """What was expected of each deed, and what the watch saw."""
    (folder / "folder").mkdir()
    secret = folder / "secret.json"
    secret.write_text("{}")
    known = {b"1": (lambda: os.system("true"), "os.system"), b"2": (secret.read_text, "open("),
             b"3": (secret.unlink, "os.remove"), b"4": (lambda: subprocess.run(["true"]), "subprocess.Popen"),
             b"5": (lambda: 1 // 0, "ZeroDivisionError"),
             b"6": (lambda: pickle.loads(pickle.dumps(os.getcwd)), "pickle.find_class"),
             b"harmless": (lambda: None, "nothing seen")}

    def read(folder: Path, file: Path) -> None:
        if (content := file.read_bytes()) in known:
            known[content][0]()

    worker = Worker("deeds", Target(TARGETS["layout"].make, read), folder / "folder", limited=False)
    return [(words, worker.try_one(worker.files[0], content) or "nothing seen") for content, (_, words) in known.items()]


def test_the_watch_sees_what_a_reader_must_not_do(tmp_path):
    for words, seen in apart.call(deeds, tmp_path):
        assert words in seen


def test_damage_follows_its_seed_and_differs():
    data = Path(__file__).read_bytes()
    made = [mutate(data, random.Random(seed)) for seed in range(50)]
    assert made == [mutate(data, random.Random(seed)) for seed in range(50)]
    assert len(set(made)) > 45
