"""Sequences to predict, from files that need no labels: arrays, archives, PYSKL pickles, NTU text files, folders of them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from .archive import Archive
from .arrays import read_array
from .ntu_raw import arrange, read_skeleton
from .preparation import IMAGE
from .pyskl import PysklSource
from .source import LeftOut

__all__ = ["SUFFIXES", "Sample", "find_files", "open_samples"]

SUFFIXES = (".npy", ".npz", ".pkl", ".pickle", ".skeleton")


@dataclass(frozen=True)
class Sample:
    """One sequence: keypoint (M, T, V, C) or (T, V, C), score (M, T, V), image (height, width), and the layout of the file."""

    keypoint: np.ndarray
    score: np.ndarray | None = None
    image: tuple[float, float] = IMAGE
    layout: Skeleton | None = None


# Names of the sequences of a file, each with the function that reads it.
Samples = Sequence[tuple[str, Callable[[], Sample]]]


def find_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The files that ``paths`` mean: an archive is one, another folder stands for all in it that can be read, archives too.

    Raises:
        UserError: a path does not exist, or a folder has nothing to read.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"Expected files or folders to predict. Got '{path}', which does not exist.")
        if path.is_dir() and not (path / "meta.json").is_file():
            found = sorted(_below(path))
            if not found:
                raise UserError(f"Expected an archive, or files {', '.join(SUFFIXES)} in '{path}'. Got none.")
            yield from found
        else:
            yield path


def _below(folder: Path) -> Iterator[Path]:
    """Archives, and files that can be read outside of them; what is hidden, a half-written archive say, is left out."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not (path / "meta.json").is_file():
            yield from _below(path)
        elif path.is_dir() or path.suffix in SUFFIXES:
            yield path


def open_samples(path: Path, layout: Any = None, order: str | None = None, image: tuple[float, float] = IMAGE) -> Samples:
    """The sequences of a file, none of them read yet.

    Args:
        path: of ``find_files``.
        layout: of the file, where it does not name it.
        order, image: axes of plain arrays, default TMVC or TVC as in ``ArraysSource``, and the image that 2D joints are in.

    Raises:
        UserError: the file is damaged, or of no known kind.
    """
    if path.suffix == ".npy":
        return [(path.stem, lambda: Sample(_array(path, order), image=image))]
    if path.suffix == ".skeleton":
        return [(path.stem, lambda: _skeleton_file(path))]
    if path.suffix in (".pkl", ".pickle"):
        return _pickle(path, layout)
    if path.is_dir() or path.suffix == ".npz":
        return _archive(path, layout)
    raise UserError(f"Expected a file {', '.join(SUFFIXES)} or an archive. Got '{path}'.")


def _array(path: Path, order: str | None) -> np.ndarray:
    """The sequence of an .npy file as (M, T, V, C)."""
    value = read_array(path, order)
    assert value is not None  # as it is for lists of sequences, which are .json
    return value.swapaxes(0, 1)


def _skeleton_file(path: Path) -> Sample:
    frames, tracks = read_skeleton(path)
    if not tracks:
        raise UserError(f"Expected a body in '{path}'. Got none.")
    return Sample(arrange(tracks, frames).swapaxes(0, 1), layout=Skeleton.load("nturgb+d"))


def _archive(path: Path, layout: Any) -> Samples:
    archive = Archive.open(path, layout)
    shapes = archive.fields.get("img_shape")

    def read(index: int) -> Sample:
        keypoint, score = archive.read(index)
        image = IMAGE if shapes is None else (float(shapes[index][0]), float(shapes[index][1]))
        return Sample(keypoint, score, image, archive.skeleton)

    return [(str(name), lambda index=index: read(index)) for index, name in enumerate(archive.sample_ids)]  # type: ignore[misc]


def _pickle(path: Path, layout: Any) -> Samples:
    source = PysklSource(path, layout)

    def read(index: int) -> Sample:
        record = source.record(index)
        if isinstance(record, LeftOut):
            raise UserError(f"Expected something to predict in '{record.sample}'. Got {record.reason}.")
        score = None if record.score is None else record.score.swapaxes(0, 1)
        return Sample(record.keypoint.swapaxes(0, 1), score, record.fields.get("img_shape", IMAGE), source.skeleton)

    names = [str(a.get("frame_dir", a.get("filename", f"{i:06d}"))) for i, a in enumerate(source.annotations)]
    return [(name, lambda index=index: read(index)) for index, name in enumerate(names)]  # type: ignore[misc]
