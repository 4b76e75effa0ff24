"""Several processes compute what one would: gradients, trainings, tests; and exchange live weights only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn

from sparse_stgcn import compact
from sparse_stgcn.config import TrainConfig, parse
from sparse_stgcn.errors import TrainingError, UserError
from sparse_stgcn.train import continued
from sparse_stgcn.training.batches import Batches
from sparse_stgcn.training.distributed import World, meet, traffic

ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes say; see ``distributed_cases.py``."""
    out = tmp_path_factory.mktemp("distributed") / "out.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                    "tests.distributed_cases", str(out)], check=True, env=environment, cwd=ROOT)
    return json.loads(out.read_text())


@pytest.mark.parametrize("backbone", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
@pytest.mark.parametrize("stage", ["warmup", "compact"])
@pytest.mark.parametrize("norms", ["synchronised", "frozen"])
def test_gradients_are_those_of_one_process(found: dict, backbone: str, stage: str, norms: str) -> None:
    # The same sums in another order: about a hundred terms at a time, in some thirty layers one behind the other, whose norms
    # may each amplify the error before it.
    assert found["gradients"][f"{backbone} {stage} {norms}"] < 1e4 * EPS
    assert found["gradients"][f"{backbone} {stage} {norms} statistics"] < 1e4 * EPS


def test_norms_over_shares_would_differ(found: dict) -> None:
    assert found["local"] > 1e-3


@pytest.mark.parametrize("kind", ["training", "accumulated"])
def test_a_training_is_that_of_one_process(found: dict, kind: str) -> None:
    errors = found[kind]
    for name in ("state", "momentum", "loss"):
        assert errors[name] < 1e6 * EPS  # twelve steps, each of which may amplify the rounding of the ones before
    assert errors["accuracies_equal"]


def test_only_live_values_are_exchanged_after_the_switch(found: dict) -> None:
    training = found["training"]
    warmup, live = training["sent"]["warm-up"], training["sent"]["fine-tune"]
    assert live == training["expected"] == training["parameters"]
    model = tiny.model(0.8).double()
    assert warmup == traffic(model).gradients == 8 * sum(p.numel() for p in model.parameters())
    assert live == traffic(compact(model)).gradients < warmup


def test_bytes_of_norm_statistics() -> None:
    model = tiny.model().float()
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # forward: mean, variance and one count; backward: two sums
    assert traffic(model, synchronised=True).statistics == 4 * sum(4 * c + 1 for c in channels)
    assert traffic(model).statistics == 0


def test_what_differs_is_named_before_work(found: dict) -> None:
    assert found["agree"].startswith("Expected the same patterns in all 2 processes. Got digest 0 in process 0 and digest 1 in "
                                     "process 1;")


def test_sums(found: dict) -> None:
    assert found["sums"] == [3.0, 1.0]


def test_shares_cover_every_step_once(found: dict) -> None:
    first, second = found["shares"]
    assert [len(part) for part in first] == [2, 2, 2, 2, 1, 1]  # steps of 8, 8 and 4 in two parts, in two shares
    assert [i for a, b in zip(first, second, strict=True) for i in a + b] == list(range(20))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_weights_make_the_mean_of_the_step(size: int, parts: int) -> None:
    data = tiny.datasets()[0]
    loss = np.random.default_rng(0).standard_normal(len(data))
    order = data.order(0)
    ranks = [Batches(data, 9, parts, World(rank, size)) for rank in range(size)]
    for step in range(ranks[0].steps):  # of 9, 9 and 2 sequences: the last is computed whole by 3 and by 8 processes
        plans = [batches.plan(step, order) for batches in ranks]
        assert len({len(plan) for plan in plans}) == 1
        assert all(part.indices for plan in plans for part in plan)
        assert [part.last for part in plans[0]] == [False] * (len(plans[0]) - 1) + [True]
        mean = sum(part.weight * loss[part.indices].mean() for plan in plans for part in plan) / size
        assert mean == pytest.approx(loss[order[9 * step:9 * step + 9]].mean(), rel=1e-12)


def test_the_order_goes_on_inside_an_epoch() -> None:
    data = tiny.datasets()[0]
    data.set_epoch(3)
    batches = Batches(data, 8)
    whole = list(batches)
    batches.start = 2
    assert list(batches) == whole[2:]
    assert len(batches) == 1
    data.set_epoch(4)
    batches.start = 0
    assert list(batches) != whole


def test_one_device_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--device cpu or cuda with several processes.* Got cuda:0"):
        World.join("cuda:0")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"GPU for each of the 2 processes.* Got 0; lower --nproc-per-node"):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
            World.join("cuda")


def test_a_process_that_is_started_again_finds_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--sparsity", "0.8", "--epochs", "4"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError, match="--work-dir together with torchrun --max-restarts"):
        continued(parse(flags))
    work_dir = tmp_path / "run"
    asked = parse([*flags, "--work-dir", str(work_dir)])
    assert continued(asked) is asked
    work_dir.mkdir()
    recorded = TrainConfig(sparsity=0.8, epochs=4, batch_size=16, work_dir=str(work_dir))
    recorded.write(work_dir / "config.yaml")
    again = continued(asked)
    assert (again.resume, again.batch_size, again.epochs) == (str(work_dir), 16, 4)
    with pytest.raises(UserError, match="other values for --epochs"):
        continued(parse(["--sparsity", "0.8", "--epochs", "5", "--work-dir", str(work_dir)]))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert continued(asked) is asked


def meeting(store: dist.Store, delays: list[float]) -> list[str]:
    """What ``meet`` gives to each of some threads that begin after their delays, in seconds."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return meet(store, rank, len(delays), timedelta(seconds=20))

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(come, range(len(delays))))


@pytest.mark.parametrize("delays", [[0, 0, 0], [0.3, 0, 0.1], [0, 0.2, 0.4]])
def test_processes_that_start_again_do_not_take_the_dead_for_the_living(delays: list[float]) -> None:
    store, before = dist.HashStore(), set()
    for _ in range(4):  # in the same store, as torchrun does it
        names = meeting(store, delays)
        assert len(set(names)) == 1
        assert names[0] not in before
        before.add(names[0])


def test_a_start_that_was_cut_off_leaves_nothing_that_misleads_the_next_one() -> None:
    store = dist.HashStore()
    for alone in (1, 0):  # process 1 found nobody, then process 0 did not
        with pytest.raises(TrainingError, match=f"2 processes to meet .* of process {1 - alone} in process {alone};"):
            meet(store, alone, 2, timedelta(seconds=0.2))
    assert len(set(meeting(store, [0, 0.2]))) == 1
