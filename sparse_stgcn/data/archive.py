"""Archive: labelled skeleton sequences as flat arrays, one after another, memory-mapped from disk."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from . import storage
from .protocols import resolve_protocol

FORMAT = "sparse-stgcn-archive"
VERSION = 1
_PER_FRAME = ("keypoint", "score")
_INFO = ("fps", "unit", "up", "protocol", "source")


@dataclass(frozen=True, eq=False)
class Archive:
    """N labelled sequences of M persons with V joints and C coordinates.

    Attributes:
        keypoint: (F, M, V, C) float16, float32 or float64: all frames of all sequences, one after another; a person
            who is not there is zeros. Usually a memory map.
        offset: (N + 1,) int64: sequence i is `keypoint[offset[i]:offset[i + 1]]`.
        label: (N,) int64, 0-based.
        skeleton: joints and edges; V of them.
        label_names: one name per class.
        splits: name -> (N,) bool, True = the sequence belongs to it ("train", "test", "xsub_train", ...).
        score: (F, M, V) confidence of 2D joints, or None.
        fields: further arrays with one row per sequence: "sample" (ids), "subject", "view", "fold", "img_shape" ...
        info: further scalars and texts: "fps", "unit", "up", "protocol", "source", "finite".
        name, path: what the archive is called and where it lies (None in memory).
    """

    keypoint: np.ndarray
    offset: np.ndarray
    label: np.ndarray
    skeleton: Skeleton
    label_names: tuple[str, ...] = ()
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)
    score: np.ndarray | None = None
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    name: str = "archive"
    path: Path | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for key in ("offset", "label"):
            value = np.asarray(getattr(self, key))
            if value.dtype.kind not in "iu":
                raise UserError(f"Expected {key} of archive '{self.name}' to hold integers. Got {value.dtype}; "
                                "save it as int64.")
            put(self, key, value.astype(np.int64))
        if not self.label_names and self.label.size:
            put(self, "label_names", tuple(str(i) for i in range(max(0, int(self.label.max())) + 1)))
        put(self, "label_names", tuple(str(name) for name in self.label_names))
        _check(self)

    # ---- opening and saving ----------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, layout: str | Path | Mapping[str, Any] | Skeleton | None = None) -> Archive:
        """Open a native archive (a directory) or an `.npz` file with the same keys.

        Arrays on disk are memory-mapped; so is an array that is stored uncompressed in an `.npz`. `layout` names the
        skeleton if the file does not hold `joint_names`, `edges` and `root`, or replaces it. Beside `train`, (N,) bool, the
        test split is `test` or else `val` if that is (N,) bool, too, and all sequences that do not train if neither is.

        Raises:
            UserError: nothing there, a key is missing, or the arrays do not fit together; the message names the key.
        """
        path = Path(path)
        if path.is_dir():
            arrays, meta = storage.read_directory(path, FORMAT, VERSION)
        elif path.is_file():
            arrays, meta = storage.read_npz(path), {}
        else:
            raise UserError(f"Expected data to be an archive directory or an .npz file. Got '{path}', which does "
                            "not exist.")
        return _assemble(cls, path, arrays, meta, layout)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write a native archive: a directory with one `.npy` per array and `meta.json`.

        It is written under a temporary name and renamed, so that a directory with the final name is complete.
        """
        path = Path(path)
        arrays: dict[str, np.ndarray] = {"keypoint": self.keypoint, "offset": self.offset, "label": self.label}
        if self.score is not None:
            arrays["score"] = self.score
        arrays |= {f"split_{name}": mask for name, mask in self.splits.items()}
        arrays |= {f"field_{name}": value for name, value in self.fields.items()}
        finite = bool(self.info.get("finite", False)) or self.first_not_finite() is None
        with storage.directory_in_progress(path, overwrite) as folder:
            for name, value in arrays.items():
                np.save(folder / f"{name}.npy", value, allow_pickle=False)
            storage.write_meta(folder, self.meta() | {"info": {**self.info, "finite": finite}})
        return path

    def meta(self) -> dict[str, Any]:
        """What `meta.json` says besides the arrays."""
        return {"format": FORMAT, "version": VERSION, "name": self.name, "label_names": list(self.label_names),
                "skeleton": self.skeleton.to_dict(), "info": dict(self.info)}

    # ---- reading ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index` as a view, (T, M, V, C)."""
        start, stop = self._frames(index)
        return self.keypoint[start:stop]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Sequence `index` as copies in the order of the transforms: keypoint (M, T, V, C), score (M, T, V) or None.

        Pages of a memory map that were read are handed back to the system now and then, so that the resident
        memory stays small however large the archive is.
        """
        start, stop = self._frames(index)
        keypoint = np.array(self.keypoint[start:stop].swapaxes(0, 1), order="C", subok=False)
        score = None
        if self.score is not None:
            score = np.array(self.score[start:stop].swapaxes(0, 1), order="C", subok=False)
        storage.account(self.keypoint, keypoint.nbytes)
        if score is not None:
            storage.account(self.score, score.nbytes)
        return keypoint, score

    def _frames(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected index below {len(self)}, the number of sequences. Got {index}.")
        index %= len(self)
        return int(self.offset[index]), int(self.offset[index + 1])

    @property
    def lengths(self) -> np.ndarray:
        """Frames of every sequence, (N,)."""
        return np.diff(self.offset)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def num_persons(self) -> int:
        """M."""
        return int(self.keypoint.shape[1])

    @property
    def is_2d(self) -> bool:
        """Image coordinates: two channels, or scores beside them."""
        return self.keypoint.shape[-1] == 2

    @property
    def sample_ids(self) -> np.ndarray:
        """(N,) text that names every sequence: the field "sample", or the position."""
        if "sample" in self.fields:
            return self.fields["sample"].astype(str)
        return np.array([f"{i:06d}" for i in range(len(self))])

    # ---- splits ----------------------------------------------------------------------------------------------

    @property
    def train(self) -> np.ndarray:
        """(N,) bool: the training sequences of the chosen protocol (see `with_split`)."""
        return (self if {"train", "test"} <= set(self.splits) else self.with_split()).splits["train"]

    def with_split(self, protocol: str | None = None) -> Archive:
        """The same archive whose `splits` are "train" and "test" of one protocol.

        `protocol` is "xsub", "xview", "xset", a full name such as "ntu60_xsub", "k400" or "gym", "fold0" (that fold is
        the test), or None if the archive holds one protocol only.

        Raises:
            UserError: no such protocol, one of its parts is empty, or a sequence is in both.
        """
        name, train, test = resolve_protocol(self.splits, self.fields.get("fold"), protocol, self.name)
        both = np.flatnonzero(train & test)
        if both.size:
            raise UserError(f"Expected no sequence in both the training and the test part of split {name!r} of archive "
                            f"'{self.name}'. Got {both.size} in both, '{self.sample_ids[both[0]]}' first; take each out of one "
                            "of them.")
        return replace(self, splits={"train": train, "test": test}, info={**self.info, "split": name})

    def fold(self, k: int) -> Archive:
        """Cross validation: fold `k` is the test split, the rest the training split."""
        return self.with_split(f"fold{k}")

    def divided(self, key: str) -> Archive:
        """The same sequences with every class divided by a field of V values: label * V + index of the value.

        A class of which some value has no sequence is an error where a network is trained, not here.
        """
        if key not in self.fields:
            raise UserError(f"Expected a field of archive '{self.name}' to divide its classes by, one of "
                            f"{', '.join(self.fields) or '(none)'}. Got {key!r}.")
        values, index = np.unique(self.fields[key], return_inverse=True)
        names = tuple(f"{name}, {key} {value}" for name in self.label_names for value in values.tolist())
        return replace(self, label=self.label * len(values) + index.reshape(-1), label_names=names,
                       info={**self.info, "divided": key})

    def members(self, split: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """Indices of the sequences of a split, by its name, a mask (N,) or a list of indices."""
        if isinstance(split, str):
            if split not in self.splits:
                raise UserError(f"Expected split to be one of {', '.join(self.splits) or '(none)'} in archive "
                                f"'{self.name}'. Got split={split!r}.")
            return np.flatnonzero(self.splits[split])
        chosen = np.asarray(split)
        if chosen.dtype == bool and chosen.shape == (len(self),):
            return np.flatnonzero(chosen)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or (
                chosen.size and (chosen.min() < 0 or chosen.max() >= len(self))):
            raise UserError(f"Expected split to be a name, a mask of {len(self)} or indices below {len(self)}. "
                            f"Got {chosen.dtype} of shape {chosen.shape}.")
        return chosen.astype(np.int64)

    def check_classes(self, split: str | Sequence[int] | np.ndarray = "train") -> None:
        """Raise a UserError if a class has no sequence in `split`: a classifier could never learn it."""
        members = self.members(split)
        empty = np.flatnonzero(np.bincount(self.label[members], minlength=self.num_classes)[: self.num_classes] == 0)
        if empty.size:
            which = f"{empty.size} of {self.num_classes} classes are empty" if empty.size > 1 else "one class is empty"
            raise UserError(
                f"Expected every class of archive '{self.name}' in the training split. Got no sequence of class "
                f"{empty[0]} ({self.label_names[empty[0]]}; {which}); choose another split or renumber the labels.")

    def first_not_finite(self) -> int | None:
        """The first sequence with a NaN or infinite coordinate or score, or None."""
        for name in _PER_FRAME:
            values = getattr(self, name)
            if values is None:
                continue
            rows = max(1, (1 << 22) // max(1, int(np.prod(values.shape[1:]))))
            for start in range(0, len(values), rows):
                good = np.isfinite(values[start:start + rows])
                storage.account(values, good.size * values.dtype.itemsize)
                if not good.all():
                    frame = start + int(np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))[0])
                    return int(np.searchsorted(self.offset, frame, side="right")) - 1
        return None

    def check_finite(self) -> None:
        """Raise a UserError that names the first sequence with a coordinate that is NaN or infinite."""
        if self.info.get("finite"):
            return
        bad = self.first_not_finite()
        if bad is not None:
            raise UserError(
                f"Expected finite coordinates in keypoint of archive '{self.name}'. Got NaN or infinity in sequence "
                f"{bad} ('{self.sample_ids[bad]}'); repair it, or set missing to interpolate, zero or drop.")

    def __repr__(self) -> str:
        _, m, v, c = self.keypoint.shape
        parts = ", ".join(f"{name} {int(mask.sum())}" for name, mask in self.splits.items())
        return (f"Archive('{self.name}', {len(self)} sequences, {self.num_classes} classes, M={m}, V={v}, C={c}, "
                f"{self.keypoint.dtype}; {parts or 'no split'})")

    # A worker process opens the same files again instead of receiving their content.
    def __getstate__(self) -> dict[str, Any]:
        return {key: storage.describe(value) for key, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, storage.restore(value))


def _assemble(
    cls: type[Archive], path: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any],
    layout: str | Path | Mapping[str, Any] | Skeleton | None,
) -> Archive:
    name = str(meta.get("name", path.stem))
    for key in ("keypoint", "offset", "label"):
        if key not in arrays:
            raise UserError(f"Expected the keys keypoint, offset and label in archive '{path}'. Got no {key!r} among "
                            f"{', '.join(sorted(arrays)) or 'no keys'}; add it.")
    count = len(arrays["label"]) if arrays["label"].ndim else 0
    splits: dict[str, np.ndarray] = {}
    fields: dict[str, np.ndarray] = {}
    info = dict(meta.get("info", {}))
    # Beside train, these are splits as well; elsewhere they are fields like any other.
    parts = [key for key in ("test", "val") if "train" in arrays and key in arrays and arrays[key].dtype == bool
             and arrays[key].shape == (count,)]
    for key, value in arrays.items():
        if key in ("keypoint", "score", "offset", "label", "label_names", "joint_names", "edges", "root"):
            continue
        if key == "train":
            splits |= {"train": value} if parts else {"train": value, "test": ~value if value.dtype == bool else value}
        elif key in parts:
            splits["test" if key == parts[0] else key] = value
        elif key.startswith("split_"):
            splits[key.removeprefix("split_")] = value
        elif value.ndim == 0 or key in _INFO:
            info[key] = value.item() if value.ndim == 0 else value.tolist()
        elif len(value) == count:
            fields[key.removeprefix("field_")] = value
    if layout is None and "skeleton" in meta:
        layout = Skeleton.stored(meta["skeleton"], f"archive '{path}'")
    elif layout is None:
        layout = _layout_of(path, arrays)
    names = arrays.get("label_names", np.array(meta.get("label_names", []), dtype=str))
    return cls(arrays["keypoint"], arrays["offset"], arrays["label"], Skeleton.load(layout),
               tuple(names.astype(str).ravel().tolist()), splits, arrays.get("score"), fields, info, name, path)


def _layout_of(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    missing = [key for key in ("joint_names", "edges", "root") if key not in arrays]
    if missing:
        raise UserError(f"Expected the keys joint_names, edges and root in archive '{path}'. Got no {missing[0]!r}; "
                        "add it or name the skeleton with layout.")
    edges, root = arrays["edges"], arrays["root"]
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu" or root.dtype.kind not in "iu" or root.ndim:
        raise UserError(f"Expected edges (V - 1, 2) of (child, parent) and a scalar root, both integers, in archive "
                        f"'{path}'. Got edges {edges.dtype} {edges.shape} and root {root.dtype} {root.shape}.")
    return {"name": path.stem, "joints": arrays["joint_names"].astype(str).ravel().tolist(),
            "edges": edges.tolist(), "root": int(root)}


def _check(a: Archive) -> None:
    """Everything that can be checked without reading the frames."""
    where = f"of archive '{a.name}'"
    x = a.keypoint
    if x.ndim != 4 or x.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"Expected keypoint {where} to be (F, M, V, C) float16, float32 or float64. Got shape "
                        f"{x.shape} of {x.dtype}; convert it.")
    if x.shape[2] != len(a.skeleton):
        raise UserError(f"Expected keypoint {where} to have V = {len(a.skeleton)} joints, as its layout "
                        f"'{a.skeleton.name}' has. Got V = {x.shape[2]}; name the right layout.")
    if x.shape[3] not in (2, 3) or x.shape[1] < 1:
        raise UserError(f"Expected keypoint {where} to have C = 2 or 3 coordinates and at least one person. Got "
                        f"shape {x.shape}; move confidences to the key score.")
    if a.score is not None and (a.score.shape != x.shape[:3] or a.score.dtype.kind != "f" or x.shape[3] != 2):
        raise UserError(f"Expected score {where} to be (F, M, V) floats beside 2D keypoints. Got {a.score.shape} of "
                        f"{a.score.dtype} beside keypoint {x.shape}.")
    if a.label.ndim != 1 or a.offset.shape != (len(a.label) + 1,) or not len(a.label):
        raise UserError(f"Expected offset (N + 1,) and label (N,) {where} with N of at least 1. Got offset "
                        f"{a.offset.shape} and label {a.label.shape}.")
    if a.offset[0] != 0 or a.offset[-1] != len(x):
        raise UserError(f"Expected offset {where} to run from 0 to F = {len(x)}. Got {a.offset[0]} to {a.offset[-1]}.")
    step = np.diff(a.offset)
    if (step < 1).any():
        i = int(np.flatnonzero(step < 1)[0])
        raise UserError(f"Expected offset {where} to grow with every sequence. Got {step[i]} frames for sequence {i}; "
                        "drop the sequence.")
    if a.label.min() < 0 or a.label.max() >= a.num_classes:
        i = int(np.flatnonzero((a.label < 0) | (a.label >= a.num_classes))[0])
        raise UserError(f"Expected label {where} from 0 to {a.num_classes - 1}, as there are {a.num_classes} "
                        f"label_names. Got {a.label[i]} for sequence {i}.")
    for name, mask in a.splits.items():
        if mask.dtype != bool or mask.shape != a.label.shape:
            raise UserError(f"Expected split {name!r} {where} to be ({len(a.label)},) bool. Got {mask.shape} of "
                            f"{mask.dtype}.")
    for name, value in a.fields.items():
        if len(value) != len(a.label):
            raise UserError(f"Expected field {name!r} {where} to have {len(a.label)} rows. Got {len(value)}.")
