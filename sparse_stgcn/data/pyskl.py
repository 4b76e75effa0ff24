"""PYSKL pickles (also mmaction2's): a dict of splits and annotations, 3D or 2D with scores.

Format: tools/data/README.md of PYSKL.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .source import Record, Source, layout_for, pick_persons
from .unpickle import load_pickle

__all__ = ["PysklSource", "load_pickle"]


class PysklSource(Source):
    """Annotations of a PYSKL pickle.

    The top is a dict with "annotations" (older: "annos") and usually "split" {name: [ids]}, or a bare list of
    annotations. An annotation holds frame_dir (or filename), label, total_frames, keypoint (M, T, V, C), and in 2D sets
    keypoint_score (M, T, V) and img_shape. The archive keeps keypoint's dtype, usually float16.

    Args:
        path: the pickle.
        layout: skeleton; default by the number of joints (25 nturgb+d, 17 coco, 18 openpose, 21 handmp).
        max_persons: persons kept per sequence; default: all that any annotation has, at most 2.
        label_names: names of the classes; default: their numbers.

    Raises:
        UserError: the file is no such pickle, or an annotation is damaged; the message names the annotation.
    """

    def __init__(self, path: str | Path, layout: Any = None, max_persons: int | None = None,
                 label_names: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        content = load_pickle(path)
        self.annotations, self.split = _parts(content, str(path))
        first = self._keypoint(0)
        self.channels = first.shape[-1]
        self.has_score = self._has_score(self.annotations[0])
        if self.channels == 3 and not self.has_score and first.shape[2] in (17, 18, 21) and layout in (
                None, "coco", "openpose", "handmp") and _confidences(first[..., 2]):
            # 2D joints whose third channel is the score.
            self.channels, self.has_score = 2, True
        self.skeleton = layout_for(first.shape[2], self.channels, layout, f"'{path}'")
        self.dtype = np.result_type(*{self._keypoint(i).dtype for i in range(len(self))})
        most = max(len(self._keypoint(i)) for i in range(len(self)))
        self.num_persons = max(1, min(most, 2 if max_persons is None else max_persons))
        self.label_names = label_names
        self.info = {"source": self.path.name, "persons_in_source": most}

    def __len__(self) -> int:
        return len(self.annotations)

    def record(self, index: int) -> Record:
        annotation, sample = self.annotations[index], self._sample(index)
        where = f"annotation {index} ('{sample}') of '{self.path}'"
        keypoint = self._keypoint(index)
        label = annotation.get("label")
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or label < 0:
            raise UserError(f"Expected label of {where} to be an integer from 0. Got {label!r}.")
        if self.label_names and label >= len(self.label_names):
            raise UserError(f"Expected label of {where} below {len(self.label_names)}, the number of label_names. Got "
                            f"{label}.")
        frames = annotation.get("total_frames", keypoint.shape[1])
        if frames != keypoint.shape[1] or not keypoint.shape[1]:
            raise UserError(f"Expected total_frames of {where} to be the frames of keypoint, at least 1. Got "
                            f"{frames!r} and {keypoint.shape[1]}.")
        score = annotation.get("keypoint_score")
        if self.has_score and score is None and keypoint.shape[-1] == 3:
            keypoint, score = keypoint[..., :2], keypoint[..., 2]
        if self.has_score:
            if not isinstance(score, np.ndarray) or score.shape != keypoint.shape[:3] or score.dtype.kind != "f":
                raise UserError(f"Expected keypoint_score of {where} to be floats {keypoint.shape[:3]}. Got "
                                f"{_describe(score)}.")
            score = score.swapaxes(0, 1)
        keypoint, score = pick_persons(keypoint.swapaxes(0, 1), score, self.num_persons)
        fields: dict[str, Any] = {"persons": keypoint.shape[1]}
        if self.channels == 2:
            fields["img_shape"] = self._image(annotation, where)
        return Record(sample, int(label), keypoint, score, fields)

    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.isin(samples, ids) for name, ids in self.split.items()}

    def _sample(self, index: int) -> str:
        annotation = self.annotations[index]
        name = annotation.get("frame_dir", annotation.get("filename"))
        return f"{index:06d}" if name is None else str(name)

    def _keypoint(self, index: int) -> np.ndarray:
        value = self.annotations[index].get("keypoint")
        where = f"annotation {index} ('{self._sample(index)}') of '{self.path}'"
        if value is None:
            keys = ", ".join(map(str, list(self.annotations[index])[:12]))
            raise UserError(f"Expected keypoint in {where}. Got only {keys or 'nothing'}; K400 pickles that refer to pose "
                            "files need those files (format k400).")
        if not isinstance(value, np.ndarray) or value.ndim != 4 or value.dtype not in (np.float16, np.float32, np.float64):
            raise UserError(f"Expected keypoint of {where} to be floats (M, T, V, C). Got {_describe(value)}.")
        if index and value.shape[2:] != self.annotations[0]["keypoint"].shape[2:]:
            raise UserError(f"Expected keypoint of {where} to have the V and C of the first annotation, "
                            f"{self.annotations[0]['keypoint'].shape[2:]}. Got {value.shape[2:]}.")
        if value.shape[3] not in (2, 3):
            raise UserError(f"Expected keypoint of {where} to have C = 2 or 3. Got C = {value.shape[3]}.")
        return value

    @staticmethod
    def _has_score(annotation: Mapping[str, Any]) -> bool:
        return annotation.get("keypoint_score") is not None

    @staticmethod
    def _image(annotation: Mapping[str, Any], where: str) -> tuple[int, int]:
        shape = annotation.get("img_shape", (1080, 1920))
        try:
            height, width = (int(n) for n in shape)
        except (TypeError, ValueError):
            height = width = 0
        if height < 1 or width < 1:
            raise UserError(f"Expected img_shape of {where} to be (height, width). Got {shape!r}.")
        return height, width


def _parts(content: Any, path: str) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Annotations and splits, checked to be lists of dicts and of ids."""
    splits: Any = {}
    annotations = content
    if isinstance(content, dict):
        annotations = content.get("annotations", content.get("annos"))
        splits = content.get("split", {})
    if not isinstance(annotations, list) or not annotations:
        got = f"keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else _describe(content)
        raise UserError(f"Expected a PYSKL pickle with a list of annotations (or annos) in '{path}'. Got {got}.")
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise UserError(f"Expected annotation {index} of '{path}' to be a dict. Got {_describe(annotation)}.")
    if not isinstance(splits, dict) or not all(
            isinstance(ids, (list, tuple, set, frozenset, np.ndarray)) for ids in splits.values()):
        raise UserError(f"Expected split of '{path}' to map names to lists of ids. Got {_describe(splits)}.")
    return annotations, _named(annotations, {str(name): [str(i) for i in ids] for name, ids in splits.items()}, path)


