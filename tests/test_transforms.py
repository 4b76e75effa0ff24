"""Transforms against PYSKL's results and their own definitions."""
from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn.data import transforms as tf
from sparse_stgcn.data.body import body_axes
from sparse_stgcn.skeleton import Skeleton

NTU = Skeleton.load("nturgb+d")
COCO = Skeleton.load("coco")


# ---- the formula skeletons ------------------------------------------------------------------------------------

def unit(name: str, count: int) -> np.ndarray:
    """Hash wave in [0, 1): splitmix64 of the name's CRC-32 and the flat index."""
    z = np.arange(count, dtype=np.uint64) + np.uint64(((zlib.crc32(name.encode()) << 32) + 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def formula(name: str, persons: int, frames: int, joints: int, channels: int, dtype: type = np.float64) -> np.ndarray:
    shape = (persons, frames, joints, channels)
    m, t, v, c = np.meshgrid(*[np.arange(k, dtype=np.float64) for k in shape], indexing="ij")
    wave = (2 * unit(name, int(np.prod(shape))) - 1).reshape(shape)
    return (0.3 * wave + 0.5 * np.sin(0.2 * t + 0.4 * v + 1.1 * c) + 0.7 * m + 0.2 * c).astype(dtype)


def with_gaps(x: np.ndarray) -> np.ndarray:
    """The second person comes late and leaves early; nobody is there in the first two frames."""
    if len(x) == 2:
        x[1, 0:10] = 0
        x[1, 30:37] = 0
    x[:, 0:2] = 0
    return x


def skeleton_3d(persons: int, swap: bool = False) -> np.ndarray:
    x = with_gaps(formula("skeleton", persons, 37, 25, 3).astype(np.float16))
    if swap:
        x[0, 12:] = 0
    return x


def skeleton_2d() -> tuple[np.ndarray, np.ndarray]:
    x = (with_gaps(formula("skel2d", 2, 15, 17, 2, np.float32)) * 300 + 700).astype(np.float16)
    score = unit("score2d", 2 * 15 * 17).reshape(2, 15, 17).astype(np.float16)
    score[0, 3, 0:5] = 0.005
    return x, score


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, dict]:
    return json.loads((shared / "golden" / "pipeline_golden.json").read_text())


def check(got: np.ndarray, want: dict) -> None:
    """Equal shape, dtype and end values; float64 may differ by rotations' last bits on another processor."""
    assert list(got.shape) == want["shape"]
    assert str(got.dtype) == want["dtype"]
    flat = got.astype(np.float64).ravel()
    ends = np.concatenate([flat[:8], flat[-8:]])
    tolerance = 8 * np.finfo(np.float64).eps if got.dtype == np.float64 else 0.0
    np.testing.assert_allclose(ends, want["first8"] + want["last8"], rtol=tolerance, atol=tolerance)
    # The two sums are over many thousand terms, in an order that depends on the processor.
    np.testing.assert_allclose([flat.mean(), flat.std()], [want["mean"], want["std"]], rtol=0, atol=1e-12)


def normalized(persons: int, align: bool, swap: bool = False) -> np.ndarray:
    x = skeleton_3d(persons, swap)
    return tf.pre_normalize_3d(x) if align else tf.pre_normalize_3d(x, spine=None, shoulders=None)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("persons", [1, 2])
def test_pre_normalize_3d_equals_pyskl(golden: dict, persons: int, align: bool) -> None:
    want = golden[f"PreNormalize3D_{'two' if persons == 2 else 'one'}_spine{align}"]
    got = normalized(persons, align)
    assert got.shape[1] == want["total_frames"]
    check(got, want["keypoint"])


def test_pre_normalize_3d_puts_the_longer_seen_person_first(golden: dict) -> None:
    got = normalized(2, True, swap=True)
    assert got.shape[1] == golden["PreNormalize3D_swap"]["total_frames"]
    check(got, golden["PreNormalize3D_swap"]["keypoint"])


@pytest.mark.parametrize("stream", tf.STREAMS)
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("persons", [1, 2])
def test_streams_3d_equal_pyskl(golden: dict, persons: int, align: bool, stream: str) -> None:
    got = tf.skeleton_features(normalized(persons, align), (stream,), NTU.bones)
    check(got, golden[f"GenSkeFeat_{'two' if persons == 2 else 'one'}_spine{align}_{stream}"])


def test_pre_normalize_2d_equals_pyskl(golden: dict) -> None:
    check(tf.pre_normalize_2d(*skeleton_2d(), image=(1080, 1920)), golden["PreNormalize2D"])


@pytest.mark.parametrize("stream", tf.STREAMS)
def test_streams_2d_equal_pyskl(golden: dict, stream: str) -> None:
    x = tf.pre_normalize_2d(*skeleton_2d())
    check(tf.skeleton_features(x, (stream,), COCO.bones, True, True), golden[f"GenSkeFeat_coco_{stream}"])


@pytest.mark.parametrize("decode", [False, True], ids=["UniformSample", "UniformSampleDecode"])
def test_ten_clip_frames_equal_pyskl(golden: dict, decode: bool) -> None:
    lengths = golden["test_indices_clip100x10"]
    assert {"5", "12", "99", "100", "199", "200", "300"} <= set(lengths)
    for frames, wants in lengths.items():
        want = wants["UniformSampleDecode" if decode else "UniformSample"]
        got = tf.sample_test_clips(int(frames), 100, 10, decode=decode)
        assert got.shape == (10, 100) and got.size == want["n"]
        assert int(got.sum()) == want["sum"], frames
        assert got[0, :12].tolist() == want["first"]
        assert got[9, :12].tolist() == want["clip9"]


@pytest.mark.parametrize("persons", [1, 2])
@pytest.mark.parametrize("recipe", ["stgcn", "dgstgcn"])
def test_whole_pipeline_equals_pyskl(golden: dict, recipe: str, persons: int) -> None:
    dg = recipe == "dgstgcn"
    x = tf.skeleton_features(normalized(persons, not dg), ("b" if dg else "j",), NTU.bones)
    frames = tf.sample_test_clips(x.shape[1], 20, 10, decode=dg).ravel()
    got = tf.split_clips(tf.format_persons(x[:, frames].astype(np.float32), 2), 10)
    check(got, golden[f"test_pipeline_{recipe}_M{persons}"])


# ---- normalisation, definitions ------------------------------------------------------------------------------

def test_alignment_stands_the_body_upright() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 25, 3))
    y = tf.pre_normalize_3d(x)
    np.testing.assert_allclose(y[0, 0, 1], 0, atol=1e-15)
    spine, shoulders = y[0, 0, 1] - y[0, 0, 0], y[0, 0, 8] - y[0, 0, 4]
    # The second turn brings the shoulders to +x, which keeps the spine's length but not its direction.
    np.testing.assert_allclose(shoulders / np.linalg.norm(shoulders), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(spine), np.linalg.norm(x[0, 0, 1] - x[0, 0, 0]), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(y[1, 3, 7] - y[0, 5, 9]), np.linalg.norm(x[1, 3, 7] - x[0, 5, 9]))


