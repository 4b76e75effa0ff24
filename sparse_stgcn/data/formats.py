"""Which reader belongs to a file or folder."""
from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, one_of
from .arrays import ArraysSource
from .ctrgcn import CtrgcnSource
from .kinetics import K400Source, KineticsSource
from .ntu_raw import NtuRawSource
from .pyskl import PysklSource
from .source import Source

FORMATS = ("auto", "archive", "pyskl", "ctrgcn", "ntu", "kinetics", "k400", "arrays")
# Format -> its reader, and which `Options` that takes.
_READERS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    "pyskl": (PysklSource, ("layout", "max_persons", "label_names")),
    "ctrgcn": (CtrgcnSource, ("layout", "label_names")),
    "ntu": (NtuRawSource, ("ignore", "label_names")),
    "kinetics": (KineticsSource, ("layout", "max_persons", "label_names")),
    "k400": (K400Source, ("poses", "layout", "max_persons", "label_names")),
    "arrays": (ArraysSource, ("layout", "order", "score_channel", "max_persons", "label_names", "image", "fps")),
}
# An archive needs no reader; `Archive.open` takes its layout.
TAKES = {"archive": ("layout",), **{kind: takes for kind, (_, takes) in _READERS.items()}}


@dataclass(frozen=True)
class Options:
    """What a reader may be told; each takes what it knows (`TAKES`), the rest is without effect.

    Attributes:
        layout: skeleton, by name, file or mapping.
        max_persons: persons kept per sequence.
        label_names: names of the classes.
        poses: folder of the pose files of a K400 pickle.
        ignore: list of NTU samples to leave out.
        order, score_channel: axes of plain arrays, and whether their third channel is a confidence.
        image, fps: height and width of the image that plain arrays of 2D joints are in, and their frames per second.
    """

    layout: Any = None
    max_persons: int | None = None
    label_names: tuple[str, ...] = ()
    poses: str | None = None
    ignore: str | None = None
    order: str | None = None
    score_channel: bool = False
    image: tuple[int, int] | None = None
    fps: float | None = None


def detect(path: str | Path) -> str:
    """The format of `path` by its name and the names inside it.

    Raises:
        UserError: it does not exist or looks like none of the formats.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"Expected IN to be a file or folder. Got '{path}', which does not exist.")
    if path.is_dir():
        if (path / "meta.json").is_file():
            return "archive"
        if next(path.rglob("*.skeleton"), None) is not None:
            return "ntu"
        if next(path.rglob("*_label.json"), None) is not None or next(path.glob("kinetics*"), None) is not None:
            return "kinetics"
        if next((file for kind in ("*.npy", "*.json") for file in path.rglob(kind)), None) is not None:
            return "arrays"
    elif path.suffix in (".pkl", ".pickle"):
        return "pyskl"
    elif path.suffix == ".json":
        return "arrays"
    elif path.suffix == ".npz":
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if any(name.startswith(("x_train", "y_train")) for name in file.namelist()):
                    return "ctrgcn"
        return "archive"
    raise UserError(f"Expected IN to be one of the formats {', '.join(FORMATS[1:])}. Got '{path}', which looks like none of "
                    "them; name its format.")


def open_source(path: str | Path, format: str = "auto", options: Options = Options()) -> Source:
    """A reader for `path`; "auto" looks at the names. Native archives and `.npz` files need none: `Archive.open`."""
    one_of("format", format, FORMATS)
    kind = detect(path) if format == "auto" else format
    if not Path(path).exists():
        raise UserError(f"Expected IN to be a file or folder. Got '{path}', which does not exist.")
    if kind not in _READERS:
        raise UserError(f"Expected a format that needs a reader. Got format={kind!r}; an archive is opened as it is.")
    reader, takes = _READERS[kind]
    return reader(path, **{name: getattr(options, name) for name in takes})
