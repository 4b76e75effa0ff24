"""One training run from its configuration: what is checked and built first, and what is reported last."""
from __future__ import annotations

import inspect
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from .. import checkpoint
from ..backbones import BACKBONES, create_model
from ..config import PRESETS, SMALL, T, TrainConfig
from ..data import synthetic
from ..data.archive import Archive
from ..data.dataset import SkeletonDataset
from ..errors import UserError, validating
from ..kernels import backends
from ..recognizer import Recognizer
from ..scores import Scores, joined, predict
from ..sparsity import densify, sparsify, summary
from ..work_dir import Lock, occupy
from . import auto_batch, events, same_data
from .auto import Automatic, Problem, verified
from .checkpoint import load_model
from .distributed import World
from .kept import KeptStates, writing
from .loop import Trainer
from .report import Report
from .trial import HELD_OUT, held_out

__all__ = ["Run", "network", "open_archive", "open_whole", "prepare", "start_from", "test_set", "times", "with_part",
           "write_json", "write_results"]

SYNTHETIC_SEED = 0  # the set is the same for every --seed, so that runs can be compared


@dataclass
class Run:
    """A run that is ready to train: everything in it has been checked, and no other process continues it."""

    config: TrainConfig
    archive: Archive
    model: Recognizer
    trainer: Trainer
    work_dir: Path
    world: World
    lock: Lock | None = None

    def fit(self) -> None:
        """Train the epochs that are left."""
        self.trainer.fit()

    def finish(self) -> dict[str, Any]:
        """Test, write ``scores.npz``, ``model.safetensors`` and ``result.json``; the content of the last.

        Of several processes each tests a share, and the first one writes.
        """
        start = time.perf_counter()
        scores = self._test()
        if not self.world.first:
            return {}
        with writing(KeptStates(self.work_dir)):
            seconds = {**times(self.trainer.history), "test": time.perf_counter() - start}
            result = write_results(self.work_dir, self.config, self.archive, self.trainer.network, scores,
                                   self.trainer.history, seconds, self.world.size)
        if self.lock is not None:
            self.lock.release()
        return result

    def _test(self) -> Scores:
        dataset, trainer = test_set(self.config, self.archive), self.trainer
        self.world.copy_buffers(trainer.network)
        own = self.world.share(range(len(dataset)))
        scores = None if not own else predict(
            trainer.network, Subset(dataset, own), dataset.sample_ids, trainer.batch_size, trainer.workers,
            protocol(self.config, self.archive))
        return joined([part for part in self.world.gather(scores) if part is not None])


def write_results(work_dir: Path, config: TrainConfig, archive: Archive, model: Any, scores: Scores,
                  history: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], processes: int = 1,
                  ) -> dict[str, Any]:
    """Write ``scores.npz``, ``model.safetensors`` and ``result.json`` of a trained network; the content of the last.

    Args:
        scores: of all test clips.
        history: see ``loop.Trainer``.
        seconds: of each stage, evaluation and test.
        processes: how many trained it.
    """
    tested = [record for record in history if "test_accuracy" in record]
    best = max(tested, key=lambda record: record["test_accuracy"])
    kept, metrics = summary(model), scores.metrics()
    result: dict[str, Any]
    about = meta(config, archive, metrics) | {"protocol": dict(scores.protocol)}
    scores.save(work_dir / "scores.npz")
    size = checkpoint.save(model, work_dir / "model.safetensors", **about)
    dense = checkpoint.dense_bytes(model)
    result = {
        "test": {**metrics, "samples": len(scores.label), "protocol": dict(scores.protocol)},
        "one_clip": {"last": tested[-1]["test_accuracy"], "best": best["test_accuracy"],
                     "best_epoch": best["epoch"], "best_is_chosen_on": "the test split"},
        "weights": {"maskable": kept.maskable, "maskable_kept": kept.kept, "all": kept.parameters,
                    "all_kept": kept.kept_parameters, "maskable_kept_fraction": kept.kept_fraction,
                    "all_kept_fraction": kept.kept_parameters_fraction},
        "file": {"bytes": size, "dense_bytes": dense, "times_smaller": dense / size},
        "seconds": dict(seconds),
        **({"auto": chosen} if (chosen := verified(work_dir, model, config)) else {}),
        "environment": environment(torch.device(config.device or "cpu")) | {"processes": processes},
        "config": config.to_dict(),
        "history": list(history),
    }
    write_json(work_dir / "result.json", result)
    return result


