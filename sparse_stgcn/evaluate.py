"""python -m sparse_stgcn.evaluate D: test a trained network and write its scores."""
from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .config import TrainConfig
from .errors import UserError, run, validating
from .options import OptionalInt, OptionalStr, check_device, check_part
from .work_dir import remedy

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
    """Evaluation protocol of the archive, in place of the split or fold of the training."""
    fold: OptionalInt = None
    """Fold to test on, in place of the split or fold of the training."""
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
    out = Path(asked.out or Path(asked.work_dir) / "scores.npz")
    check_out(out)

    from .checkpoint import load, read_metadata
    from .scores import predict
    from .training import run as training

    whole = training.open_whole(config)
    archive = training.with_part(whole, config)
    seen = seen_in_training(archive, whole, config, asked.work_dir)
    if seen:
        warnings.warn(f"{seen} of the {len(archive.members('test'))} sequences of split {archive.info['split']} are in the "
                      "training split of the run; its accuracy on them says nothing about new ones", stacklevel=2)
    config = training.resolve(config, archive)
    training.set_up_torch(config)
    with validating():
        file = Path(asked.work_dir) / "model.safetensors"
        model = load(file, config.device or "cpu")
        names = read_metadata(file)["meta"].get("label_names") or ()
    check_fit(model, archive, names)
    dataset = training.test_set(config, archive)
    scores = predict(model, dataset, dataset.sample_ids, config.batch_size or 32, config.workers or 0,
                     training.protocol(config, archive))
    metrics = scores.metrics()
    print(f"protocol  {archive.name}, split {archive.info.get('split')}, stream {config.stream}, "
          f"{config.eval_clips} clips of {config.clip_len} frames, {len(scores.label)} sequences")
    print(f"test      top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, mean class "
          f"{metrics['mean_class']:.2%}")
    with validating("--out"):
        scores.save(out)
    print(f"scores    {out}")
    return 0


def check_out(out: Path) -> None:
    """Check that the score file can be written, as it costs a whole test to find that out in the end.

    Raises:
        UserError: it cannot.
    """
    if not out.parent.is_dir():
        raise UserError(f"Expected --out to be in a directory that exists. Got {out}; create {out.parent}.")
    if out.is_dir():
        raise UserError(f"Expected --out to be a file. Got the directory {out}; name a file, such as {out / 'scores.npz'}.")
    try:
        tempfile.NamedTemporaryFile(prefix=f".{out.name}.", suffix=".part", dir=out.parent).close()
    except OSError as error:
        raise UserError(f"Expected --out to be a file that can be written. Got {out}: {error.strerror or error}; name "
                        "another.") from error


def merge(asked: EvaluateConfig) -> TrainConfig:
    """The run's own configuration with what the command line changes.

    Raises:
        UserError: no finished run there, a value out of range, or both a split and a fold.
    """
    folder = Path(asked.work_dir)
    check_part(asked.split, asked.fold)
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"Expected work_dir to hold a finished run. Got {folder} without {name}; "
                            f"{remedy(folder, 'work_dir')}")
    names = {"data": "data", "split": "split", "fold": "fold", "layout": "layout", "clips": "eval_clips",
             "batch_size": "batch_size", "device": "device", "threads": "threads", "workers": "workers"}
    changed = {names[k]: v for k, v in vars(asked).items() if k in names and v is not None}
    config = TrainConfig.read(folder / "config.yaml")
    if asked.data is not None:
        # Another archive has splits, folds and a layout of its own.
        config = replace(config, split=None, fold=None, layout=None, sequences=None)
    if asked.split is not None or asked.fold is not None:
        # Either replaces what the run was tested on, whichever of the two that was.
        config = replace(config, split=None, fold=None)
    if asked.device is None and config.device is not None and config.device != "cpu":
        try:
            check_device(config.device)
        except UserError:
            config.device = None
    config = replace(config, **changed)
    config.validate()
    return config


def seen_in_training(archive: Archive, whole: Archive, config: TrainConfig, work_dir: str) -> int:
    """How many of the sequences to test on the run in ``work_dir`` was trained on; 0 where the data are not the run's own.

    Args:
        archive: with the split to test on.
        whole: the same with all its splits.
        config: see ``merge``.
    """
    from .training.run import with_part

    trained = TrainConfig.read(Path(work_dir) / "config.yaml")
    paths = [data and Path(data).resolve() for data in (config.data, trained.data)]
    if paths[0] != paths[1]:
        return 0
    try:
        return int((with_part(whole, trained).train & archive.splits["test"]).sum())
    except UserError:  # the archive has changed since, and the run's split is gone
        return 0


def check_fit(model: Recognizer, archive: Archive, label_names: Sequence[str] = ()) -> None:
    """Check that the archive has the joints and classes that the network was trained on, in the same order.

    Args:
        label_names: of the network's file; names that are numbers, there or in the archive, say nothing.

    Raises:
        UserError: it has others.
    """
    joints, classes = len(model.backbone.skeleton), model.num_classes
    found = len(archive.skeleton), archive.num_classes
    if found != (joints, classes):
        raise UserError(f"Expected --data with {joints} joints and {classes} classes, as the network was "
                        f"trained on. Got {found[0]} joints and {found[1]} classes.")
    for what, ours, theirs, fix in (
            ("class", label_names, archive.label_names, "convert it with the label names of the training"),
            ("joint", model.backbone.skeleton.joints, archive.skeleton.joints, "name the skeleton of the training, --layout")):
        if named(ours) and named(theirs):
            for number, (own, other) in enumerate(zip(ours, theirs, strict=False)):
                if str(own) != str(other):
                    raise UserError(f"Expected --data with {what} {number} {str(own)!r}, as the network was trained on. Got "
                                    f"{str(other)!r}; give an archive with the same order, or {fix}.")


def named(names: Sequence[str]) -> bool:
    """Whether these are names, not numbers that stand for them (0, 1, ... or joint0, joint_1, ...)."""
    return any(not str(name).lower().removeprefix("joint").strip(" _-").isdigit() for name in names)


if __name__ == "__main__":
    sys.exit(run(main))
