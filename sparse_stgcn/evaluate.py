"""python -m sparse_stgcn.evaluate D: test a trained network and write its scores."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .config import TrainConfig
from .errors import UserError, run, validating
from .options import OptionalInt, OptionalStr, check_device

if TYPE_CHECKING:
    from .data.archive import Archive
    from .recognizer import Recognizer

__all__ = ["EvaluateConfig", "main"]


@dataclass
class EvaluateConfig:
    """Test the network of a work directory: softmax of each clip, mean over the clips.

    Data, split and stream are those of the training unless a flag says otherwise.
    """

    work_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="D")]
    """Work directory of a finished run."""
    data: OptionalStr = None
    """Archive to test on."""
    split: OptionalStr = None
    """Evaluation protocol of the archive."""
    fold: OptionalInt = None
    """Fold to test on."""
    layout: OptionalStr = None
    """Skeleton layout of the archive."""
    clips: OptionalInt = None
    """Clips per sequence."""
    batch_size: OptionalInt = None
    """Clips per forward pass."""
    device: OptionalStr = None
    """cpu, cuda or cuda:N."""
    threads: OptionalInt = None
    """CPU threads."""
    workers: OptionalInt = None
    """Processes that load data."""
    out: OptionalStr = None
    """Score file. Default: scores.npz in the work directory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(EvaluateConfig, args=argv, prog="python -m sparse_stgcn.evaluate")
    config = merge(asked)

    from .checkpoint import load
    from .scores import predict
    from .training import run as training

    out = Path(asked.out or Path(asked.work_dir) / "scores.npz")
    if not out.parent.is_dir():
        raise UserError(f"Expected --out to be in a directory that exists. Got {out}; create {out.parent}.")
    archive = training.open_archive(config)
    config = training.resolve(config, archive)
    training.set_up_torch(config)
    with validating():
        model = load(Path(asked.work_dir) / "model.safetensors", config.device or "cpu")
    check_fit(model, archive)
    dataset = training.test_set(config, archive)
    scores = predict(model, dataset, dataset.sample_ids, config.batch_size or 32, config.workers or 0,
                     training.protocol(config, archive))
    scores.save(out)
    metrics = scores.metrics()
    print(f"protocol  {archive.name}, split {archive.info.get('split')}, stream {config.stream}, "
          f"{config.eval_clips} clips of {config.clip_len} frames, {len(scores.label)} sequences")
    print(f"test      top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, mean class "
          f"{metrics['mean_class']:.2%}")
    print(f"scores    {out}")
    return 0


def merge(asked: EvaluateConfig) -> TrainConfig:
    """The run's own configuration with what the command line changes.

    Raises:
        UserError: no finished run there, or a value out of range.
    """
    folder = Path(asked.work_dir)
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"Expected work_dir to hold a finished run. Got {folder} without {name}; train "
                            f"first, or finish the run with python -m sparse_stgcn.train --resume {folder}.")
    names = {"data": "data", "split": "split", "fold": "fold", "layout": "layout", "clips": "eval_clips",
             "batch_size": "batch_size", "device": "device", "threads": "threads", "workers": "workers"}
    changed = {names[k]: v for k, v in vars(asked).items() if k in names and v is not None}
    config = TrainConfig.read(folder / "config.yaml")
    if asked.data is not None:
        # Another archive has splits, folds and a layout of its own.
        config = replace(config, split=None, fold=None, layout=None, sequences=None)
    if asked.device is None and config.device is not None and config.device != "cpu":
        try:
            check_device(config.device)
        except UserError:
            config.device = None
    config = replace(config, **changed)
    config.validate()
    return config


def check_fit(model: Recognizer, archive: Archive) -> None:
    """Check that the archive has the joints and classes that the network was trained on.

    Raises:
        UserError: it has others.
    """
    joints, classes = len(model.backbone.skeleton), model.num_classes
    found = len(archive.skeleton), archive.num_classes
    if found != (joints, classes):
        raise UserError(f"Expected --data with {joints} joints and {classes} classes, as the network was "
                        f"trained on. Got {found[0]} joints and {found[1]} classes.")


if __name__ == "__main__":
    sys.exit(run(main))
