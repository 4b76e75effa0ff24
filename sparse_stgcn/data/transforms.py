"""Skeleton transforms in numpy: pure functions on one sequence (M persons, T frames, V joints, C channels).

Where PYSKL has the same transform, the result is the same to the bit, float16 rounding included; the file that
defines it is named in the docstring. Random transforms take their generator as an argument.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError

Random = np.random.Generator | np.random.RandomState
STREAMS = ("j", "b", "jm", "bm")
SEEN = 1e-8  # a 3D coordinate up to this is 0 where the question is who is seen, as in PYSKL


# ---- normalisation -------------------------------------------------------------------------------------------

def pre_normalize_3d(
    keypoint: np.ndarray,
    centre: int = 1,
    spine: tuple[int, int] | None = (0, 1),
    shoulders: tuple[int, int] | None = (8, 4),
) -> np.ndarray:
    """Cut empty frames, put the main person's centre at the origin and, if asked, stand the body upright.

    `keypoint` (M, T, V, 3) -> (M, T', V, 3). The main person is the one that is seen in most frames (the first of
    equals) and comes first; only the frames where that person is seen stay. Joint `centre` of the main person's
    first frame is subtracted from every joint that is not exactly (0, 0, 0). Then `spine` (bottom, top) of that
    frame is turned to +z and the line from shoulders[1] to shoulders[0] to +x; None leaves that turn out.
    A clip in which nobody is seen (no coordinate is beyond 1e-8) becomes zeros, as long as it was. Without turns
    the dtype stays (float16 sums round), with them it is float64.

    PYSKL's `PreNormalize3D` (pose_related.py) for one or two persons; the defaults are its NTU joints.
    """
    seen = (np.abs(keypoint) > SEEN).any(axis=(2, 3))
    if not seen.any():
        return np.zeros_like(keypoint)
    main = int(seen.sum(axis=1).argmax())
    keypoint = keypoint[:, seen[main]]
    if main:
        order = [main, *(m for m in range(len(keypoint)) if m != main)]
        keypoint = keypoint[order]
    return Anchor.of(keypoint[0, 0], centre, spine, shoulders).apply(keypoint)


@dataclass(frozen=True)
class Anchor:
    """Where the body of one frame stands and which way it faces: what `pre_normalize_3d` takes away from all frames.

    Attributes:
        origin: (3,), the position of the centre joint.
        turns: rotations (3, 3), applied one after the other.
    """

    origin: np.ndarray
    turns: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, body: np.ndarray, centre: int, spine: tuple[int, int] | None, shoulders: tuple[int, int] | None) -> Anchor:
        """The anchor of a body (V, 3); the arguments are those of `pre_normalize_3d`."""
        anchor = cls(body[centre].copy())
        for joints, target in ((spine, (0, 0, 1)), (shoulders and shoulders[::-1], (1, 0, 0))):
            if joints is not None:
                turned = anchor.apply(body[None, None])[0, 0]
                direction = turned[joints[1]] - turned[joints[0]]
                turn = _rotation_about(np.cross(direction, target), _angle(direction, np.asarray(target)))
                anchor = cls(anchor.origin, (*anchor.turns, turn))
        return anchor

    def apply(self, keypoint: np.ndarray) -> np.ndarray:
        """(M, T, V, 3) seen from the anchor; joints that are exactly (0, 0, 0) are not moved there."""
        present = (keypoint != 0).any(axis=-1, keepdims=True)
        keypoint = (keypoint - self.origin) * present
        for turn in self.turns:
            # einsum and not matmul: BLAS would sum the three terms in another order.
            keypoint = np.einsum("mtvc,dc->mtvd", keypoint, turn)
        return keypoint


def fit_box(keypoint: np.ndarray) -> np.ndarray:
    """Each axis to [-1, 1]: y = 2 (x - min) / (max - min) - 1, with the limits over all joints of all frames and persons.

    (M, T, V, C) -> (M, T, V, C) in the same dtype. Frames in which a person is not seen (all zeros) have no part in it and
    stay zero; an axis along which nothing moves becomes 0. What CTR-GCN does to Northwestern-UCLA (feeders/feeder_ucla.py).
    """
    seen = (keypoint != 0).any(axis=(2, 3), keepdims=True)
    if not seen.any():
        return keypoint
    bodies = keypoint[seen[..., 0, 0]]
    low, high = bodies.min(axis=(0, 1)), bodies.max(axis=(0, 1))
    size = high - low
    flat = size < 1e-6
    fitted = (keypoint - low) / np.where(flat, 1, size) * 2 - 1
    return np.where(seen & ~flat, fitted, 0).astype(keypoint.dtype)


def pre_normalize_2d(
    keypoint: np.ndarray,
    score: np.ndarray | None = None,
    image: tuple[float, float] = (1080, 1920),
    threshold: float = 0.01,
    mode: str = "fix",
) -> np.ndarray:
    """Pixels to [-1, 1], the score as third channel: (M, T, V, 2) with `score` (M, T, V), or (M, T, V, 3).

    `fix` scales by the image (height, width); `auto` by the box around all visible joints. A joint whose score is
    at most `threshold` gets x = y = 0. float32. Source: PYSKL's `PreNormalize2D` (pose_related.py).
    """
    if mode not in ("fix", "auto"):
        raise UserError(f"Expected mode 'fix' or 'auto'. Got mode={mode!r}.")
    out = keypoint.astype(np.float32)
    if score is not None:
        out = np.concatenate([out, score.astype(np.float32)[..., None]], axis=-1)
    hidden = out[..., 2] <= threshold if out.shape[-1] == 3 else np.zeros(out.shape[:-1], bool)
    if mode == "fix":
        for axis, size in enumerate((image[1], image[0])):
            out[..., axis] = (out[..., axis] - (size / 2)) / (size / 2)
    elif not hidden.all():
        low, high = out[~hidden, :2].min(axis=0), out[~hidden, :2].max(axis=0)
        if (high - low > 10).all():
            for axis in range(2):
                out[..., axis] = (out[..., axis] - (high[axis] + low[axis]) / 2) / (high[axis] - low[axis]) * 2
    out[..., :2][hidden] = 0
    return out


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    if np.abs(a).sum() < 1e-6 or np.abs(b).sum() < 1e-6:
        return 0.0
    return float(np.arccos(np.clip(np.dot(a / np.linalg.norm(a), b / np.linalg.norm(b)), -1.0, 1.0)))


def _rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Euler-Rodrigues: the rotation by `angle` about `axis`; the identity if either vanishes (below 1e-6)."""
    if np.abs(axis).sum() < 1e-6 or abs(angle) < 1e-6:
        return np.eye(3)
    a = np.cos(angle / 2)
    b, c, d = -(axis / np.sqrt(np.dot(axis, axis))) * np.sin(angle / 2)
    return np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c + a * d), 2 * (b * d - a * c)],
        [2 * (b * c - a * d), a * a + c * c - b * b - d * d, 2 * (c * d + a * b)],
        [2 * (b * d + a * c), 2 * (c * d - a * b), a * a + d * d - b * b - c * c],
    ])


