"""The synthetic set: bodies, motions, and that a nearest neighbour is not enough."""
from __future__ import annotations

import time

import numpy as np
import pytest

from sparse_stgcn.data import Archive, SkeletonDataset, synthetic
from sparse_stgcn.data.kinematics import ELBOW, HIP, KNEE, SHOULDER, WRIST, forward_kinematics, rest_offsets
from sparse_stgcn.data.motions import PAIRED, SINGLE, Pose
from sparse_stgcn.skeleton import Skeleton

AVERAGE = dict.fromkeys(("trunk", "shoulders", "hips", "arms", "legs"), 1.0)


@pytest.fixture(scope="module")
def made() -> Archive:
    return synthetic.make(600)


def test_set_has_the_promised_form(made: Archive) -> None:
    assert made.keypoint.shape[1:] == (2, 25, 3) and made.keypoint.dtype == np.float32
    assert made.skeleton == Skeleton.load("nturgb+d") and len(made) == 600
    assert made.num_classes == len(SINGLE) + len(PAIRED) >= 12 and len(PAIRED) >= 2
    lengths = made.lengths
    assert lengths.min() >= 30 and lengths.max() <= 120 and len(np.unique(lengths)) > 60
    made.check_classes("train")
    made.check_classes("test")
    assert made.first_not_finite() is None
    counts = np.bincount(made.label)
    assert counts.max() - counts.min() <= 1
    assert 0.2 < made.splits["test"].mean() < 0.3
    assert not set(made.fields["subject"][made.train]) & set(made.fields["subject"][~made.train])


def test_two_persons_where_the_class_needs_them(made: Archive) -> None:
    second = np.array([(made[i][:, 1] != 0).any() for i in range(len(made))])
    paired = np.isin(np.array(made.label_names)[made.label], list(PAIRED))
    assert second[paired].all()
    assert 0.3 < second[~paired].mean() < 0.7, "a second person alone must not tell the class"


def test_some_joints_are_lost_and_first_frames_have_a_trunk(made: Archive) -> None:
    lost = [(made[i][:, 0] == 0).all(-1) for i in range(100)]
    assert 0.001 < np.concatenate(lost).mean() < 0.05
    assert not any(frames[0, [0, 1, 4, 8, 20]].any() for frames in lost)


def test_same_seed_same_set_and_longer_sets_begin_alike(made: Archive) -> None:
    again, longer, other = synthetic.make(600), synthetic.make(650), synthetic.make(600, seed=1)
    np.testing.assert_array_equal(made.keypoint, again.keypoint)
    np.testing.assert_array_equal(made.keypoint, longer.keypoint[:len(made.keypoint)])
    assert other.keypoint.shape != made.keypoint.shape or not np.array_equal(other.keypoint, made.keypoint)


def test_numbers_do_not_change_between_versions() -> None:
    a = synthetic.make(52, seed=3)
    assert a.lengths[:6].tolist() == [68, 107, 48, 52, 89, 54]
    np.testing.assert_allclose(a.keypoint[7, 0, 11], [0.621195, 1.785716, 4.107109], atol=1e-5)


def test_default_set_is_made_quickly() -> None:
    start = time.process_time()
    synthetic.make()
    assert time.process_time() - start < 10


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="sequences=20"):
        synthetic.make(20)


def nearest_neighbour(data: Archive, align: bool, frames: int = 32) -> float:
    """Accuracy of the nearest training sequence by centred coordinates at `frames` equal time steps."""
    points, labels = {}, {}
    for split in ("train", "test"):
        part = SkeletonDataset(data, split, align=align)
        steps = [np.linspace(0, part.sequence(i).shape[1] - 1, frames).round().astype(int) for i in range(len(part))]
        points[split] = np.stack([part.sequence(i)[:, step].ravel() for i, step in enumerate(steps)])
        labels[split] = part.labels.numpy()
    a, b = points["test"], points["train"]
    nearest = ((b**2).sum(1) - 2 * a @ b.T).argmin(1)
    return float((labels["train"][nearest] == labels["test"]).mean())


