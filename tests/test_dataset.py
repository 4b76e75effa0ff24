"""SkeletonDataset: what a network sees of an archive."""
from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sparse_stgcn import create_model
from sparse_stgcn.data import Archive, SkeletonDataset
from sparse_stgcn.data import transforms as tf
from sparse_stgcn.data.causal import CausalPreparation
from sparse_stgcn.data.preparation import Preparation
from sparse_stgcn.errors import UserError
from sparse_stgcn.inputs import InputFormat
from sparse_stgcn.skeleton import Skeleton

NTU, COCO = Skeleton.load("nturgb+d"), Skeleton.load("coco")


def archive(skeleton: Skeleton = NTU, persons: int = 2, channels: int = 3, **more: object) -> Archive:
    rng = np.random.default_rng(0)
    lengths = np.array([1, 6, 15, 20, 21, 39, 40, 41, 90, 130])
    offset = np.concatenate([[0], np.cumsum(lengths)])
    x = rng.normal(size=(offset[-1], persons, len(skeleton), channels)).astype(np.float16) + np.float16(2)
    if persons > 1:
        x[offset[3]:offset[4], 1] = 0
    train = np.arange(10) % 3 != 2
    return Archive(x, offset, np.arange(10) % 2, skeleton, ("a", "b"), {"train": train, "test": ~train}, **more)


def batch_of(data: SkeletonDataset, indices: list[int]) -> torch.Tensor:
    return data.batch(indices)[0]


def test_training_clip_has_the_documented_form() -> None:
    data = SkeletonDataset(archive(), "train", clip_len=20)
    x, label, index = data[3]
    assert x.shape == (2, 20, 25, 3) and x.dtype == torch.float32 and x.is_contiguous()
    assert (label, index) == (int(data.archive.label[data.members[3]]), 3)
    assert data.in_channels == 3 and len(data) == 7


def test_test_clips_are_the_same_every_time_and_equal_the_transforms() -> None:
    data = SkeletonDataset(archive(), "test", clip_len=20, num_clips=10, train=False)
    x, _, _ = data[1]
    assert x.shape == (10, 2, 20, 25, 3)
    keypoint, _ = data.archive.read(int(data.members[1]))
    y = tf.pre_normalize_3d(keypoint)
    frames = tf.sample_test_clips(y.shape[1], 20, 10).ravel()
    np.testing.assert_array_equal(x, tf.split_clips(tf.format_persons(y[:, frames].astype(np.float32)), 10))
    data.set_epoch(5)
    np.testing.assert_array_equal(x, data[1][0])


@pytest.mark.parametrize("stream", ["j", "b", "jm", "bm", "j+b", "j+b+jm+bm"])
def test_streams_are_those_of_the_whole_sequence(stream: str) -> None:
    data = SkeletonDataset(archive(), "train", stream, clip_len=30, align=False)
    y = tf.pre_normalize_3d(data.archive.read(int(data.members[5]))[0], spine=None, shoulders=None)
    want = tf.skeleton_features(y, stream.split("+"), NTU.bones)
    np.testing.assert_array_equal(data.sequence(5), want.astype(np.float32))
    assert batch_of(data, [5]).shape == (1, 2, 30, 25, data.in_channels)


def test_draw_depends_on_seed_epoch_and_index_only() -> None:
    a, b = (SkeletonDataset(archive(), "train", clip_len=20, seed=3, rotate=0.3, scale=0.2) for _ in range(2))
    a.set_epoch(2)
    b.set_epoch(2)
    forward = batch_of(a, list(range(7)))
    backward = torch.stack([b[i][0] for i in reversed(range(7))]).flip(0)
    assert torch.equal(forward, backward)
    for other in (SkeletonDataset(archive(), "train", clip_len=20, seed=4, rotate=0.3, scale=0.2), a):
        other.set_epoch(2 if other is not a else 3)
        assert not torch.equal(forward, batch_of(other, list(range(7))))


