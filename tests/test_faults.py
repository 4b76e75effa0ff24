"""A training loses nothing when its process is killed, its disk is full, or one of several processes is gone.

The faults are in ``faults.py``. They happen in processes that are forked, so they run in one that has no threads yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("faults") / "out.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(faults.ROOT), str(faults.ROOT / "tests")]),
                   "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.faults", "--moments", "2", "--skip-torchrun", "--out", str(out)], check=True,
                   env=environment, cwd=faults.ROOT)
    return json.loads(out.read_text())


def test_killed_and_resumed_is_the_same_to_the_bit(outcome: dict) -> None:
    moments = outcome["kill -9"]["moments"]
    assert len(moments) == 2
    for moment in moments:
        assert moment["unreadable"] == []
        assert moment["resumed"] == 0
        assert moment["equal"]
        assert moment["left over"] == []


def test_a_full_disk_keeps_the_state_before_it(outcome: dict) -> None:
    full = outcome["disk full"]
    assert full["previous state intact"]
    assert "File too large" in full["message"] or "No space left" in full["message"]
    assert "make room, then continue with --resume" in full["message"]
    assert "resume.safetensors" in full["message"].split("Whole as before:")[1]
    assert full["unreadable"] == []
    assert full["resumed"] == 0
    assert full["equal"]


@pytest.mark.slow
def test_a_killed_process_of_torchrun_is_named_and_the_job_restarts(tmp_path: Path) -> None:
    done = faults.rank_killed(tmp_path, restarts=1)
    assert done["killed"] == 1
    assert done["code"] == 0, done["said"][-2000:]
    assert "lost connection in process 0: another one has ended" in " ".join(done["said"].split())
    assert "resume    resume.safetensors" in done["said"]
    assert done["unreadable"] == []
    result = json.loads((tmp_path / "restarts1" / "result.json").read_text())
    assert [record["epoch"] for record in result["history"]] == list(range(6))
    assert result["environment"]["processes"] == 2