@pytest.mark.parametrize("align", [False, True], ids=["centred", "centred and upright"])
def test_nearest_neighbour_is_not_enough(made: Archive, align: bool) -> None:
    accuracy = nearest_neighbour(made, align)
    assert 2 / made.num_classes < accuracy < 0.75


def test_walking_persons_differ_only_by_where_they_go() -> None:
    assert PAIRED["walk towards each other"][0] is PAIRED["walk apart"][0]
    ends = {}
    for name in ("walk towards each other", "walk apart"):
        scenes = [synthetic._Scene(name, 0, np.random.RandomState(seed)) for seed in range(20)]
        gaps = [np.linalg.norm(s.poses[0].place - s.poses[1].place, axis=1) for s in scenes]
        ends[name] = [(gap[0], gap[-1]) for gap in gaps]
    assert all(first > last for first, last in ends["walk towards each other"])
    assert all(first < last for first, last in ends["walk apart"])


# ---- kinematics ------------------------------------------------------------------------------------------------

def test_bones_keep_their_length_whatever_the_angles() -> None:
    rng = np.random.default_rng(0)
    offsets = np.repeat(rest_offsets(AVERAGE, 1.1)[None], 40, 0)
    points = forward_kinematics(rng.uniform(-2, 2, (40, 25, 3)), offsets, rng.uniform(-3, 3, 40))
    for parts in (SHOULDER, ELBOW, WRIST, HIP, KNEE):
        for joint in parts:
            above = dict(Skeleton.load("nturgb+d").edges)[joint]
            length = np.linalg.norm(points[:, joint] - points[:, above], axis=-1)
            np.testing.assert_allclose(length, np.linalg.norm(offsets[0, joint]), rtol=1e-12)


@pytest.mark.parametrize("joint, angles, of, direction", [
    (SHOULDER[0], (np.pi / 2, 0, 0), ELBOW[0], (0, 0, 1)), (SHOULDER[1], (np.pi / 2, 0, 0), ELBOW[1], (0, 0, 1)),
    (SHOULDER[0], (0, np.pi / 2, 0), ELBOW[0], (1, 0, 0)), (SHOULDER[1], (0, np.pi / 2, 0), ELBOW[1], (-1, 0, 0)),
    (HIP[0], (np.pi / 2, 0, 0), KNEE[0], (0, 0, 1)), (ELBOW[1], (np.pi / 2, 0, 0), WRIST[1], (0, 0, 1)),
], ids=["left arm forward", "right arm forward", "left arm out", "right arm out", "thigh forward", "forearm forward"])
def test_angles_mean_what_they_say(joint: int, angles: tuple, of: int, direction: tuple) -> None:
    pose = np.zeros((1, 25, 3))
    pose[0, joint] = angles
    points = forward_kinematics(pose, rest_offsets(AVERAGE)[None], np.zeros(1))[0]
    bone = points[of] - points[joint]
    assert bone @ np.array(direction) / np.linalg.norm(bone) > 0.98


def test_left_and_right_are_mirror_images() -> None:
    rng = np.random.default_rng(1)
    pose = np.zeros((1, 25, 3))
    mirror = np.zeros((1, 25, 3))
    for left, right in Skeleton.load("nturgb+d").pairs or ():
        pose[0, left], pose[0, right] = rng.uniform(-1, 1, (2, 3))
        mirror[0, left], mirror[0, right] = pose[0, right], pose[0, left]
    offsets = rest_offsets(AVERAGE)[None]
    a, b = (forward_kinematics(p, offsets, np.zeros(1))[0] for p in (pose, mirror))
    for left, right in Skeleton.load("nturgb+d").pairs or ():
        np.testing.assert_allclose(a[left], b[right] * (-1, 1, 1), atol=1e-12)


def test_feet_stand_on_the_ground() -> None:
    rng = np.random.RandomState(0)
    pose = Pose(60, rng)
    SINGLE["bow"](pose)
    points = next(synthetic._simulate([pose], [rest_offsets(AVERAGE)]))
    np.testing.assert_allclose(points[:, [14, 15, 18, 19], 1].min(axis=1), 0, atol=1e-12)