def _named(annotations: Sequence[Mapping[str, Any]], split: Mapping[str, list[str]], path: str) -> dict[str, list[str]]:
    """The splits by the names of the samples; where an annotation has a frame_dir and a filename, a split may list either."""
    names = {str(a["filename"]): str(a["frame_dir"]) for a in annotations if "filename" in a and "frame_dir" in a}
    known = {str(a.get("frame_dir", a.get("filename", f"{i:06d}"))) for i, a in enumerate(annotations)}
    found: dict[str, list[str]] = {}
    for part, ids in split.items():
        if "/" in part or part.startswith("."):
            raise UserError(f"Expected names of splits in '{path}' to be names of files, too. Got {part!r}; rename it.")
        found[part] = [name if name in known else names.get(name, name) for name in ids]
    if found and not any(known.intersection(ids) for ids in found.values()):
        example = next((ids[0] for ids in found.values() if ids), None)
        raise UserError(f"Expected the splits of '{path}' to list its annotations, by frame_dir or filename. Got none of "
                        f"them, but {example!r} for example; an annotation is called {min(known)!r}.")
    return found


def _confidences(value: np.ndarray) -> bool:
    """Whether these can be confidences, of which some detectors' are a little above 1."""
    finite = value[np.isfinite(value)]
    return bool(finite.size == 0 or (finite.min() >= 0 and finite.max() <= 1.5))


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return "none" if value is None else f"a {type(value).__name__}"