@pytest.mark.parametrize("value", [0, 1e-8, -1e-9, 1e-40, np.nan])
def test_a_clip_without_anybody_is_zeros(value: float) -> None:
    y = tf.pre_normalize_3d(np.full((2, 5, 25, 3), value, np.float32))
    np.testing.assert_array_equal(y, np.zeros((2, 5, 25, 3)))
    assert y.dtype == np.float32


def test_zero_joints_stay_zero() -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 25, 3))
    x[0, 2, 13] = 0
    assert not tf.pre_normalize_3d(x)[0, 2, 13].any()


def test_three_persons_are_ordered_by_presence() -> None:
    x = np.random.default_rng(2).normal(size=(3, 6, 25, 3)) + 5
    x[0, :4] = 0
    x[1, :2] = 0
    y = tf.pre_normalize_3d(x, spine=None, shoulders=None)
    np.testing.assert_allclose(y[0, :, 3] + x[2, 0, 1], x[2, :, 3])
    assert tf.person_mask(y).tolist() == [True, True, True]


@pytest.mark.parametrize("names, spine, shoulders", [
    (["hip_center", "spine", "shoulder_center", "left_shoulder", "right_shoulder"], (0, 1), (4, 3)),
    (["Torso", "Neck", "Left-Shoulder", "RIGHT SHOULDER", "head"], (0, 1), (3, 2)),
    (["pelvis", "chest", "l_shoulder", "r_shoulder", "head"], (0, 1), (3, 2)),
    (["waist", "chest", "left_upper_arm", "right_upper_arm", "head"], (0, 1), (3, 2)),
    (["p0", "p1", "p2", "p3", "p4"], None, None),
], ids=["kinect1", "sbu", "short", "arms", "unnamed"])
def test_body_axes_follow_from_joint_names(names: list[str], spine: object, shoulders: object) -> None:
    axes = body_axes(Skeleton.load({"joints": names, "edges": [[i, 0] for i in range(1, 5)], "root": 0}))
    assert (axes.centre, axes.spine, axes.shoulders) == (0, spine, shoulders)