def times(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each stage and of the evaluations between epochs."""
    seconds = {stage: sum(r["seconds"] for r in history if r["stage"] == stage)
               for stage in dict.fromkeys(r["stage"] for r in history)}
    return {**seconds, "evaluation": sum(r.get("test_seconds", 0.0) for r in history)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, the whole file at once."""
    checkpoint.write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def prepare(config: TrainConfig, report: Report | None = None) -> Run:
    """Check and build everything that training needs, then create the work directory.

    Under torchrun the processes meet first, and the first one alone creates and speaks.

    Raises:
        UserError: whatever is wrong with the configuration or the data, or the processes differ in it; nothing has been
            written then.
    """
    config.validate()
    if config.tensorboard:
        events.require()
    world = World.join(config.device)
    if config.automatic and world.size > 1:
        raise UserError(f"Expected --sparsity auto and --density auto in one process. Got {world.size}; train with the "
                        "densities that one process has chosen.")
    lock = occupy(Path(config.resume)) if config.resume is not None and world.first else None
    archive = open_archive(config)
    full = resolve(config, archive)
    train_set = dataset(full, archive, "train", train=True)
    archive.check_classes("train")
    if full.automatic and full.limit().kind == "points" and not len(held_out(train_set)[1]):
        raise UserError(f"Expected --budget {full.budget} with a class of at least {HELD_OUT} training sequences, of which one "
                        f"is held out. Got {len(train_set)} of {len(archive.label_names)} classes; name a budget in %, kB "
                        "or ms.")
    quick_test = test_set(replace(full, eval_clips=1), archive)
    set_up_torch(full)
    model = network(full, archive)
    # A run that stopped before it saved anything has no state: its continuation is the run from the start.
    state, rejected = (None, []) if config.resume is None else KeptStates(Path(config.resume)).newest(model)
    if state is None and config.resume is not None:
        check_unfinished(config.resume)
    with validating():
        if state is not None:
            load_model(state, model)
        else:
            if full.init is not None:
                start_from(model, full.init)
            if full.sparse and not full.automatic:
                sparsify(model, float(full.sparsity), full.block, full.method, full.density, full.scope, full.seed,
                         full.mask_file)
        if full.method == "predefined":
            full.sparsity = round(1 - summary(model).kept_fraction, 6)
        problem = automatic(full, archive) if full.automatic else None
    device = world.device(full.device or "cpu")
    if full.auto_batch and config.resume is None:
        auto_batch.choose(full, config.batch_size, model.to(device), tuple(train_set[0][0].shape), len(train_set), world)
    world.agree(configuration=full.to_dict(), data=same_data.fingerprint(archive), patterns=checkpoint.pattern_digest(model),
                resume_file=state and state.name)
    if state is not None:
        same_data.check(state, archive, full.data)
    work_dir = world.gather(Path(full.work_dir) if full.work_dir else new_work_dir(full, archive))[0]
    if config.resume is None and world.first:
        create_work_dir(work_dir)
        lock = occupy(work_dir, "--work-dir")
        full.work_dir = str(work_dir)
        full.write(work_dir / "config.yaml")
    full.work_dir = str(work_dir)
    report = report or (Report(full.epochs or 1) if world.first else Report.silent())
    for reason in rejected:
        report.line(f"resume    {reason}")
    trainer = Trainer(full, model.to(device), train_set, quick_test, work_dir, report, world)
    if problem is not None:
        trainer.follow(Automatic(trainer, problem))
    if state is not None:
        with validating("--resume"):
            trainer.resume(state)
        report.line(f"resume    {state.name}: {trainer.epoch} epochs and {trainer.totals.step} steps are done")
    if full.tensorboard and world.first:
        trainer.report.events = events.EventLog(work_dir / "tensorboard", trainer.history)
    world.gather(None)  # the directory exists before any other process goes on
    return Run(full, archive, model, trainer, work_dir, world, lock)


def automatic(config: TrainConfig, archive: Archive) -> Problem:
    """What an automatic run has to choose; the random state of torch is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return Problem.of(config, network(config, archive), meta(config, archive))


def open_archive(config: TrainConfig) -> Archive:
    """The archive of ``config.data`` with the chosen split as "train" and "test", or the synthetic set.

    Raises:
        UserError: it cannot be read, its parts do not fit together, or it has no such split.
    """
    return with_part(open_whole(config), config)


def with_part(archive: Archive, config: TrainConfig) -> Archive:
    """The archive with the split or fold that ``config`` names as "train" and "test". Raises UserError where it has none."""
    return archive.with_split(config.split) if config.fold is None else archive.fold(config.fold)


def open_whole(config: TrainConfig) -> Archive:
    """The archive of ``config.data`` with all its splits, or the synthetic set; raises like :func:`open_archive`."""
    from ..skeleton import Skeleton

    if config.data is None:
        archive = synthetic.make(config.sequences or PRESETS["synthetic"]["sequences"], SYNTHETIC_SEED)
        if config.layout is not None:
            with validating("--layout"):
                archive = replace(archive, skeleton=Skeleton.load(config.layout))
    else:
        if Path(config.data).is_file() and Path(config.data).suffix != ".npz":
            raise UserError(f"Expected --data to be an archive directory or an .npz file. Got {config.data}; "
                            f"make one with python -m sparse_stgcn.convert {config.data} OUT.")
        with validating("--data"):
            archive = Archive.open(config.data, config.layout)
    return archive


def resolve(config: T, archive: Archive) -> T:
    """The configuration with every value that depends on the data or on the machine filled in."""
    size = int(archive.train.sum())
    preset = "synthetic" if config.data is None else "small" if size < SMALL else "large"
    full = config.resolved(preset)
    if full.device is None:
        full.device = "cuda" if torch.cuda.is_available() else "cpu"
    if full.threads is None:
        full.threads = torch.get_num_threads()
    if full.workers is None:
        full.workers = min(4, os.cpu_count() or 1) if preset == "large" and full.device != "cpu" else 0
    if full.num_person is None:
        full.num_person = archive.num_persons
    return full


def dataset(config: TrainConfig, archive: Archive, split: str, train: bool) -> SkeletonDataset:
    """Clips of one split as the configuration describes them."""
    return SkeletonDataset(
        archive, split, config.stream, config.clip_len or 1, config.eval_clips, train, config.seed,
        config.num_person, config.align, (config.rotate or 0.0) if train else 0.0, (config.scale or 0.0) if train else 0.0,
        config.missing, config.sampler, box=config.box)


def test_set(config: TrainConfig, archive: Archive) -> SkeletonDataset:
    """The test split, ``eval_clips`` fixed clips per sequence."""
    return dataset(config, archive, "test", train=False)


def network(config: TrainConfig, archive: Archive) -> Recognizer:
    """The dense network for this data, initialised from the seed."""
    with validating():
        return create_model(config.backbone, archive.num_classes, layout=archive.skeleton,
                            in_channels=3 * len(config.stream.split("+")), base_channels=config.base_channels,
                            **fixed_persons(config.backbone, config.num_person))


def start_from(model: nn.Module, path: str | Path) -> None:
    """Give a dense network the weights of a checkpoint or of a finished work directory; masked ones are 0.

    Raises:
        UserError: no such checkpoint, or one of another network.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    with validating("--init"):
        source = densify(checkpoint.load(file), forget=True)
        try:
            model.load_state_dict(source.state_dict())
        except RuntimeError as error:
            raise ValueError(f"Expected --init to hold the same network: backbone, classes, joints, stream and "
                             f"--base-channels. Got {file}: {str(error).splitlines()[-1].strip()}") from error


def fixed_persons(backbone: str, num_person: int | None) -> dict[str, Any]:
    """``num_person`` as an argument of ``create_model``, for the backbones whose input norm fixes it."""
    fixed = "num_person" in inspect.signature(BACKBONES[backbone]).parameters
    return {"num_person": num_person} if fixed else {}


def mask_of(config: TrainConfig) -> dict[str, Any] | None:
    """How the mask of a run was chosen, for checkpoints; None for a dense network."""
    keys = ("method", "density", "scope", "block", "seed", "mask_file")
    return {key: getattr(config, key) for key in keys} if config.sparse else None


def meta(config: TrainConfig, archive: Archive, metrics: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the checkpoint of a run holds beside the network; without metrics, as much text as there will be."""
    return {"label_names": list(archive.label_names), "protocol": protocol(config, archive), "sparsity": config.sparsity,
            "metrics": metrics or dict.fromkeys(("top1", "top5", "mean_class"), 1 / 3), "seed": config.seed,
            "mask": mask_of(config)}


def protocol(config: TrainConfig, archive: Archive) -> dict[str, Any]:
    """How test scores come about, for score files and checkpoints."""
    return {"data": archive.name, "split": archive.info.get("split"), "backbone": config.backbone,
            "sparsity": config.sparsity, "stream": config.stream, "clips": config.eval_clips,
            "clip_len": config.clip_len, "num_person": config.num_person, "persons": archive.num_persons, "align": config.align,
            "box": config.box, "sampler": config.sampler, "missing": config.missing, "layout": archive.skeleton.name,
            "coordinates": int(archive.keypoint.shape[-1]),
            "fps": archive.info.get("fps"), "average": "softmax, then mean over clips"}


def set_up_torch(config: TrainConfig) -> None:
    """Seed, threads, and arithmetic that gives the same numbers in every run."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def new_work_dir(config: TrainConfig, archive: Archive, what: str | None = None) -> Path:
    """runs/BACKBONE-DATA-STREAM-WHAT, with a number where that exists; ``what`` is the sparsity by default."""
    data = re.sub(r"[^\w.+-]", "_", archive.name)  # a file may call its data set anything
    name = f"{config.backbone}-{data}-{config.stream}-{what or config.level}"
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def create_work_dir(path: Path) -> None:
    """Create it.

    Raises:
        UserError: it holds a run already, or it cannot be created.
    """
    if (path / "config.yaml").exists():
        raise UserError(f"Expected --work-dir to be a new or empty directory. Got {path}, which holds a run; "
                        f"choose another, or continue it with --resume {path}.")
    if held := results_in(path):
        raise UserError(f"Expected --work-dir to be a new or empty directory. Got {path}, which holds {held}; choose another.")
    with validating("--work-dir"):
        path.mkdir(parents=True, exist_ok=True)


def results_in(path: Path) -> str | None:
    """The first of the files that a finished run leaves, a new one would replace."""
    names = ("result.json", "model.safetensors", "ensemble.safetensors")
    return next((name for name in names if (path / name).exists()), None)


def check_unfinished(path: str | Path) -> None:
    """Raise a UserError if a run without a state has results: it cannot go on, and beginning again would replace them."""
    if held := results_in(Path(path)):
        raise UserError(f"Expected --resume of a run that can go on. Got {path}, which has {held} and no resume file; a level "
                        "of sparse_stgcn.multilevel goes on with the directory above it, another training in a new --work-dir.")


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures of a run depend on besides its configuration."""
    from .. import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"sparse_stgcn": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
            "processors": os.cpu_count(), "backends": backends()}