def test_epoch_can_be_resumed_at_any_batch() -> None:
    data = SkeletonDataset(archive(), "train", clip_len=20, rotate=0.3)
    whole = [x for x, _, _ in data.batches(2, epoch=4)]
    rest = [x for x, _, _ in SkeletonDataset(archive(), "train", clip_len=20, rotate=0.3).batches(2, epoch=4, start=2)]
    assert len(whole) == 4 and all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert len(list(data.batches(2, epoch=4, drop_last=True))) == 3
    assert sorted(i for _, _, index in data.batches(2, epoch=4) for i in index.tolist()) == list(range(7))
    assert data.order(4).tolist() != data.order(5).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_do_not_change_what_is_drawn(workers: int, tmp_path: Path) -> None:
    path = archive().save(tmp_path / "a")
    data = SkeletonDataset(Archive.open(path), "train", clip_len=20, seed=1)
    data.set_epoch(1)
    loader = DataLoader(data, batch_size=3, num_workers=workers, multiprocessing_context="fork" if workers else None)
    got = torch.cat([x for x, _, _ in loader])
    assert torch.equal(got, batch_of(data, list(range(7))))


@pytest.mark.parametrize("persons, want", [(1, 2), (2, 1), (2, 3), (3, 2), (1, 1)])
def test_persons_are_cut_and_padded(persons: int, want: int) -> None:
    data = SkeletonDataset(archive(persons=persons), "train", clip_len=20, num_person=want)
    x = batch_of(data, [6])[0]
    assert x.shape == (want, 20, 25, 3)
    assert tf.person_mask(x.numpy()).tolist() == [m < persons for m in range(want)]


def test_rotation_keeps_distances_and_scale_changes_them() -> None:
    plain = batch_of(SkeletonDataset(archive(), "train", clip_len=20), [4])
    turned = batch_of(SkeletonDataset(archive(), "train", clip_len=20, rotate=0.5), [4])
    scaled = batch_of(SkeletonDataset(archive(), "train", clip_len=20, scale=0.5), [4])
    assert not torch.allclose(plain, turned)
    torch.testing.assert_close(plain.norm(dim=-1), turned.norm(dim=-1), rtol=1e-5, atol=1e-5)
    ratio = (scaled / plain)[plain != 0].reshape(-1, 3)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    assert ((ratio[0] - 1).abs() <= 0.5).all() and not torch.allclose(ratio[0], torch.ones(3))


def test_a_box_is_taken_around_the_joints_as_they_are_turned() -> None:
    plain = SkeletonDataset(archive(), "train", "j+b", clip_len=500, box=True, sampler="ordered")
    turned = SkeletonDataset(archive(), "train", "j+b", clip_len=500, box=True, sampler="ordered", rotate=1.0)
    x, y = batch_of(plain, [4])[0], batch_of(turned, [4])[0]
    for clip in (x, y):  # 500 of 21 frames: every one of them
        joints = clip[..., :3].reshape(-1, 3)
        np.testing.assert_allclose([joints.min(0).values, joints.max(0).values], [[-1] * 3, [1] * 3], atol=1e-5)
        bones = tf.bone(clip[..., :3].numpy(), NTU.bones)
        np.testing.assert_allclose(clip[..., 3:], bones, atol=1e-5)  # of the joints in the box
    assert not torch.allclose(x, y, atol=1e-2)
    # The turn is the generator's, between the normalisation and the box; the frames come first.
    keypoint = tf.pre_normalize_3d(turned.archive.read(int(turned.members[4]))[0])
    rng = turned._generator(4)
    frames = tf.ordered_sample(keypoint.shape[1], 500, rng)
    want = tf.fit_box(tf.rotate(keypoint, tf.random_rotation(1.0, rng)))[:, frames]
    np.testing.assert_allclose(y[..., :3], want, atol=1e-5)
    np.testing.assert_array_equal(turned.sequence(4), plain.sequence(4))  # a sequence as such is not turned