def test_body_axes_of_ntu_are_pyskls() -> None:
    axes = body_axes(NTU)
    assert (axes.centre, axes.spine, axes.shoulders) == (1, (0, 1), (8, 4))


def test_pre_normalize_2d_auto_fills_the_box_of_visible_joints() -> None:
    rng = np.random.default_rng(3)
    x = rng.uniform(100, 900, size=(1, 4, 17, 2))
    score = np.ones((1, 4, 17))
    score[0, 0, 0], x[0, 0, 0] = 0, 5000
    y = tf.pre_normalize_2d(x, score, mode="auto")
    seen = y[score > 0]
    np.testing.assert_allclose([seen[:, :2].min(0), seen[:, :2].max(0)], [[-1, -1], [1, 1]], atol=1e-6)
    assert y[0, 0, 0].tolist() == [0, 0, 0]


def test_a_box_spans_one_to_one_on_every_axis_and_leaves_the_absent_out() -> None:
    x = np.random.default_rng(4).normal(size=(3, 5, 6, 3)).astype(np.float32) * (1, 20, 0.1) + 7
    x[1, 2:] = 0  # leaves after two frames
    x[2] = 0  # never there
    y = tf.fit_box(x)
    bodies = y[[0, 1], :2].reshape(-1, 3), y[0, 2:].reshape(-1, 3)
    limits = [np.concatenate(bodies).min(0), np.concatenate(bodies).max(0)]
    np.testing.assert_allclose(limits, [[-1] * 3, [1] * 3], atol=1e-6)
    assert not y[2].any() and not y[1, 2:].any() and y.dtype == x.dtype
    # A box does not feel a shift or a factor per axis, and keeps proportions along an axis.
    there = (x != 0).any((2, 3), keepdims=True)
    np.testing.assert_allclose(tf.fit_box(np.where(there, x * (2, 3, 4) - 5, 0)), y, atol=1e-4)
    ratio = lambda z: (z[0, 0, 1] - z[0, 0, 0]) / (z[0, 3, 1] - z[0, 3, 0])
    np.testing.assert_allclose(ratio(x), ratio(y), rtol=1e-3)


def test_a_box_without_extent_is_zero_there() -> None:
    x = np.ones((1, 2, 3, 3), np.float32) * 4
    x[0, 0, 0, 0] = 2
    y = tf.fit_box(x)
    assert y[0, 0, 0].tolist() == [-1, 0, 0] and y[0, 1, 2].tolist() == [1, 0, 0]
    assert not tf.fit_box(np.zeros((1, 2, 3, 3))).any()


# ---- sampling ------------------------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None)
@given(frames=st.integers(1, 400), length=st.integers(1, 130), seed=st.integers(0, 2**31))
def test_uniform_sample_is_in_range_and_in_order(frames: int, length: int, seed: int) -> None:
    index = tf.uniform_sample(frames, length, np.random.default_rng(seed))
    assert index.shape == (length,) and index.dtype == np.int64
    assert index.min() >= 0 and index.max() < frames
    if frames >= length:
        assert (np.diff(index) >= 1).all()
    if frames >= 2 * length:
        edges = [i * frames // length for i in range(length + 1)]
        assert all(edges[i] <= index[i] < edges[i + 1] for i in range(length))
    if frames < length:
        assert ((np.diff(index) == 1) | (np.diff(index) == 1 - frames)).all()


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 300), length=st.integers(1, 120), clips=st.integers(1, 12), decode=st.booleans())
def test_test_clips_repeat_and_stay_in_range(frames: int, length: int, clips: int, decode: bool) -> None:
    first, second = (tf.sample_test_clips(frames, length, clips, decode=decode) for _ in range(2))
    assert first.shape == (clips, length) and (first == second).all()
    assert first.min() >= 0 and first.max() < frames