# ---- streams -------------------------------------------------------------------------------------------------

def bone(keypoint: np.ndarray, bones: Sequence[tuple[int, int]], score: bool = False) -> np.ndarray:
    """Bone vectors b[v] = x[v] - x[parent(v)] in float32, for the pairs `bones` of (joint, parent); a joint without
    a pair, or paired with itself, gets 0. With `score` the third channel is the mean of the two joints' scores.
    Source: PYSKL's `JointToBone` (pose_related.py)."""
    out = np.zeros(keypoint.shape, np.float32)
    joint, parent = np.asarray(bones, dtype=np.int64).reshape(-1, 2).T
    out[..., joint, :] = keypoint[..., joint, :] - keypoint[..., parent, :]
    if score:
        out[..., joint, 2] = (keypoint[..., joint, 2] + keypoint[..., parent, 2]) / 2
        alone = np.setdiff1d(np.arange(keypoint.shape[-2]), joint)
        out[..., alone, 2] = keypoint[..., alone, 2]
    return out


def motion(keypoint: np.ndarray, score: bool = False) -> np.ndarray:
    """x[t+1] - x[t], 0 in the last frame; with `score` the third channel is the mean of the two frames' scores.
    Source: PYSKL's `ToMotion` (pose_related.py)."""
    out = np.zeros_like(keypoint)
    out[:, :-1] = np.diff(keypoint, axis=1)
    if score:
        out[:, :-1, :, 2] = (keypoint[:, :-1, :, 2] + keypoint[:, 1:, :, 2]) / 2
    return out


def streams_of(stream: str) -> tuple[str, ...]:
    """The features that a stream name asks for: "j", "b", "jm", "bm", or several joined by "+" ("j+b")."""
    feats = tuple(stream.split("+"))
    if not set(feats) <= set(STREAMS):
        raise UserError(f"Expected stream j, b, jm or bm, or some of them joined by '+'. Got stream={stream!r}.")
    return feats