def test_a_box_does_not_feel_a_factor_per_axis() -> None:
    plain, scaled = (batch_of(SkeletonDataset(archive(), "train", clip_len=9, box=True, scale=s), [4]) for s in (0, 0.5))
    torch.testing.assert_close(plain, scaled, rtol=0, atol=2e-6)


def test_a_box_of_image_coordinates_is_that_of_the_visible_joints() -> None:
    base = archive(COCO, channels=2)
    base.keypoint[...] = (base.keypoint + 10) * 30
    base.keypoint[:, :, 3] = 0
    data = SkeletonDataset(base, "test", clip_len=20, train=False, box=True)
    seen = data.sequence(2)[:, :, [v for v in range(17) if v != 3], :2].reshape(-1, 2)
    np.testing.assert_allclose([seen.min(0), seen.max(0)], [[-1, -1], [1, 1]], atol=1e-6)


def test_a_network_file_says_how_its_input_is_made_and_a_box_is_not_streamed() -> None:
    data = SkeletonDataset(archive(), "test", clip_len=20, num_clips=3, train=False, box=True, sampler="ordered")
    protocol = {"clip_len": 20, "clips": 3, "align": True, "box": True, "sampler": "ordered", "persons": 2}
    inputs = InputFormat.of(create_model("stgcn", 2, base_channels=8), {"protocol": protocol})
    assert inputs.preparation == data.preparation
    features = inputs.features(data.archive.read(int(data.members[1]))[0])
    np.testing.assert_array_equal(features, data.sequence(1))
    frames = inputs.preparation.test_frames(features.shape[1])
    np.testing.assert_array_equal(inputs.preparation.clips(features, frames), data[1][0])
    with pytest.raises(UserError, match="--rolling"):
        CausalPreparation(inputs.preparation, flat=False)
    CausalPreparation(Preparation(NTU, sampler="ordered"), flat=False)


def test_ordered_test_clips_begin_with_even_frames() -> None:
    data = SkeletonDataset(archive(), "test", clip_len=20, num_clips=3, train=False, sampler="ordered")
    sequence = data.sequence(1)
    even = np.linspace(0, sequence.shape[1] - 1, 20).astype(int)
    np.testing.assert_array_equal(data[1][0][0], sequence[:, even])
    np.testing.assert_array_equal(data[1][0], data[1][0])


def test_two_dimensional_input_carries_the_score() -> None:
    base = archive(COCO, channels=2)
    score = np.random.default_rng(1).uniform(size=base.keypoint.shape[:3]).astype(np.float16)
    shape = np.tile([480, 640], (10, 1))
    more = {"score": score, "fields": {"img_shape": shape}}
    data = SkeletonDataset(archive(COCO, channels=2, **more), "test", "bm", clip_len=20, train=False)
    keypoint, kept = data.archive.read(int(data.members[2]))
    y = tf.pre_normalize_2d(keypoint, kept, (480, 640))
    want = tf.skeleton_features(y, ("bm",), COCO.bones, True, True)
    np.testing.assert_array_equal(data.sequence(2), want)
    assert data[2][0].shape == (1, 2, 20, 17, 3)


def test_two_dimensional_input_without_score_counts_seen_joints_as_sure() -> None:
    base = archive(COCO, channels=2)
    base.keypoint[:, :, 3] = 0
    x = SkeletonDataset(base, "train", clip_len=20).sequence(4)
    assert (x[0, :, 4, 2] == 1).all() and not x[:, :, 3].any()


def test_rotation_of_two_dimensional_input_leaves_the_score() -> None:
    base = archive(COCO, channels=2)
    plain = batch_of(SkeletonDataset(base, "train", clip_len=20), [4])
    turned = batch_of(SkeletonDataset(base, "train", clip_len=20, rotate=1.0), [4])
    assert torch.equal(plain[..., 2], turned[..., 2]) and not torch.equal(plain, turned)


