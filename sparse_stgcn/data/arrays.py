"""Plain arrays: a folder with one subfolder per class, or a JSON file that lists sequences."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton, layouts
from .source import Record, Source, state_of
from .storage import DAMAGED, one_line

_PARTS = ("train", "val", "test")
_KINDS = (".npy", ".json")


class ArraysSource(Source):
    """Sequences as `.npy` or `.json` arrays of (T, V, C) or (T, M, V, C).

    A folder: CLASS/NAME.npy, or train/CLASS/NAME.npy beside test/ (or val/). A JSON file: {"sequences": [{"file":
    "a.npy" or "keypoint": nested lists, "label": name or number, "split": "train", "sample": id}, ...],
    "label_names": [...], "layout": ...}; only file or keypoint and label are needed.

    Args:
        path: folder or JSON file.
        layout: skeleton, by name, file or mapping; default: the one that the JSON file names, or layout.yaml or
            layout.json in the folder. It cannot be guessed.
        order: the axes of an array, e.g. "TVC" or "CTVM"; default TMVC or TVC.
        score_channel: the third channel is the confidence of a 2D joint.
        max_persons: persons kept per sequence; default: all.
        label_names: names of the classes; default: those of the source.
        image: height and width of the image that 2D coordinates are in; (1, 1) if they are parts of it.
        fps: frames per second.

    Without a split in the source every fifth sequence of each class becomes the test split.

    Raises:
        UserError: nothing to read, a file is damaged, its form differs, or it is listed in two parts; the message names it.
    """

    def __init__(self, path: str | Path, layout: Any = None, order: str | None = None, score_channel: bool = False,
                 max_persons: int | None = None, label_names: tuple[str, ...] = (), image: tuple[int, int] | None = None,
                 fps: float | None = None) -> None:
        self.path = Path(path)
        self.order, self.has_score, self.image = order, score_channel, image
        check_order(order)
        if fps is not None and not 0 < fps < float("inf"):
            raise UserError(f"Expected fps to be a positive number. Got {fps}.")
        content: dict[str, Any] = {}
        if self.path.is_dir():
            self.entries = self._from_folder()
        else:
            content = self._manifest()
            self.entries = content["sequences"]
        if not self.entries:
            raise UserError(f"Expected .npy or .json arrays in '{path}', one folder per class. Got none.")
        self._check_files()
        layout = self._layout(content) if layout is None else layout
        if layout is None:
            raise UserError(f"Expected layout for '{path}': plain arrays do not say which joint is which. Got none; name a "
                            "layout or a YAML/JSON file.")
        self.skeleton = Skeleton.load(layout)
        self.label_names = label_names or self._names(content)
        self.numbers = {name: i for i, name in enumerate(self.label_names)}
        shapes = {self._shape(i) for i in range(len(self.entries))}
        most = max(persons for persons, _, _ in shapes)
        self.num_persons = most if max_persons is None else min(most, max_persons)
        channels = {c for _, c, _ in shapes}
        if len(channels) > 1:
            raise UserError(f"Expected all arrays of '{path}' to have the same C. Got {', '.join(map(str, sorted(channels)))}.")
        self.channels = channels.pop() - (1 if score_channel else 0)
        if image is not None and self.channels != 2:
            raise UserError(f"Expected image with arrays of 2D joints. Got C = {self.channels} in '{path}'; leave it out, or "
                            "say with score_channel that the third is a confidence.")
        self.dtype = np.result_type(np.float16, *{np.dtype(kind) for _, _, kind in shapes})
        self.info = {"source": self.path.name} | ({} if fps is None else {"fps": fps})

    def __len__(self) -> int:
        return len(self.entries)

    def fingerprint(self) -> str:
        files = [str(e.get("file", i)) for i, e in enumerate(self.entries)]
        state = state_of(self._file(entry) for entry in self.entries if "file" in entry)
        return repr((super().fingerprint(), self.order, self.image, self.label_names, files, state))

    def record(self, index: int) -> Record:
        entry = self.entries[index]
        keypoint = np.asarray(self._array(index), self.dtype)
        score = keypoint[..., 2] if self.has_score else None
        if self.has_score:
            keypoint = keypoint[..., :2]
        keypoint = keypoint[:, :self.num_persons]
        return Record(self._sample(index), self._label(entry, index), keypoint,
                      None if score is None else score[:, :self.num_persons],
                      {} if self.image is None else {"img_shape": list(self.image)})

    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        part = np.array([str(entry.get("split", "")) for entry in self.entries])
        if (part == "").all():
            label = np.array([self._label(entry, i) for i, entry in enumerate(self.entries)])
            rank = np.empty(len(label), np.int64)
            for value in np.unique(label):
                rank[label == value] = np.arange((label == value).sum())
            return {"train": rank % 5 != 4, "test": rank % 5 == 4}
        return {name: part == name for name in np.unique(part[part != ""]).tolist()}

    def _check_files(self) -> None:
        """What is in two parts of a protocol (xsub_train and xsub_val, say) would be tested on what it was trained on."""
        divided = any("split" in entry for entry in self.entries)
        first: dict[tuple[str, str], int] = {}
        for index, entry in enumerate(self.entries):
            if "keypoint" in entry:
                continue
            part = str(entry.get("split", ""))
            # In a folder NAME.npy and NAME.json are one sequence twice.
            file = entry["sample"] if self.path.is_dir() else os.path.normpath(str(entry["file"]))
            before = first.setdefault((file, part.rpartition("_")[0]), index)
            other = str(self.entries[before].get("split", ""))
            if before != index and (not divided or part != other or self.path.is_dir()):
                parts = f"{other!r} and {part!r}" if divided else "none, so that one may train and one test"
                raise UserError(f"Expected '{file}' in one part of '{self.path}'. Got sequences {before} and {index} of it, "
                                f"with split {parts}; list it once, or give both the same split.")

    def _array(self, index: int) -> np.ndarray:
        """The array of an entry as (T, M, V, C)."""
        entry, where = self.entries[index], self._where(index)
        try:
            if "keypoint" in entry:
                value = np.asarray(entry["keypoint"], np.float32)
            elif str(entry["file"]).endswith(".npy"):
                value = np.load(self._file(entry), mmap_mode="r", allow_pickle=False)
            else:
                value = np.asarray(json.loads(self._file(entry).read_text(encoding="utf-8")), np.float32)
        except DAMAGED as error:
            raise UserError(f"Expected {where} to be a readable array of numbers. Got: {one_line(error)}.") from error
        value = _in_order(value, self.order, where)
        wanted = (3,) if self.has_score else (2, 3)
        if value.shape[2] != len(self.skeleton) or value.shape[3] not in wanted:
            raise UserError(f"Expected {where} to have V = {len(self.skeleton)} and C = {' or '.join(map(str, wanted))}. Got "
                            f"V = {value.shape[2]} and C = {value.shape[3]}; name the axes with order.")
        return value

    def _shape(self, index: int) -> tuple[int, int, str]:
        value = self._array(index)
        return value.shape[1], value.shape[3], value.dtype.str if value.dtype.kind == "f" else "<f4"

    def _layout(self, content: Mapping[str, Any]) -> Any:
        """The layout that the JSON file names or has, or layout.yaml or layout.json in the folder."""
        layout = content.get("layout")
        if self.path.is_dir():
            return next((file for file in sorted(self.path.glob("layout.*")) if file.suffix in (".yaml", ".json")), None)
        if layout is None or isinstance(layout, dict) or layout in layouts():
            return layout
        return self._below(str(layout), "layout")

    def _label(self, entry: Mapping[str, Any], index: int) -> int:
        label = entry.get("label")
        if isinstance(label, str) and label in self.numbers:
            return self.numbers[label]
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.label_names):
            return label
        raise UserError(f"Expected label of {self._where(index)} to be one of {', '.join(self.label_names[:8])} or its "
                        f"number. Got {label!r}.")

    def _names(self, content: Mapping[str, Any]) -> tuple[str, ...]:
        names = content.get("label_names")
        if names is not None:
            if not isinstance(names, list) or not names:
                raise UserError(f"Expected label_names of '{self.path}' to be a list of texts. Got {names!r}.")
            return tuple(map(str, names))
        labels = [entry.get("label") for entry in self.entries]
        texts = {label for label in labels if isinstance(label, str)}
        if all(isinstance(label, str) for label in labels):
            return tuple(sorted(texts))
        numbers = [label for label in labels if isinstance(label, int) and 0 <= label < 1_000_000]
        return tuple(str(i) for i in range(max(numbers, default=-1) + 1))

    def _from_folder(self) -> list[dict[str, Any]]:
        entries = []
        for file in sorted(self.path.rglob("*")):
            parts = file.relative_to(self.path).parts
            if file.suffix in _KINDS and 2 <= len(parts) <= 3:
                sample = "/".join(parts)[:-len(file.suffix)]
                entry: dict[str, Any] = {"file": str(Path(*parts)), "label": parts[-2], "sample": sample}
                if len(parts) == 3:
                    if parts[0] not in _PARTS:
                        raise UserError(f"Expected folders {', '.join(_PARTS)} above those of the classes in '{self.path}'. "
                                        f"Got '{parts[0]}'.")
                    entry["split"] = parts[0]
                entries.append(entry)
        return entries

    def _manifest(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"Expected readable JSON in '{self.path}'. Got: {one_line(error)}.") from error
        sequences = content.get("sequences") if isinstance(content, dict) else None
        if not isinstance(sequences, list) or not all(
                isinstance(entry, dict) and ("file" in entry or "keypoint" in entry) for entry in sequences):
            raise UserError(f"Expected a list sequences in '{self.path}' whose entries have file or keypoint. Got another "
                            "form.")
        return content

    def _file(self, entry: Mapping[str, Any]) -> Path:
        return self._below(str(entry["file"]), "file of each sequence")

    def _below(self, name: str, what: str) -> Path:
        """A file that the list names. One from a stranger must not make us read whatever else lies on this machine."""
        name = os.path.normpath(name)
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir or "\0" in name:
            raise UserError(f"Expected {what} in '{self.path}' to be a path below its folder. Got {name!r:.80}; "
                            "move the list above its files.")
        return (self.path if self.path.is_dir() else self.path.parent) / name

    def _sample(self, index: int) -> str:
        entry = self.entries[index]
        return str(entry.get("sample", entry.get("file", f"{index:06d}")))

    def _where(self, index: int) -> str:
        return f"sequence {index} ('{self._sample(index)}') of '{self.path}'"


def read_array(path: Path, order: str | None = None) -> np.ndarray | None:
    """The sequence (T, M, V, C) of one ``.npy`` file, or of a ``.json`` file of nested lists; None if that lists sequences.

    Raises:
        UserError: not an array of numbers with these axes; the message names the file.
    """
    check_order(order)
    try:
        if path.suffix == ".npy":
            value = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return None
            value = np.asarray(content, np.float32)
    except DAMAGED as error:
        raise UserError(f"Expected '{path}' to be a readable array of numbers. Got: {one_line(error)}.") from error
    return _in_order(value, order, f"'{path}'")


def _in_order(value: np.ndarray, order: str | None, where: str) -> np.ndarray:
    """``value`` as (T, M, V, C); ``order`` names its axes."""
    if not isinstance(value, np.ndarray):
        raise UserError(f"Expected {where} to be one array. Got a file of several, as .npz files are.")
    order = order or ("TMVC" if value.ndim == 4 else "TVC")
    if value.ndim != len(order) or value.dtype.kind not in "fiu" or not value.size:
        raise UserError(f"Expected {where} to be numbers with the axes {' '.join(order)}. Got {value.dtype} of shape "
                        f"{value.shape}; name the axes with order.")
    if "M" not in order:
        value, order = value[..., None], order + "M"
    return value.transpose([order.index(axis) for axis in "TMVC"])


def check_order(order: str | None) -> None:
    if order is not None and (set(order) not in ({"T", "V", "C"}, {"T", "M", "V", "C"}) or len(set(order)) != len(order)):
        raise UserError(f"Expected order to name the axes T, M, V and C once each, M if there is one. Got {order!r}.")