def skeleton_features(
    keypoint: np.ndarray,
    feats: Sequence[str],
    bones: Sequence[tuple[int, int]],
    bone_score: bool = False,
    motion_score: bool = False,
) -> np.ndarray:
    """The features of `feats` (see `streams_of`) side by side on the channel axis: (M, T, V, C * len(feats)).
    Source: PYSKL's `GenSkeFeat` (pose_related.py)."""
    made: dict[str, np.ndarray] = {"j": keypoint}
    if "b" in feats or "bm" in feats:
        made["b"] = bone(keypoint, bones, bone_score)
    if "jm" in feats:
        made["jm"] = motion(keypoint, motion_score)
    if "bm" in feats:
        made["bm"] = motion(made["b"], motion_score)
    return made[feats[0]] if len(feats) == 1 else np.concatenate([made[f] for f in feats], axis=-1)


# ---- frame sampling ------------------------------------------------------------------------------------------

def uniform_sample(num_frames: int, clip_len: int, rng: Random, start: int | None = None) -> np.ndarray:
    """`clip_len` frame numbers in [0, num_frames), int64, one clip of PYSKL's `UniformSample` (sampling.py).

    n < L: L consecutive frames modulo n from a random one (or from `start`). L <= n < 2 L: n - L of the L + 1
    gaps are chosen and each skips one frame. n >= 2 L: one frame from each of L equal bins. The generator is used
    in PYSKL's order, so that `np.random.RandomState` gives PYSKL's frames.
    """
    if num_frames < 1 or clip_len < 1:
        raise UserError(f"Expected num_frames and clip_len of at least 1. Got {num_frames} and {clip_len}.")
    integers = rng.integers if isinstance(rng, np.random.Generator) else rng.randint
    if isinstance(rng, np.random.RandomState):
        rng.random_sample()  # PYSKL draws the length of the crop, which is the whole clip in its GCN recipes
        integers(1)
    if num_frames < clip_len:
        first = int(integers(num_frames)) if start is None else start
        return np.arange(first, first + clip_len) % num_frames
    if num_frames < 2 * clip_len:
        skip = np.zeros(clip_len + 1, np.int64)
        skip[rng.choice(clip_len + 1, num_frames - clip_len, replace=False)] = 1
        return np.arange(clip_len) + np.cumsum(skip)[:-1]
    edges = np.arange(clip_len + 1) * num_frames // clip_len
    return edges[:-1] + integers(np.diff(edges))


def ordered_sample(num_frames: int, clip_len: int, rng: Random) -> np.ndarray:
    """`clip_len` frame numbers in [0, num_frames), int64: drawn with repetition, then put in order of time.

    A sequence that is shorter than the clip is stretched, where `uniform_sample` begins it again. Source: CTR-GCN's
    feeders/feeder_ucla.py, in training.
    """
    if num_frames < 1 or clip_len < 1:
        raise UserError(f"Expected num_frames and clip_len of at least 1. Got {num_frames} and {clip_len}.")
    integers = rng.integers if isinstance(rng, np.random.Generator) else rng.randint
    return np.sort(integers(num_frames, size=clip_len))


def ordered_test_clips(num_frames: int, clip_len: int, num_clips: int = 10, seed: int = 255) -> np.ndarray:
    """Frame numbers (num_clips, clip_len) of the test: evenly spaced from the first to the last, then `ordered_sample`s,
    the same for every run. CTR-GCN's feeders/feeder_ucla.py tests on the first alone."""
    rng = np.random.RandomState(seed)
    even = np.linspace(0, num_frames - 1, clip_len).astype(np.int64)
    return np.stack([even, *(ordered_sample(num_frames, clip_len, rng) for _ in range(num_clips - 1))])


