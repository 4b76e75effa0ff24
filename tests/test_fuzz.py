"""A few damaged files of every kind; ``python -m fuzz`` (tests/fuzz) reads as many as one has time for."""
from __future__ import annotations

import os
import pickle
import random
import subprocess
from pathlib import Path

import pytest
from fuzz.mutate import mutate
from fuzz.targets import TARGETS, Target
from fuzz.worker import Worker

FILES = 30


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_read(name, tmp_path):
    report = Worker(name, TARGETS[name], tmp_path, limited=False).run(FILES, seed=1, keep=None)
    assert report["findings"] == {}
    assert report["files"] == FILES == report["accepted"] + report["refused"] and report["refused"] > 0


def test_the_watch_sees_what_a_reader_must_not_do(tmp_path):
    (tmp_path / "folder").mkdir()
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    deeds = {b"1": (lambda: os.system("true"), "os.system"), b"2": (secret.read_text, "open("),
             b"3": (secret.unlink, "os.remove"), b"4": (lambda: subprocess.run(["true"]), "subprocess.Popen"),
             b"5": (lambda: 1 // 0, "ZeroDivisionError"),
             b"6": (lambda: pickle.loads(pickle.dumps(os.getcwd)), "pickle.find_class")}

    def read(folder: Path, file: Path) -> None:
        if (content := file.read_bytes()) in deeds:
            deeds[content][0]()

    worker = Worker("deeds", Target(TARGETS["layout"].make, read), tmp_path / "folder", limited=False)
    for content, (_, words) in deeds.items():
        assert words in (worker.try_one(worker.files[0], content) or "nothing seen")
    assert worker.try_one(worker.files[0], b"harmless") is None


def test_damage_follows_its_seed_and_differs():
    data = Path(__file__).read_bytes()
    made = [mutate(data, random.Random(seed)) for seed in range(50)]
    assert made == [mutate(data, random.Random(seed)) for seed in range(50)]
    assert len(set(made)) > 45
