"""A network and a data set that train in a second, for the tests of the training side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_stgcn import create_model, sparsify
from sparse_stgcn.config import TrainConfig
from sparse_stgcn.data import Archive, SkeletonDataset
from sparse_stgcn.recognizer import Recognizer
from sparse_stgcn.skeleton import Skeleton

SKELETON = Skeleton(name="five", joints=("hip", "chest", "head", "left_hand", "right_hand"),
                    edges=((1, 0), (2, 1), (3, 1), (4, 1)), root=0)
CLASSES = 3


def arrays(sequences: int = 30, seed: int = 0, persons: int = 1, joints: int = 5) -> dict[str, np.ndarray]:
    """The arrays of an archive: each class is a pose, swaying, with noise; two of three sequences train."""
    rng = np.random.default_rng(seed)
    label = np.arange(sequences) % CLASSES
    length = rng.integers(6, 14, sequences)
    poses = np.random.default_rng(99).standard_normal((CLASSES, joints, 3))
    clips = []
    for c, t in zip(label, length, strict=True):
        sway = 0.3 * np.sin(np.arange(t) + rng.uniform(0, 6))[:, None, None, None]
        clips.append(poses[c] + sway + 0.1 * rng.standard_normal((t, persons, joints, 3)))
    return {"keypoint": np.concatenate(clips).astype(np.float32), "offset": np.r_[0, np.cumsum(length)],
            "label": label, "train": np.arange(sequences) // CLASSES % 3 != 2}


def archive(**options: Any) -> Archive:
    a = arrays(**options)
    return Archive(a["keypoint"], a["offset"], a["label"], SKELETON, ("one", "two", "three"),
                   {"train": a["train"], "test": ~a["train"]}, name="tiny")


def write_npz(path: Path, **changed: Any) -> Path:
    """The arrays as an ``.npz`` file, some of them replaced (None: left out)."""
    content = {**arrays(), "label_names": np.array(["one", "two", "three"]),
               "joint_names": np.array(SKELETON.joints),
               "edges": np.array(SKELETON.edges), "root": np.array(0), **changed}
    np.savez(path, **{k: v for k, v in content.items() if v is not None})
    return path


def model(sparsity: float = 0.0, seed: int = 0, block: tuple[int, int] = (4, 1),
          **options: Any) -> Recognizer:
    torch.manual_seed(seed)
    network = create_model("stgcn", CLASSES, layout=SKELETON, base_channels=8, **options)
    return sparsify(network, sparsity, block, seed=seed) if sparsity else network


def datasets(clip_len: int = 8, sequences: int = 30) -> tuple[SkeletonDataset, SkeletonDataset]:
    data = archive(sequences=sequences)
    return (SkeletonDataset(data, "train", clip_len=clip_len, seed=0, rotate=0.1),
            SkeletonDataset(data, "test", clip_len=clip_len, train=False))


def config(**changed: Any) -> TrainConfig:
    values: dict[str, Any] = {"base_channels": 8, "sparsity": 0.8, "block": "4x1", "epochs": 4,
                              "warmup_epochs": 2,
                              "batch_size": 8, "clip_len": 8, "lr_reference_batch": 8, "eval_every": 2,
                              "eval_clips": 2, "device": "cpu", "threads": 1, "workers": 0, **changed}
    return TrainConfig(**values)


def flags(**changed: Any) -> list[str]:
    """``config`` as options of a command, for those that make it themselves."""
    options = vars(config(**changed))
    return [f"--{key.replace('_', '-')}={options[key]}" for key in (
        "base_channels", "block", "epochs", "warmup_epochs", "batch_size", "clip_len", "lr_reference_batch", "eval_every",
        "eval_clips", "device", "threads", "workers")]