def sample_test_clips(
    num_frames: int, clip_len: int, num_clips: int = 10, seed: int = 255, decode: bool = False
) -> np.ndarray:
    """Frame numbers (num_clips, clip_len) of the test: the same for every run.

    PYSKL's `UniformSample` in test mode (seed 255 per sequence; a sequence shorter than the clip starts at
    i n // num_clips instead of at random), or with `decode` its `UniformSampleDecode` (always at random).
    """
    rng = np.random.RandomState(seed)
    clips = []
    for i in range(num_clips):
        start = None if decode else (i if num_frames < num_clips else i * num_frames // num_clips)
        clips.append(uniform_sample(num_frames, clip_len, rng, start))
    return np.stack(clips)


# ---- augmentation --------------------------------------------------------------------------------------------

def random_rotation(theta: float, rng: Random) -> np.ndarray:
    """Rz Ry Rx with three angles from U(-theta, theta) radians, (3, 3) float64. Source: PYSKL's `RandomRot`."""
    (cx, cy, cz), (sx, sy, sz) = (f(angles) for angles in [rng.uniform(-theta, theta, size=3)] for f in (np.cos, np.sin))
    rx = np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
    ry = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    rz = np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
    return rz @ (ry @ rx)


def random_rotation_2d(theta: float, rng: Random) -> np.ndarray:
    """Rotation in the image plane by an angle from U(-theta, theta) radians, (2, 2) float64."""
    angle = rng.uniform(-theta, theta)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def random_scale(scale: float | Sequence[float], channels: int, rng: Random) -> np.ndarray:
    """Factors 1 + U(-1, 1) scale, one per axis, (channels,) float64. Source: PYSKL's `RandomScale`."""
    return 1 + rng.uniform(-1, 1, size=channels) * np.broadcast_to(np.asarray(scale, np.float64), (channels,))


def rotate(keypoint: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """y = R x for the first coordinates of every joint; further channels (a score) stay."""
    size = matrix.shape[0]
    out = np.array(keypoint, dtype=np.result_type(keypoint, np.float32))
    out[..., :size] = np.einsum("ab,...b->...a", matrix, keypoint[..., :size])
    return out


# ---- persons -------------------------------------------------------------------------------------------------

def format_persons(keypoint: np.ndarray, num_person: int = 2, mode: str = "zero") -> np.ndarray:
    """Exactly `num_person` persons: the first ones stay, missing ones are zeros (`zero`) or repeat the persons that
    are there (`loop`). PYSKL's `FormatGCNInput`, whose own `loop` pads with zeros too."""
    if mode not in ("zero", "loop"):
        raise UserError(f"Expected mode 'zero' or 'loop'. Got mode={mode!r}.")
    have = len(keypoint)
    if have >= num_person:
        return keypoint[:num_person]
    if mode == "loop" and have:
        return keypoint[np.arange(num_person) % have]
    pad = np.zeros((num_person - have, *keypoint.shape[1:]), keypoint.dtype)
    return np.concatenate([keypoint, pad])


def split_clips(keypoint: np.ndarray, num_clips: int) -> np.ndarray:
    """(M, clips L, V, C) -> (clips, M, L, V, C), contiguous."""
    m, t, v, c = keypoint.shape
    return np.ascontiguousarray(keypoint.reshape(m, num_clips, t // num_clips, v, c).transpose(1, 0, 2, 3, 4))


def person_mask(keypoint: np.ndarray) -> np.ndarray:
    """(..., M, T, V, C) -> (..., M) bool: True where the person is seen in at least one frame."""
    return (keypoint != 0).any(axis=(-3, -2, -1))


# ---- missing joints ------------------------------------------------------------------------------------------

MISSING = ("keep", "interpolate", "zero", "drop")


def missing_joints(keypoint: np.ndarray, axes: int = 3) -> np.ndarray:
    """(M, T, V) bool: a channel is not finite, or the first `axes` are exactly 0 while the person is seen in that
    frame."""
    finite = np.isfinite(keypoint).all(axis=-1)
    there = finite & (keypoint[..., :axes] != 0).any(axis=-1)
    return ~finite | (~there & there.any(axis=-1, keepdims=True))


def fill_missing(keypoint: np.ndarray, policy: str, axes: int = 3) -> np.ndarray:
    """Repair joints that are missing (see `missing_joints`) in `keypoint` (M, T, V, C); `axes` is 2 where the third
    channel is a score.

    `keep` changes nothing. `zero` sets joints that are not finite to 0. `interpolate` also draws a straight line
    in time through the frames where the joint was seen (held at both ends); a joint never seen, and a person who
    is absent, stay 0. `drop` removes the frames with a missing joint; if that is all frames in which somebody is
    seen, those of them with the fewest missing joints stay.
    """
    if policy not in MISSING:
        raise UserError(f"Expected missing policy {', '.join(MISSING)}. Got missing={policy!r}.")
    if policy == "keep":
        return keypoint
    lost = missing_joints(keypoint, axes)
    if not lost.any():
        return keypoint
    out = np.where(lost[..., None], keypoint.dtype.type(0), keypoint)
    if policy == "drop":
        count, seen = lost.sum(axis=(0, 2)), (out[..., :axes] != 0).any(axis=(0, 2, 3))
        # A frame without anybody misses no joint, and must not be all that is left of a person.
        return out[:, count == (count[seen] if seen.any() else count).min()]
    if policy == "interpolate":
        present = (out[..., :axes] != 0).any(axis=(2, 3))
        frames = np.arange(keypoint.shape[1])
        for m, v in zip(*np.nonzero(lost.any(axis=1)), strict=True):
            good = present[m] & ~lost[m, :, v]
            want = present[m] & lost[m, :, v]
            if good.any() and want.any():
                for c in range(keypoint.shape[-1]):
                    out[m, want, v, c] = np.interp(frames[want], frames[good], out[m, good, v, c])
    return out
