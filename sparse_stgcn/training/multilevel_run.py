"""One run of several levels from its configuration: what is checked and built first, and what is reported last."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import checkpoint, masks
from ..config import TrainConfig
from ..data.archive import Archive
from ..ensemble import describe
from ..errors import UserError, validating
from ..kernels import BlockPattern
from ..recognizer import Recognizer
from ..scores import Scores, predict_all
from ..sparsity import mask_layers, maskable_convs, summary
from ..work_dir import Lock, occupy
from . import events, run, same_data
from .checkpoint import load_network
from .distributed import World, launched
from .growing import GrowingTrainer
from .kept import KeptStates, writing
from .levels import Levels
from .multilevel import LevelsTrainer, MultiLevelTrainer
from .report import Report

if TYPE_CHECKING:
    from ..multilevel import MultiLevelConfig

__all__ = ["FILE", "MultiLevelRun", "prepare"]

FILE = "ensemble.safetensors"


@dataclass
class MultiLevelRun:
    """A run that is ready to train: everything in it has been checked, and no other process continues it."""

    config: MultiLevelConfig
    archive: Archive
    trainer: LevelsTrainer
    work_dir: Path
    lock: Lock | None = None

    @property
    def world(self) -> World:
        """The one process that trains it."""
        return self.trainer.world

    def fit(self) -> None:
        """Train the epochs that are left."""
        self.trainer.fit()

    def finish(self) -> dict[str, Any]:
        """Test every level and all together, and write the files of the work directory.

        These are ``ensemble.safetensors`` (all levels, their common weights once), ``scores.npz`` and ``result.json`` of
        the levels as an ensemble, and for every level a directory, ``0.6`` for example, with what ``train`` writes. The
        seconds are those of the training of all levels, everywhere.

        Returns:
            The content of ``result.json``.
        """
        config, trainer, levels, start = self.config, self.trainer, self.trainer.levels, time.perf_counter()
        if levels is None:
            raise ValueError("Expected a run whose levels have been trained. Got one in its warm-up; call fit.")
        own = [level_config(config, level, self.work_dir) for level in config.sorted_levels]
        dataset = run.test_set(config, self.archive)
        scores = predict_all(list(levels.members), dataset, dataset.sample_ids, trainer.batch_size, trainer.workers,
                             [run.protocol(c, self.archive) for c in own])
        seconds = {**run.times(trainer.history), "test": time.perf_counter() - start}
        with writing(trainer.states or KeptStates(self.work_dir)):
            result = self._write(levels, own, scores, seconds)
        if self.lock is not None:
            self.lock.release()
        return result

    def _write(self, levels: Levels, own: Sequence[TrainConfig], scores: Sequence[Scores],
               seconds: Mapping[str, float]) -> dict[str, Any]:
        config = self.config
        first = config.sorted_levels.index(config.sparsity)
        for index, (level, network, of_level) in enumerate(zip(own, levels.members, scores, strict=True)):
            folder = Path(str(level.work_dir))
            folder.mkdir(exist_ok=True)
            history = level_history(self.trainer.history, index, config.sorted_levels, first)
            run.write_results(folder, level, self.archive, network, of_level, history, seconds)
            level.write(folder / "config.yaml")
        names = [f"{level:g}" for level in config.sorted_levels]
        result, together = describe(levels, scores, names)
        together.save(self.work_dir / "scores.npz")
        size = checkpoint.save(levels, self.work_dir / FILE, label_names=list(self.archive.label_names), members=names,
                               protocol=dict(together.protocol), metrics=together.metrics())
        stored, dense = levels.stored_parameters(), checkpoint.dense_bytes(levels.widest)
        kept = summary(levels.widest)
        result["weights"] |= {"maskable_kept": kept.kept, "maskable_kept_fraction": kept.kept_fraction, "all_kept": stored,
                              "all_kept_fraction": stored / kept.parameters}
        result |= {"file": {"bytes": size, "dense_bytes": dense, "times_smaller": dense / size}, "seconds": seconds,
                   "environment": run.environment(torch.device(config.device or "cpu")), "config": config.to_dict(),
                   "history": self.trainer.history}
        run.write_json(self.work_dir / "result.json", result)
        return result


def prepare(config: MultiLevelConfig, report: Report | None = None) -> MultiLevelRun:
    """Check and build everything that training needs, then create the work directory.

    Raises:
        UserError: whatever is wrong with the configuration or the data; nothing has been written then.
    """
    config.validate()
    if launched():
        raise UserError("Expected sparse_stgcn.multilevel in one process. Got several, from torchrun; start it without.")
    lock = occupy(Path(config.resume)) if config.resume is not None else None
    archive = run.open_archive(config)
    full = run.resolve(config, archive)
    train_set = run.dataset(full, archive, "train", train=True)
    archive.check_classes("train")
    quick_test = run.test_set(replace(full, eval_clips=1), archive)
    if full.tensorboard:
        events.require()
    run.set_up_torch(full)
    network: Any = run.network(full, archive)
    state, rejected = (None, []) if config.resume is None else KeptStates(Path(config.resume)).newest(network)
    if state is not None:
        same_data.check(state, archive, full.data)
    elif config.resume is not None:
        run.check_unfinished(config.resume)
    with validating():
        if full.init is not None and state is None:
            run.start_from(network, full.init)
        patterns = masks.draw_levels(mask_layers(network, full.block), full.levels, full.method, full.density, full.scope,
                                     full.seed)
        if state is not None:
            network = trained(state, network.config, patterns, full)
        else:
            network.to(full.device)
            for name, conv in maskable_convs(network).items():
                conv.attach(patterns[full.sparsity][name])
    work_dir = Path(full.work_dir) if full.work_dir else run.new_work_dir(full, archive, "levels")
    if config.resume is None:
        for level in full.levels:
            if (work_dir / f"{level:g}" / "config.yaml").exists():
                raise UserError("Expected --work-dir without runs in the directories of the levels. Got "
                                f"{work_dir / f'{level:g}'}, which holds one; choose another.")
        run.create_work_dir(work_dir)
        lock = occupy(work_dir, "--work-dir")
        full.work_dir = str(work_dir)
        full.write(work_dir / "config.yaml")
    parts = (full, network, patterns, train_set, quick_test, work_dir, report)
    trainer: LevelsTrainer
    if full.schedule == "growing":
        trainer = GrowingTrainer(*parts, full.growth_epochs, full.new_weights, full.classifier == "own")
    else:
        trainer = MultiLevelTrainer(*parts, full.between, full.distillation, full.classifier == "own")
    if trainer.states is not None:
        trainer.states.goes_on = f"continue with python -m sparse_stgcn.multilevel --resume {work_dir}"
    for reason in rejected:
        trainer.report.line(f"resume    {reason}")
    if state is not None:
        with validating("--resume"):
            trainer.resume(state)
    if full.tensorboard:
        trainer.report.events = events.EventLog(work_dir / "tensorboard", trainer.history)
    return MultiLevelRun(full, archive, trainer, work_dir, lock)


def trained(state: Path, expected: Mapping[str, Any], patterns: Mapping[float, Any], config: MultiLevelConfig) -> Any:
    """The network (warm-up) or the levels (later) of a resume file, on the device.

    Raises:
        UserError: it has another network or other levels.
    """
    found = load_network(state)
    members, growing = list(getattr(found, "members", [found])), config.schedule == "growing"
    counts = range(1, len(patterns) + 1) if growing else (1, len(patterns))
    of_members = sorted(patterns)[-len(members):] if growing else sorted(patterns)[:len(members)]
    if members[0].config != expected or len(members) not in counts or not all(
            has_patterns(member, patterns[level]) for member, level in zip(members, of_members, strict=True)):
        raise UserError(f"Expected {state} to fit the network of this configuration. Got another network, or other levels.")
    found.to(config.device)
    return Levels(members, config.classifier == "own") if len(members) > 1 else found


def has_patterns(network: Recognizer, patterns: Mapping[str, BlockPattern]) -> bool:
    """Whether the convolutions of a network have just these live blocks."""
    return all(conv.pattern is not None and torch.equal(conv.pattern.blocks(), patterns[name].blocks())
               for name, conv in maskable_convs(network).items())


def level_config(config: MultiLevelConfig, level: float, work_dir: Path) -> TrainConfig:
    """What a level's own directory says of it."""
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    own = {"sparsity": level, "work_dir": str(work_dir / f"{level:g}"), "resume": None, "config": None}
    return TrainConfig(**{**shared, **own})


def level_history(history: Sequence[Mapping[str, Any]], index: int, levels: Sequence[float],
                  first: int) -> list[dict[str, Any]]:
    """The history of one of ``levels``, the widest of which is 0: its own test accuracies, and no epochs of wider levels alone.

    Args:
        first: the level that was trained alone, before there were several.
    """
    own, count = [], len(levels)
    for record in history:
        if record.get("level", levels[index]) < levels[index]:
            continue  # a wider one grew around it, and left it as it was
        entry = {key: value for key, value in record.items() if key not in ("test_accuracy", "test_accuracy_levels")}
        if "test_accuracy" in record:
            together = record.get("test_accuracy_levels")
            tested = {first: record["test_accuracy"]} if together is None else dict(enumerate(together, count - len(together)))
            if index in tested:
                entry["test_accuracy"] = tested[index]
        own.append(entry)
    return own
