"""SkeletonDataset: from an archive to network input, one sequence or a whole batch at a time."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..errors import UserError
from . import transforms as tf
from .archive import Archive
from .preparation import IMAGE, Preparation


class SkeletonDataset(Dataset[tuple[Tensor, int, int]]):
    """Clips of one split of an archive.

    Training: `dataset[i]` is (keypoint (M, L, V, C) float32, label, i): L frames drawn uniformly, then turned and
    scaled at random if asked. The draw depends on (`seed`, epoch, i) only, never on the order of access or the number
    of workers; call `set_epoch` before each epoch.
    Testing (`train=False`): keypoint is (clips, M, L, V, C), the same in every run (PYSKL's seeded test sampler).

    3D sequences pass `pre_normalize_3d`, 2D ones `pre_normalize_2d` and carry the score as third channel; then the
    features of `stream` are computed on the whole sequence and frames are drawn, in PYSKL's order. What comes before
    the draw is kept in memory, up to `cache_bytes`.

    Args:
        archive: the sequences.
        split: name of a split ("train", "test"), a mask or indices into the archive.
        stream: "j" joints, "b" bones, "jm"/"bm" their motion, or several joined by "+" on the channel axis.
        clip_len: L, frames per clip.
        num_clips: clips per sequence when testing.
        train: random clips, or the fixed test clips.
        seed: of the random clips.
        num_person: persons per clip, cut or padded with zeros; default: those of the archive.
        align: turn the body upright (3D with named spine and shoulders); centring is always done.
        rotate: theta, random rotation by three angles from U(-theta, theta) radians (2D: one in the plane).
        scale: s, random factor 1 + U(-1, 1) s per axis.
        missing: what to do about joints that are NaN or lost: keep, interpolate, zero or drop
            (see `transforms.fill_missing`). With "keep" a NaN in the archive is an error.
        sampler: frames as PYSKL's "uniform" sampler draws them, in the test its "decode" variant, or "ordered": with
            repetition, in order of time.
        box: scale every sequence to the box of its joints, after the random turn where it is 3D.
        cache_bytes: memory for normalised sequences, of all workers together.

    Raises:
        UserError: an option is not as above, the split is empty, or the archive holds NaN and `missing` is "keep".
    """

    def __init__(
        self,
        archive: Archive,
        split: str | Sequence[int] | np.ndarray = "train",
        stream: str = "j",
        clip_len: int = 100,
        num_clips: int = 1,
        train: bool = True,
        seed: int = 0,
        num_person: int | None = None,
        align: bool = True,
        rotate: float = 0.0,
        scale: float = 0.0,
        missing: str = "keep",
        sampler: str = "uniform",
        cache_bytes: int = 512 << 20,
        box: bool = False,
    ) -> None:
        for name, value in (("rotate", rotate), ("scale", scale), ("cache_bytes", cache_bytes), ("seed", seed)):
            if not value >= 0:
                raise UserError(f"Expected {name} of at least 0. Got {name}={value}.")
        self.num_person = archive.num_persons if num_person is None else num_person
        self.preparation = Preparation(archive.skeleton, stream, clip_len, num_clips, self.num_person, align, missing, sampler,
                                       box)
        self.archive = archive
        self.members = archive.members(split)
        if not len(self.members):
            raise UserError(f"Expected at least one sequence in split {split!r} of archive '{archive.name}'. Got none.")
        if missing == "keep":
            archive.check_finite()
        self.stream = stream
        self.features = self.preparation.feats
        self.clip_len, self.num_clips, self.train, self.seed = clip_len, num_clips, train, seed
        self.rotate, self.scale = rotate, scale
        self.labels = torch.from_numpy(archive.label[self.members])
        self.epoch = 0
        # A box is taken around the joints as they are turned; without one, turning features is the same and cheaper.
        self._turn_joints = train and box and not archive.is_2d and bool(rotate or scale)
        self._cache: dict[int, np.ndarray] = {}
        self._cache_bytes, self._cached = cache_bytes, 0

    def __len__(self) -> int:
        return len(self.members)

    @property
    def in_channels(self) -> int:
        """C of the network input: three for each stream."""
        return 3 * len(self.features)

    @property
    def sample_ids(self) -> np.ndarray:
        """(N,) text that names every sequence of the split."""
        return self.archive.sample_ids[self.members]

    def set_epoch(self, epoch: int) -> None:
        """Choose the random clips of `epoch`."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected index below {len(self)}. Got {index}.")
        index %= len(self)
        keypoint, label, _ = self.batch([index])
        return keypoint[0], int(label[0]), index

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The samples `indices` stacked: keypoint (B, M, L, V, C) or (B, clips, M, L, V, C), labels (B,), indices (B,)."""
        index = np.asarray(indices, dtype=np.int64)
        clips = np.stack([self._random_clip(i) if self.train else self._test_clips(i) for i in index.tolist()])
        return torch.from_numpy(clips), self.labels[index], torch.from_numpy(index)

    def _random_clip(self, index: int) -> np.ndarray:
        """(M, L, V, C) of the current epoch, turned and scaled at random if asked."""
        sequence, rng = self._normalised(index), self._generator(index)
        frames = self.preparation.random_frames(sequence.shape[1], rng)
        if self._turn_joints:
            turned = (sequence @ self._matrix(rng).T).astype(sequence.dtype)
            return self.preparation.clips(self.preparation.finish(turned, flat=False), frames)[0]
        clip = self.preparation.clips(sequence, frames)[0]
        if self.rotate or self.scale:
            self._augment(clip, rng)
        return clip

    def _test_clips(self, index: int) -> np.ndarray:
        """(clips, M, L, V, C)."""
        sequence = self.sequence(index)
        return self.preparation.clips(sequence, self.preparation.test_frames(sequence.shape[1]))

    def batches(
        self, batch_size: int, epoch: int | None = None, shuffle: bool = True, drop_last: bool = False, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of an epoch, from batch `start` on: the order depends on (`seed`, epoch) only."""
        if epoch is not None:
            self.set_epoch(epoch)
        order = self.order() if shuffle else np.arange(len(self))
        stop = len(order) - len(order) % batch_size if drop_last else len(order)
        for first in range(start * batch_size, stop, batch_size):
            yield self.batch(order[first:first + batch_size])

    def order(self, epoch: int | None = None) -> np.ndarray:
        """Permutation of the samples for `epoch` (default: the current one)."""
        return self._generator(-1, self.epoch if epoch is None else epoch).permutation(len(self))

    def sequence(self, index: int) -> np.ndarray:
        """The whole sequence after normalisation, as features (M, T, V, C) float32: what clips are drawn from."""
        known = self._normalised(index)
        return self.preparation.finish(known, flat=False) if self._turn_joints else known

    def _normalised(self, index: int) -> np.ndarray:
        """What does not change from epoch to epoch: the features, or the joints where a random turn comes before the box."""
        known = self._cache.get(index)
        if known is not None:
            return known
        member, prepare = int(self.members[index]), self.preparation
        keypoint, score = self.archive.read(member)
        if self._turn_joints:
            features = prepare.normalise(tf.fill_missing(keypoint, prepare.missing), flat=False)
        else:
            features = prepare.features(keypoint, score, self.archive.is_2d, self._image(member))
        worker = get_worker_info()  # workers draw different sequences: each has its share of the memory
        if self._cached + features.nbytes <= self._cache_bytes // (worker.num_workers if worker else 1):
            self._cached += features.nbytes
            self._cache[index] = features
        return features

    def _image(self, member: int) -> tuple[float, float]:
        shapes = self.archive.fields.get("img_shape")
        return IMAGE if shapes is None else (float(shapes[member][0]), float(shapes[member][1]))

    def _augment(self, row: np.ndarray, rng: np.random.Generator) -> None:
        """Random rotation and scale of one clip in place. Streams are linear in the joints, so each is turned alike."""
        matrix = self._matrix(rng)
        axes = len(matrix)
        for first in range(0, self.in_channels, 3):
            row[..., first:first + axes] = row[..., first:first + axes] @ matrix.T.astype(np.float32)

    def _matrix(self, rng: np.random.Generator) -> np.ndarray:
        """A random turn, then a random factor per axis."""
        axes = 2 if self.archive.is_2d else 3
        matrix = np.eye(axes)
        if self.rotate:
            turn = tf.random_rotation_2d if axes == 2 else tf.random_rotation
            matrix = turn(self.rotate, rng)
        if self.scale:
            matrix = tf.random_scale(self.scale, axes, rng)[:, None] * matrix
        return matrix

    def _generator(self, index: int, epoch: int | None = None) -> np.random.Generator:
        # Philox with the coordinates as its key: every (seed, epoch, index) has a stream of its own.
        where = ((self.epoch if epoch is None else epoch) << 32) + index + 1
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, where], np.uint64)))

    def __getstate__(self) -> dict[str, Any]:
        # A worker fills its own cache.
        return {**self.__dict__, "_cache": {}, "_cached": 0}
