"""python -m sparse_stgcn.convert IN OUT: make a native archive from other formats."""
from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from .data.archive import Archive
from .data.formats import FORMATS, TAKES, Options, detect, open_source
from .data.storage import check_target
from .data.writer import write_archive
from .errors import UserError, one_of, run, validating
from .options import OptionalFloat, OptionalInt, OptionalStr, flag, image_size

__all__ = ["ConvertConfig", "main"]

_PARTS = 2.0  # coordinates up to this are hardly pixels
_AT_ONCE = 1 << 16  # frames


@dataclass
class ConvertConfig:
    """Make an archive (a directory of memory-mapped arrays) from another format.

    A conversion that was stopped continues where it was when it is started again.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """File or folder to convert."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Archive directory to write."""
    format: str = "auto"
    """Format of IN: auto, archive, pyskl, ctrgcn, ntu, kinetics, k400 or arrays."""
    layout: OptionalStr = None
    """Skeleton layout: a name (nturgb+d, coco, ...) or a YAML/JSON file. Default: by the number of joints."""
    max_persons: OptionalInt = None
    """Persons kept per sequence. Default: all of the source, at most 2."""
    label_names: OptionalStr = None
    """Text file with one class name per line."""
    poses: OptionalStr = None
    """Folder with the pose files that a K400 pickle refers to."""
    ignore: OptionalStr = None
    """Text file with the NTU samples to leave out, in place of the rule."""
    order: OptionalStr = None
    """Axes of plain arrays, e.g. CTVM. Default: TMVC or TVC."""
    score_channel: bool = False
    """The third channel of plain arrays is the confidence of a 2D joint."""
    image: OptionalStr = None
    """Height x width of the image that 2D plain arrays are in, e.g. 720x1280; 1x1: they are parts of it. Default: 1080x1920."""
    fps: OptionalFloat = None
    """Frames per second of plain arrays. Default: not known."""
    divide: OptionalStr = None
    """Field of an archive that divides every class: with a field of V values, label becomes label * V + index of the value."""
    overwrite: bool = False
    """Replace OUT if it is an archive."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    config = tyro.cli(ConvertConfig, args=argv, prog="python -m sparse_stgcn.convert")
    with validating():
        archive, total = _convert(config)
    print(archive)
    left_out = archive.info.get("left_out", {})
    if left_out:
        print(f"{len(left_out)} of {total} sequences left out; meta.json says which and why")
    return 0


def _convert(config: ConvertConfig) -> tuple[Archive, int]:
    """The new archive, and how many sequences the source has."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    check_target(Path(config.out), config.overwrite)
    if config.max_persons is not None and config.max_persons < 1:
        raise UserError(f"Expected max_persons of at least 1. Got {config.max_persons}.")
    one_of("format", config.format, FORMATS)
    kind = detect(config.source) if config.format == "auto" else config.format
    _check_taken(config, kind)
    if kind == "archive":
        archive = Archive.open(config.source, config.layout)
        if config.divide is not None:
            archive = archive.divided(config.divide)
        return Archive.open(archive.save(config.out, config.overwrite)), len(archive)
    if config.divide is not None:
        raise UserError(f"Expected --divide with an archive, whose fields it names. Got format {kind}; convert without it, "
                        "then convert the archive.")
    names = read_names(config.label_names) if config.label_names else ()
    options = Options(config.layout, config.max_persons, names, config.poses, config.ignore, config.order,
                      config.score_channel, image_size(config.image) if config.image is not None else None, config.fps)
    source = open_source(config.source, kind, options)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("sequences", total=len(source))
        archive = write_archive(source, config.out, config.overwrite, lambda done: bar.update(task, completed=done))
    if kind == "arrays" and config.image is None and archive.is_2d and _within(archive.keypoint, _PARTS):
        warnings.warn("Expected pixels of an image of 1080x1920, as --image is not given. Got 2D coordinates of at most "
                      f"{_PARTS:g}; if they are parts of the image, convert again with --image 1x1, otherwise with its "
                      "HEIGHTxWIDTH.", stacklevel=2)
    return archive, len(source)


def _within(keypoint: np.ndarray, limit: float) -> bool:
    """Whether no coordinate is farther than `limit` from 0; lost joints do not count."""
    return not any((np.abs(keypoint[first:first + _AT_ONCE]) > limit).any() for first in range(0, len(keypoint), _AT_ONCE))


def _check_taken(config: ConvertConfig, kind: str) -> None:
    """Raise a UserError for the first option that a reader of format `kind` would ignore."""
    for name in (option.name for option in fields(Options)):
        if getattr(config, name) not in (None, False) and name not in TAKES[kind]:
            able = ", ".join(other for other, takes in TAKES.items() if name in takes)
            raise UserError(f"Expected {flag(name)} with a format that takes it: {able}. Got format {kind}; leave it out, or "
                            "name another --format.")


def read_names(path: str) -> tuple[str, ...]:
    """Class names, one per line; empty lines do not count."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Expected label_names to be a readable text file. Got '{path}'.") from error
    return tuple(name for name in names if name)


if __name__ == "__main__":
    sys.exit(run(main))