@pytest.mark.parametrize("draw", [tf.uniform_sample, tf.ordered_sample])
def test_sampling_refuses_an_empty_sequence(draw: object) -> None:
    with pytest.raises(ValueError, match="num_frames"):
        draw(0, 10, np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 300), length=st.integers(1, 120), clips=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_ordered_samples_never_go_back_and_the_first_test_clip_is_even(frames: int, length: int, clips: int, seed: int) -> None:
    index = tf.ordered_sample(frames, length, np.random.default_rng(seed))
    test = tf.ordered_test_clips(frames, length, clips)
    assert index.shape == (length,) and test.shape == (clips, length) and index.dtype == test.dtype == np.int64
    for row in (index, *test):
        assert row.min() >= 0 and row.max() < frames and (np.diff(row) >= 0).all()
    steps = np.diff(test[0])
    assert test[0, 0] == 0 and (length == 1 or test[0, -1] == frames - 1) and (length == 1 or steps.max() - steps.min() <= 1)
    assert (test == tf.ordered_test_clips(frames, length, clips)).all()


def test_ordered_samples_reach_all_frames_alike() -> None:
    rng = np.random.default_rng(5)
    drawn = np.concatenate([tf.ordered_sample(8, 16, rng) for _ in range(500)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=8) / len(drawn), 1 / 8, rtol=0.12)


# ---- streams, augmentation, persons ----------------------------------------------------------------------------

def test_unknown_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="stream='x'"):
        tf.streams_of("x")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), score=st.booleans())
def test_streams_by_their_definition(seed: int, score: bool) -> None:
    x = np.random.default_rng(seed).normal(size=(2, 6, 17, 3))
    made = dict(zip(tf.STREAMS, np.split(tf.skeleton_features(x, tf.STREAMS, COCO.bones, score, score), 4, axis=-1),
                    strict=True))
    for joint, parent in COCO.bones:
        want = x[:, :, joint] - x[:, :, parent]
        if score:
            want[..., 2] = (x[:, :, joint, 2] + x[:, :, parent, 2]) / 2
        np.testing.assert_allclose(made["b"][:, :, joint], want, atol=1e-6)
    np.testing.assert_allclose(made["jm"][:, :-1, :, :2], x[:, 1:, :, :2] - x[:, :-1, :, :2])
    assert not made["jm"][:, -1].any() and not made["bm"][:, -1].any()


@settings(max_examples=60, deadline=None)
@given(theta=st.floats(0, 3), seed=st.integers(0, 10**6))
def test_rotations_are_rotations(theta: float, seed: int) -> None:
    for matrix in (tf.random_rotation(theta, np.random.default_rng(seed)),
                   tf.random_rotation_2d(theta, np.random.default_rng(seed))):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)


def test_rotation_matches_three_single_turns() -> None:
    class Fixed(np.random.RandomState):
        def uniform(self, low: float, high: float, size: int) -> np.ndarray:  # type: ignore[override]
            return np.array([0.1, -0.2, 0.3])

    a, b, c = 0.1, -0.2, 0.3
    rx = [[1, 0, 0], [0, np.cos(a), np.sin(a)], [0, -np.sin(a), np.cos(a)]]
    ry = [[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]]
    rz = [[np.cos(c), np.sin(c), 0], [-np.sin(c), np.cos(c), 0], [0, 0, 1]]
    np.testing.assert_allclose(tf.random_rotation(0.5, Fixed()), np.array(rz) @ ry @ rx, atol=1e-15)


def test_rotate_leaves_the_score_alone() -> None:
    x = np.random.default_rng(4).normal(size=(1, 3, 5, 3)).astype(np.float32)
    y = tf.rotate(x, np.array([[0.0, -1.0], [1.0, 0.0]]))
    np.testing.assert_allclose(y, np.stack([-x[..., 1], x[..., 0], x[..., 2]], -1))


@given(seed=st.integers(0, 10**6), scale=st.floats(0, 0.9))
@settings(max_examples=30, deadline=None)
def test_scale_stays_in_its_range(seed: int, scale: float) -> None:
    factors = tf.random_scale(scale, 3, np.random.default_rng(seed))
    assert factors.shape == (3,) and (abs(factors - 1) <= scale + 1e-12).all()


@pytest.mark.parametrize("have, want", [(1, 2), (2, 2), (3, 2), (2, 5), (0, 2)])
def test_persons_are_cut_or_padded_with_zeros(have: int, want: int) -> None:
    x = np.ones((have, 4, 17, 3), np.float16)
    y = tf.format_persons(x, want)
    assert y.shape == (want, 4, 17, 3) and y.dtype == np.float16
    assert tf.person_mask(y).tolist() == [m < have for m in range(want)]


def test_loop_repeats_the_persons_that_are_there() -> None:
    x = np.random.default_rng(5).normal(size=(2, 4, 3, 3))
    np.testing.assert_array_equal(tf.format_persons(x, 5, "loop"), x[[0, 1, 0, 1, 0]])
