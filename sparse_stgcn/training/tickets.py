"""The lottery experiment: accuracy over sparsity for masks found in several ways, from several initial weights.

Every combination of method, initial weights, sparsity and seed is a point of ``lottery.json``. The file is replaced
as a whole after each point, and what is in it is not computed again; a point that was interrupted goes on from the last
epoch.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint, masks
from ..config import TrainConfig
from ..data.archive import Archive
from ..errors import UserError, validating
from ..scores import accuracy, predict
from ..sparsity import compact, densify, mask_layers, maskable_convs, summary
from ..work_dir import occupy
from . import run, same_data
from .checkpoint import load_model
from .kept import KeptStates
from .loop import Trainer
from .lottery import ScoredNetwork
from .report import Report

__all__ = ["INITS", "METHODS", "Lottery", "Recipe", "rounds"]

METHODS = ("scores", "magnitude", "iterative")
INITS = ("pretrained", "random")
RESULT = "lottery.json"


@dataclass(frozen=True)
class Recipe:
    """What is the same for all points of an experiment, besides the configuration of the base run.

    Attributes:
        block, density, scope: of the masks, see ``masks.draw``.
        absolute, score_init, train_norm, train_head: of ``scores``, see ``ScoredNetwork``.
        score_lr: learning rate of the scores for each reference batch.
        rate: largest fraction of the weights left that a round of ``iterative`` cuts.
        rewind_epoch: epoch to whose weights and learning rate ``iterative`` goes back.
    """

    block: str = "1x1"
    density: str = "uniform"
    scope: str = "global"
    absolute: bool = False
    score_init: str = "uniform"
    score_lr: float = 1.0
    train_norm: bool = False
    train_head: bool = False
    rate: float = 0.5
    rewind_epoch: int = 0


def rounds(sparsities: Sequence[float], rate: float) -> list[float]:
    """Sparsities of the rounds of iterative pruning: through all that are asked, in equal ratios between two.

    No round cuts more than ``rate`` of the weights that are left:

        >>> rounds([0.5, 0.9], 0.5)
        [0.5, 0.7076, 0.829, 0.9]
    """
    steps, kept = [], 1.0
    for sparsity in sorted(set(sparsities)):
        count = max(1, math.ceil(round(math.log((1 - sparsity) / kept) / math.log(1 - rate), 9)))
        ratio = ((1 - sparsity) / kept) ** (1 / count)
        steps += [round(1 - kept * ratio**i, 5) for i in range(1, count)] + [sparsity]
        kept = 1 - sparsity
    return steps


class Lottery:
    """The points of one experiment in one directory.

    Args:
        base: the resolved configuration of a run; data, network and schedule are its own.
        pretrained: checkpoint of a dense network for ``init="pretrained"``, or None.
        recipe: see ``Recipe``.
        folder: where ``lottery.json`` and the state of each point go; ``run`` creates it.
        report: makes the report of a training of so many epochs.

    Raises:
        UserError: the directory holds an experiment with another recipe, or the checkpoint is not that of a dense network
            like this one.
    """

    def __init__(self, base: TrainConfig, archive: Archive, pretrained: Path | None, recipe: Recipe, folder: Path,
                 report: Callable[[int], Report] = Report) -> None:
        self.base, self.archive, self.pretrained, self.recipe = base, archive, pretrained, recipe
        self.folder, self.report = folder, report
        self.train_set = run.dataset(base, archive, "train", train=True)
        self.quick_test = run.test_set(replace(base, eval_clips=1), archive)
        self.full_test = run.test_set(base, archive)
        if pretrained is not None:
            with validating():
                sparse = checkpoint.read_metadata(pretrained)["sparse"]
            if sparse:
                raise UserError(f"Expected the checkpoint of a dense network. Got {pretrained}, whose masked weights are "
                                "lost; train one with --sparsity 0.")
        with validating():
            network = self._initial("random" if pretrained is None else "pretrained", base.seed)
            masks.budgets(mask_layers(network, recipe.block), 0.5, recipe.density, recipe.scope)
        self.result = self._read()

    @property
    def points(self) -> list[dict[str, Any]]:
        return self.result["points"]

    def point(self, method: str, init: str, sparsity: float, seed: int) -> dict[str, Any] | None:
        """The record of a finished point, or None."""
        key = {"method": method, "init": init, "sparsity": sparsity, "seed": seed}
        return next((point for point in self.points if key.items() <= point.items()), None)

    def run(self, methods: Sequence[str], inits: Sequence[str], sparsities: Sequence[float],
            seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Compute the points that are missing, and return all points of the directory."""
        run.set_up_torch(self.base)
        if self.pretrained is not None and self.result["pretrained"]["test"] is None:
            self.result["pretrained"]["test"] = self._test(self._initial("pretrained", self.base.seed))
        # What the experiment is stands on the disk before any state does: no other one goes on with the states of this one.
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = occupy(self.folder, "--out")
        if (self.folder / RESULT).exists():  # what another process has found meanwhile
            with validating():
                self.result["points"] = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))["points"]
        self._write()
        for seed, method, init in itertools.product(seeds, methods, inits):
            missing = [s for s in sorted(set(sparsities)) if self.point(method, init, s, seed) is None]
            if method == "iterative" and missing:
                self._iterative(init, sparsities, seed)
            elif method != "iterative":
                for sparsity in missing:
                    self._single(method, init, sparsity, seed)
        if lock is not None:
            lock.release()
        return self.points

    def _single(self, method: str, init: str, sparsity: float, seed: int) -> None:
        """Learned scores, or one-shot magnitude pruning and training of what is left."""
        recipe, folder = self.recipe, self.folder / f"{method}-{init}-{sparsity:g}-seed{seed}"
        if method == "scores":
            config = replace(self._config(seed, 0.0), lr=recipe.score_lr)
            build: Callable[[], nn.Module] = lambda: ScoredNetwork(
                self._initial(init, seed), sparsity, recipe.block, recipe.density, recipe.scope, recipe.absolute,
                recipe.score_init, seed, recipe.train_norm, recipe.train_head)
        else:
            config = self._config(seed, sparsity)
            build = lambda: self._cut(self._initial(init, seed), self._initial(init, seed), sparsity)
        before = accuracy(build().to(config.device), self.quick_test, 2 * self.train_batch, config.workers or 0)
        trainer = self._trainer(config, folder, build)
        trainer.fit()
        network = trainer.model.ticket() if isinstance(trainer.model, ScoredNetwork) else trainer.model
        self._record(folder, network, trainer, method, init, sparsity, seed, one_clip_before=before)
        KeptStates(folder).clear()

    def _iterative(self, init: str, sparsities: Sequence[float], seed: int) -> None:
        """Train, cut the smallest weights, go back to the early ones; again (Frankle and Carbin 2019, Frankle et al. 2020).

        The directory of a round lies in that of the round whose network it cuts.
        """
        folder, early = self.folder / f"iterative-{init}-seed{seed}", self.recipe.rewind_epoch
        trained, rewind = folder / "model.safetensors", folder / "rewind.safetensors"
        if not trained.exists():
            trainer = self._trainer(self._config(seed, 0.0), folder, lambda: self._initial(init, seed))
            if not rewind.exists():  # it is written as a whole; a state inside epoch ``early`` has later weights already
                if (trainer.epoch, trainer.totals.step) > (early, 0):
                    raise UserError(f"Expected {rewind} beside the states of a training that is past epoch {early}. Got none; "
                                    f"remove {folder}, so that it begins again.")
                trainer.fit(until=early)
                checkpoint.save(trainer.model, rewind)
            trainer.fit()
            checkpoint.save(trainer.model, trained)
        last = max(s for s in sparsities if self.point("iterative", init, s, seed) is None)
        for number, sparsity in enumerate(rounds(sparsities, self.recipe.rate), start=1):
            if sparsity > last:
                break
            folder, previous = folder / f"{sparsity:g}", trained
            trained = folder / "model.safetensors"
            asked = sparsity in sparsities and self.point("iterative", init, sparsity, seed) is None
            if asked or not trained.exists():
                trainer = self._trainer(
                    self._config(seed, sparsity), folder,
                    lambda previous=previous, sparsity=sparsity: self._cut(  # type: ignore[misc]
                        checkpoint.load(rewind), densify(checkpoint.load(previous), forget=True), sparsity))
                trainer.epoch = max(trainer.epoch, early)
                trainer.fit()
                if asked:
                    self._record(folder, trainer.model, trainer, "iterative", init, sparsity, seed, rounds=number)
                else:
                    checkpoint.save(trainer.model, trained)

    def _cut(self, network: nn.Module, judged: nn.Module, sparsity: float) -> nn.Module:
        """``network`` with only the weights that are the largest in ``judged``, compact."""
        recipe = self.recipe
        patterns = masks.draw(mask_layers(judged, recipe.block), sparsity, "magnitude", recipe.density, recipe.scope)
        for name, conv in maskable_convs(network).items():
            conv.attach(patterns[name])
        return compact(network)

    def _initial(self, init: str, seed: int) -> nn.Module:
        """The dense network with its initial weights."""
        torch.manual_seed(seed)
        network = run.network(self.base, self.archive)
        if init == "pretrained":
            if self.pretrained is None:
                raise UserError("Expected a pre-trained network for init 'pretrained'. Got none.")
            run.start_from(network, self.pretrained)
        return network

    def _config(self, seed: int, sparsity: float) -> TrainConfig:
        """Of the training of one point: one stage."""
        recipe = self.recipe
        return replace(self.base, seed=seed, sparsity=sparsity, warmup_epochs=0, block=recipe.block, density=recipe.density,
                       scope=recipe.scope, method="random" if sparsity == 0 else "magnitude", mask_file=None)

    def _trainer(self, config: TrainConfig, folder: Path, build: Callable[[], nn.Module]) -> Trainer:
        """A trainer of the network that ``build`` gives, or of the one in the folder with its state."""
        folder.mkdir(parents=True, exist_ok=True)
        model = build()
        state, rejected = KeptStates(folder).newest(model)
        if state is not None:
            same_data.check(state, self.archive, self.base.data)
            with validating():
                model = model if isinstance(model, ScoredNetwork) else self._initial("random", config.seed)
                load_model(state, model)
        torch.manual_seed(config.seed)
        self.train_set.seed = config.seed
        trainer = Trainer(config, model.to(config.device), self.train_set, self.quick_test, folder,
                          self.report(self.base.epochs or 1))
        if trainer.states is not None:
            trainer.states.goes_on = "repeat the command, which goes on from here"
        trainer.report.line(f"{folder.relative_to(self.folder)}")
        for reason in rejected:
            trainer.report.line(str(reason))
        if state is not None:
            with validating():
                trainer.resume(state)
        return trainer

    @property
    def train_batch(self) -> int:
        return self.base.batch_size or 1

    def _test(self, network: nn.Module) -> dict[str, float]:
        """top1, top5 and mean_class over all test clips."""
        scores = predict(network.to(self.base.device), self.full_test, None, self.train_batch, self.base.workers or 0)
        return scores.metrics()

    def _record(self, folder: Path, network: nn.Module, trainer: Trainer, method: str, init: str, sparsity: float,
                seed: int, **more: Any) -> None:
        """Test, save the network, add the point to ``lottery.json``."""
        metrics, kept = self._test(network), summary(network)
        checkpoint.save(network, folder / "model.safetensors", label_names=list(self.archive.label_names), metrics=metrics,
                        sparsity=sparsity, seed=seed, protocol=run.protocol(trainer.config, self.archive),
                        mask={"method": method, **asdict(self.recipe)})
        self.points.append({
            "method": method, "init": init, "sparsity": sparsity, "seed": seed, **metrics,
            "one_clip": trainer.history[-1]["test_accuracy"], **more, "samples": len(self.full_test),
            "maskable": kept.maskable, "maskable_kept": kept.kept,
            "empty_layers": sum(layer.kept == 0 for layer in kept.layers), "epochs": len(trainer.history),
            "seconds": sum(record["seconds"] for record in trainer.history),
            "file": str((folder / "model.safetensors").relative_to(self.folder))})
        self._write()
        trainer.report.line(f"{method}, {init}, sparsity {sparsity:g}, seed {seed}: top-1 {metrics['top1']:.2%}")

    def _read(self) -> dict[str, Any]:
        """``lottery.json`` if there is one that belongs to this experiment, else an empty one."""
        base = {k: v for k, v in self.base.to_dict().items() if k not in ("device", "threads", "workers", "work_dir", "data")}
        digest = None if self.pretrained is None else hashlib.sha256(self.pretrained.read_bytes()).hexdigest()
        new: dict[str, Any] = {
            "format": 1, "data": self.archive.name, "base": base, "recipe": asdict(self.recipe),
            "pretrained": {"sha256": digest, "test": None},
            "environment": dict(run.environment(torch.device(self.base.device or "cpu"))), "points": []}
        path = self.folder / RESULT
        if not path.exists():
            return new
        with validating():
            old = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in ("format", "data") if old.get(key) != new[key]]
        usual = {"recipe": asdict(Recipe()), "base": asdict(TrainConfig())}  # of keys that came after the file was written
        changed += [key for part in ("recipe", "base") for key in new[part]
                    if old.get(part, {}).get(key, usual[part].get(key)) != new[part][key]]
        before = old.get("pretrained", {}).get("sha256")
        if digest is not None and before is not None and digest != before:
            changed.append("pretrained weights")
        if changed:
            raise UserError(f"Expected {path} to be of the same experiment. Got other {', '.join(changed)}; choose another "
                            "--out, or leave the flags as they were.")
        if before is None:
            old["pretrained"] = new["pretrained"]
        return old

    def _write(self) -> None:
        self.points.sort(key=lambda point: (point["method"], point["init"], point["sparsity"], point["seed"]))
        checkpoint.write_atomically(self.folder / RESULT, (json.dumps(self.result, indent=1) + "\n").encode())
