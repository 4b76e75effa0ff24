"""CTR-GCN's `.npz` files (NTU60_CS.npz, ...): x_train, y_train, x_test, y_test.

Format: data/ntu/seq_transformation.py and feeders/feeder_ntu.py of CTR-GCN.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .source import Record, Source, layout_for
from .storage import account, read_npz

PARTS = ("train", "test")


class CtrgcnSource(Source):
    """x (N, T, M V C) float with M = 2 persons and C = 3 coordinates, padded with zero frames at the end, and y one-hot
    (N, classes) or class numbers (N,).

    Frames after the last one with a person are cut. Sample ids are CTR-GCN's own ("train_0", "test_0", ...), so that
    its score files match.

    Raises:
        UserError: a key is missing or the arrays do not fit together; the message names the key.
    """

    num_persons = 2
    channels = 3

    def __init__(self, path: str | Path, layout: Any = None, label_names: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        arrays = read_npz(self.path)
        keys = [f"{axis}_{part}" for part in PARTS for axis in "xy"]
        missing = [key for key in keys if key not in arrays]
        if missing:
            raise UserError(f"Expected the keys {', '.join(keys)} in '{path}'. Got no {missing[0]!r} among "
                            f"{', '.join(sorted(arrays)) or 'no keys'}.")
        self.x = {part: arrays[f"x_{part}"] for part in PARTS}
        for part, x in self.x.items():
            if x.ndim != 3 or x.dtype not in (np.float16, np.float32, np.float64) or x.shape[2] % 6 or not x.shape[2]:
                raise UserError(f"Expected x_{part} of '{path}' to be floats (N, T, 2 V 3). Got {x.dtype} of shape "
                                f"{x.shape}.")
        joints = self.x["train"].shape[2] // 6
        if self.x["test"].shape[2] != 6 * joints:
            raise UserError(f"Expected x_test of '{path}' to have the joints of x_train, {joints}. Got "
                            f"{self.x['test'].shape[2] // 6}.")
        self.skeleton = layout_for(joints, 3, layout, f"'{path}'")
        self.dtype = np.result_type(*(x.dtype for x in self.x.values()))
        self.y = {part: _labels(arrays[f"y_{part}"], len(self.x[part]), f"y_{part} of '{path}'") for part in PARTS}
        classes = max([y.shape[1] for y in (arrays[f"y_{part}"] for part in PARTS) if y.ndim == 2], default=0)
        self.label_names = label_names or tuple(map(str, range(classes)))
        self.info = {"source": self.path.name, "up": "y"}

    def __len__(self) -> int:
        return sum(len(x) for x in self.x.values())

    def record(self, index: int) -> Record:
        part = "train" if index < len(self.x["train"]) else "test"
        i = index - (0 if part == "train" else len(self.x["train"]))
        flat = np.array(self.x[part][i])
        account(self.x[part], flat.nbytes)
        seen = np.flatnonzero((flat != 0).any(axis=1))
        flat = flat[:seen[-1] + 1 if len(seen) else 1]
        keypoint = flat.reshape(len(flat), 2, len(self.skeleton), 3)
        return Record(f"{part}_{i}", int(self.y[part][i]), keypoint)

    def splits(self, samples: np.ndarray, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {part: np.char.startswith(samples, f"{part}_") for part in PARTS}


def _labels(y: np.ndarray, count: int, where: str) -> np.ndarray:
    """Class numbers (N,) from one-hot rows or class numbers."""
    if y.ndim == 2 and len(y) == count and y.shape[1] and y.dtype.kind in "fiub":
        hot = y != 0
        if (hot.sum(axis=1) != 1).any():
            row = int(np.flatnonzero(hot.sum(axis=1) != 1)[0])
            raise UserError(f"Expected {where} to be one-hot. Got {int(hot[row].sum())} classes in row {row}.")
        return hot.argmax(axis=1)
    if y.ndim == 1 and len(y) == count and y.dtype.kind in "iu" and (not count or y.min() >= 0):
        return y
    raise UserError(f"Expected {where} to be one-hot ({count}, classes) or class numbers ({count},) from 0. Got {y.dtype} "
                    f"of shape {y.shape}.")