def test_nan_is_refused_by_name_or_repaired() -> None:
    base = archive(fields={"sample": np.array([f"clip{i}" for i in range(10)])})
    base.keypoint[base.offset[8] + 5, 0, 3, 1] = np.nan
    with pytest.raises(ValueError, match="sequence 8 \\('clip8'\\).*missing to interpolate"):
        SkeletonDataset(base, "test", clip_len=20)
    for policy in ("zero", "interpolate", "drop"):
        data = SkeletonDataset(base, "test", clip_len=20, missing=policy)
        assert all(torch.isfinite(data[i][0]).all() for i in range(len(data)))


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_sequence_without_anybody_is_zeros_however_small_its_coordinates_are(train: bool, box: bool) -> None:
    x = np.ones((12, 2, 25, 3), np.float32)
    x[:6] = np.random.default_rng(0).uniform(-1e-8, 1e-8, size=(6, 2, 25, 3))
    whole = Archive(x, np.array([0, 6, 12]), np.arange(2), NTU, ("a", "b"))
    data = SkeletonDataset(whole, [0, 1], "j+b", clip_len=4, train=train, rotate=0.3, scale=0.1, box=box)
    assert not data[0][0].any() and data[0][0].shape == data[1][0].shape
    assert data.sequence(0).shape[1] == 6


def test_cache_is_bounded_and_does_not_change_values() -> None:
    free, none = SkeletonDataset(archive(), clip_len=20), SkeletonDataset(archive(), clip_len=20, cache_bytes=0)
    some = SkeletonDataset(archive(), clip_len=20, cache_bytes=50_000)
    indices = list(range(7)) * 2
    assert torch.equal(batch_of(free, indices), batch_of(none, indices))
    assert torch.equal(batch_of(free, indices), batch_of(some, indices))
    assert len(free._cache) == 7 and not none._cache
    assert 0 < sum(x.nbytes for x in some._cache.values()) <= 50_000


def test_worker_copy_starts_with_an_empty_cache() -> None:
    data = SkeletonDataset(archive(), clip_len=20)
    want = batch_of(data, [0, 1, 2])
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._cache and copy._cached == 0
    assert torch.equal(want, batch_of(copy, [0, 1, 2]))


@pytest.mark.parametrize("options, words", [
    ({"clip_len": 0}, "clip_len=0"), ({"num_clips": 0}, "num_clips=0"), ({"stream": "q"}, "stream='q'"),
    ({"rotate": -1}, "rotate=-1"), ({"num_person": 0}, "num_person=0"), ({"missing": "mean"}, "missing='mean'"),
    ({"sampler": "dense"}, "sampler='dense'"), ({"split": "val"}, "split='val'"), ({"split": []}, "split"),
    ({"split": [99]}, "split"), ({"seed": -1}, "seed=-1"), ({"rotate": float("nan")}, "rotate=nan"),
])
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        SkeletonDataset(archive(), **options)
    assert words in str(error.value) and "Expected" in str(error.value)


def test_index_out_of_range() -> None:
    data = SkeletonDataset(archive(), "train", clip_len=4)
    with pytest.raises(IndexError):
        data[7]
    assert data[-1][2] == 6


@pytest.mark.parametrize("name", ["nw_ucla", "sbu", "ui_prmd"])
def test_real_sets_pass_through(shared: Path, name: str) -> None:
    source = Archive.open(shared / "data" / f"{name}.npz")
    source.check_classes()
    for split, train in (("train", True), ("test", False)):
        data = SkeletonDataset(source, split, clip_len=16, train=train)
        for i in range(0, len(data), 37):
            x = batch_of(data, [i])
            assert torch.isfinite(x).all() and x.any()
        first = data.sequence(0)
        assert not first[0, 0, source.skeleton.root].any(), "the first frame is centred at the root"


def test_workers_share_the_cache() -> None:
    class Kept(SkeletonDataset):
        def __getitem__(self, index: int) -> int:
            super().__getitem__(index)
            return self._cached

    data = Kept(archive(), "train", clip_len=8, cache_bytes=50_000)
    shared, alone = (max(DataLoader(data, batch_size=None, num_workers=workers)) for workers in (2, 0))
    assert 0 < shared <= 25_000 < alone <= 50_000
