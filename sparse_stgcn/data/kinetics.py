"""Kinetics skeletons: the JSON files of ST-GCN (OpenPose, 18 joints), and PYSKL's K400 pickle with pose files.

Formats: tools/kinetics_gendata.py and feeder/feeder_kinetics.py of ST-GCN; datasets/pose_dataset.py and
pipelines/compose (DecompressPose) of PYSKL.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from .pyskl import _describe, _parts
from .source import LeftOut, Record, Source, layout_for, state_of
from .storage import one_line
from .unpickle import load_pickle

MAX_FRAMES = 1_000_000
PARTS = ("train", "val", "test")


class KineticsSource(Source):
    """A folder of Kinetics-skeleton JSON files, usually with subfolders kinetics_train and kinetics_val.

    A file holds "data", a list of frames with "frame_index" and "skeleton", a list of persons with "pose" [x0, y0, x1,
    ...] in parts of the image and "score"; and "label_index". Persons have no identity there: in each frame those with
    the greatest sum of scores come first, as in ST-GCN's feeder. Files without any person are left out. The split of a file
    is that of its own folder, which is kept in the field "folder".

    Raises:
        UserError: no such file in the folder, or a file is damaged; the message names it.
    """

    channels = 2
    dtype = np.dtype(np.float32)
    has_score = True

    def __init__(self, path: str | Path, layout: Any = None, max_persons: int | None = None,
                 label_names: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self.files = [file for file in sorted(self.path.rglob("*.json")) if not file.stem.endswith("_label")]
        if not self.files:
            raise UserError(f"Expected Kinetics-skeleton .json files in '{path}'. Got none.")
        self.skeleton = Skeleton.load("openpose" if layout is None else layout)
        self.num_persons = 2 if max_persons is None else max_persons
        self.label_names = label_names or self._label_names()
        self.info = {"source": self.path.name, "unit": "image size", "up": "-y"}

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        names = (len(self.files), *(file.relative_to(self.path).as_posix() for file in (self.files[0], self.files[-1])))
        return repr((type(self).__name__, names, self.skeleton.to_dict(), self.num_persons, self.label_names,
                     state_of(self.files)))

    def record(self, index: int) -> Record | LeftOut:
        file = self.files[index]
        content = _read_json(file)
        frames = content.get("data") if isinstance(content, dict) else None
        if not isinstance(frames, list):
            raise UserError(f"Expected a list of frames under data in '{file}'. Got {_describe(frames)}.")
        label = content.get("label_index")
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            if not any(isinstance(frame, dict) and frame.get("skeleton") for frame in frames):
                return LeftOut(file.stem, "nobody in it")
            raise UserError(f"Expected label_index in '{file}' to be an integer from 0. Got {label!r}.")
        poses = [self._frame(frame, number, file) for number, frame in enumerate(frames)]
        if not any(len(pose) for _, pose in poses):
            return LeftOut(file.stem, "nobody in it")
        first = min(at for at, _ in poses)
        out = np.zeros((max(at for at, _ in poses) - first + 1, self.num_persons, len(self.skeleton), 3), np.float32)
        for at, pose in poses:
            out[at - first, :len(pose)] = pose
        out[out[..., 2] == 0] = 0
        fields = {"img_shape": [1, 1], "folder": file.parent.relative_to(self.path).as_posix()}
        return Record(file.stem, label, out[..., :2], out[..., 2], fields)

    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Not by the names of the files: the same name may stand in two folders.
        parts = [_parts_of(folder) for folder in fields["folder"].tolist()] if "folder" in fields else []
        return {part: np.array([part in own for own in parts]) for part in PARTS if any(part in own for own in parts)}

    def _frame(self, frame: Any, number: int, file: Path) -> tuple[int, np.ndarray]:
        """(frame index, the best persons (m, V, 3))."""
        where = f"frame {number} of '{file}'"
        at = frame.get("frame_index", number) if isinstance(frame, dict) else None
        persons = frame.get("skeleton") if isinstance(frame, dict) else None
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < MAX_FRAMES or not isinstance(persons, list):
            raise UserError(f"Expected {where} to have a frame_index below {MAX_FRAMES} and a list skeleton. Got "
                            f"{at!r} and {_describe(persons)}.")
        joints = len(self.skeleton)
        out = np.zeros((len(persons), joints, 3), np.float32)
        for row, person in zip(out, persons, strict=True):
            try:
                row[:, :2] = np.asarray(person["pose"], np.float32).reshape(joints, 2)
                row[:, 2] = np.asarray(person["score"], np.float32).reshape(joints)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(f"Expected every person in {where} to have a pose of {2 * joints} numbers and a score of "
                                f"{joints}. Got another form: {one_line(error)}.") from error
        best = np.argsort(-out[..., 2].sum(axis=1), kind="stable")[:self.num_persons]
        return at, out[best]

    def _label_names(self) -> tuple[str, ...]:
        """Class names from the label files beside the folders, if every number has one."""
        names: dict[int, str] = {}
        for file in sorted(self.path.rglob("*_label.json")):
            content = _read_json(file)
            entries = content.values() if isinstance(content, dict) else []
            names |= {e["label_index"]: str(e["label"]) for e in entries
                      if isinstance(e, dict) and isinstance(e.get("label_index"), int) and "label" in e}
        return tuple(names[i] for i in range(len(names))) if names and set(names) == set(range(len(names))) else ()


class K400Source(Source):
    """PYSKL's K400 pickle: annotations whose poses lie in other pickles, or are stored one detection per row.

    An annotation has total_frames, frame_inds (D,), box_score (D,) and keypoint (D, V, 3) with the score as third
    channel; or, in place of keypoint, "raw_file" and "key": the pose file (looked for by its name in `poses`) and the
    entry in it. Detections whose box score is below `box_threshold` do not count; the rest is stacked frame by frame,
    the greatest sum of scores first if there are more than `max_persons`. Annotations without a detection are left out.
    The pose files are read one after another, each once.

    Raises:
        UserError: the pickle is none of this kind, a pose file is missing or damaged; the message names it.
    """

    channels = 2
    has_score = True

    def __init__(self, path: str | Path, poses: str | Path | None = None, layout: Any = None,
                 max_persons: int | None = None, label_names: tuple[str, ...] = (), box_threshold: float = 0.5) -> None:
        self.path, self.box_threshold = Path(path), box_threshold
        self.annotations, self.split = _parts(load_pickle(path), str(path))
        self.poses = None if poses is None else Path(poses)
        # Annotations of one pose file come together, so that one open file is enough.
        self.order = sorted(range(len(self.annotations)), key=lambda i: (str(self.annotations[i].get("raw_file", "")), i))
        self._open: tuple[Path | None, Mapping[str, Any]] = (None, {})
        first = self._keypoint(self.annotations[self.order[0]], self._where(self.order[0]))
        self.skeleton = layout_for(first.shape[1], 2, layout, f"'{path}'")
        self.dtype = first.dtype
        self.num_persons = 2 if max_persons is None else max_persons
        self.label_names = label_names
        self.info = {"source": self.path.name, "box_threshold": box_threshold}

    def __len__(self) -> int:
        return len(self.annotations)

    def record(self, index: int) -> Record | LeftOut:
        number = self.order[index]
        annotation, where = self.annotations[number], self._where(number)
        label, total = annotation.get("label"), annotation.get("total_frames")
        for key, value in (("label", label), ("total_frames", total)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < MAX_FRAMES:
                raise UserError(f"Expected {key} of {where} to be an integer from 0. Got {value!r}.")
        keypoint = self._keypoint(annotation, where)
        count = len(keypoint)
        frame = _vector(annotation.get("frame_inds"), count, "iu", f"frame_inds of {where}")
        score = annotation.get("box_score")
        keep = np.ones(count, bool)
        if score is not None:
            keep = _vector(score, count, "f", f"box_score of {where}") >= self.box_threshold
        if count and (frame.min() < 0 or frame.max() >= int(total)):  # type: ignore[arg-type]
            raise UserError(f"Expected frame_inds of {where} from 0 to total_frames - 1 = {int(total) - 1}. Got "  # type: ignore[arg-type]
                            f"{frame.min()} to {frame.max()}.")
        if not keep.any():
            return LeftOut(self._sample(number), "no detection above the threshold")
        out = stack_detections(keypoint[keep], frame[keep], self.num_persons)
        shape = annotation.get("img_shape", (1080, 1920))
        if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(
                isinstance(n, (int, np.integer)) and n > 0 for n in shape):
            raise UserError(f"Expected img_shape of {where} to be (height, width). Got {shape!r}.")
        fields = {"img_shape": [int(n) for n in shape], "total_frames": int(total)}  # type: ignore[arg-type]
        return Record(self._sample(number), int(label), out[..., :2], out[..., 2], fields)  # type: ignore[arg-type]

    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.isin(samples, ids) for name, ids in self.split.items()}

    def _sample(self, number: int) -> str:
        annotation = self.annotations[number]
        return str(annotation.get("frame_dir", annotation.get("filename", f"{number:06d}")))

    def _where(self, number: int) -> str:
        return f"annotation {number} ('{self._sample(number)}') of '{self.path}'"

    def _keypoint(self, annotation: Mapping[str, Any], where: str) -> np.ndarray:
        value = annotation.get("keypoint")
        if value is None and "raw_file" in annotation:
            value = self._pose_file(str(annotation["raw_file"]), where).get(str(annotation.get("key")))
            value = value.get("keypoint") if isinstance(value, dict) else value
        if not isinstance(value, np.ndarray) or value.ndim != 3 or value.shape[2] != 3 or value.dtype.kind != "f":
            raise UserError(f"Expected keypoint of {where} to be floats (D, V, 3). Got {_describe(value)}.")
        if hasattr(self, "skeleton") and value.shape[1] != len(self.skeleton):
            raise UserError(f"Expected keypoint of {where} to have V = {len(self.skeleton)}. Got V = {value.shape[1]}.")
        return value

    def _pose_file(self, name: str, where: str) -> Mapping[str, Any]:
        base = name.replace("\\", "/").rsplit("/", 1)[-1]
        file = (self.poses or self.path.parent) / base
        if self._open[0] != file:
            if not file.is_file():
                raise UserError(f"Expected pose file '{base}' of {where} in '{file.parent}'. Got no such file; name its "
                                "folder with poses.")
            content = load_pickle(file)
            if not isinstance(content, dict):
                raise UserError(f"Expected pose file '{file}' to hold a dict. Got {_describe(content)}.")
            self._open = (file, {str(key): value for key, value in content.items()})
        return self._open[1]


def stack_detections(keypoint: np.ndarray, frame: np.ndarray, max_persons: int) -> np.ndarray:
    """(T, M, V, 3) from detections (D, V, 3) and their frames (D,); frames without a detection vanish. If a frame has
    more than `max_persons`, the persons of every frame are ordered by their sum of scores before the rest is cut.
    PYSKL's `DecompressPose` with squeeze."""
    frames, row = np.unique(frame, return_inverse=True)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=len(frames))
    place = np.empty(len(row), np.int64)
    place[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.zeros((len(frames), int(counts.max()), *keypoint.shape[1:]), keypoint.dtype)
    out[row, place] = keypoint
    if out.shape[1] > max_persons:
        ranked = np.argsort(-out[..., 2].sum(axis=-1, dtype=np.float64), axis=1, kind="stable")
        out = np.take_along_axis(out, ranked[..., None, None], axis=1)[:, :max_persons]
    return out


def _parts_of(folder: str) -> tuple[str, ...]:
    """What the outermost folder that names a part names; below it a class may be called "testifying"."""
    named = (tuple(part for part in PARTS if part in name) for name in folder.lower().split("/"))
    return next((parts for parts in named if parts), ())


def _vector(value: Any, count: int, kinds: str, what: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.shape != (count,) or value.dtype.kind not in kinds:
        raise UserError(f"Expected {what} to be ({count},), one entry for each detection. Got {_describe(value)}.")
    return value


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Expected readable JSON in '{file}'. Got: {one_line(error)}.") from error
