"""A synthetic data set: 13 actions of simulated people, three of them done by two, seen from anywhere."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from .archive import Archive
from .kinematics import ANKLE, BASE, CHEST, FOOT, SPINE, forward_kinematics, rest_offsets
from .motions import PAIRED, SINGLE, Pose, idle

CLASSES = (*SINGLE, *PAIRED)
SUBJECTS = 20
_TRUNK = (BASE, SPINE, CHEST, 4, 8)


def make(num_sequences: int = 600, seed: int = 0) -> Archive:
    """`num_sequences` labelled sequences of 30 to 120 frames at 30 frames per second: M = 2, V = 25 (nturgb+d), C = 3.

    Joint angles of an action (`motions`) pass through forward kinematics on the body of one of 20 subjects and are
    seen by a camera. What differs between two sequences of a class: body, stance, speed, phase, amplitude, place,
    viewpoint, measurement noise, lost joints (zeros), an idle bystander, and when the second person is seen. Every
    class is equally frequent; every fourth subject is held out for the test split. Sequence i depends on (seed, i)
    only; the numbers come from `numpy.random.RandomState`, whose streams never change.

    Raises:
        UserError: fewer than two sequences per class.
    """
    if num_sequences < 2 * len(CLASSES):
        raise UserError(f"Expected at least {2 * len(CLASSES)} sequences, two for each of the {len(CLASSES)} synthetic "
                        f"classes. Got sequences={num_sequences}.")
    number = np.arange(num_sequences)
    label, subject = number % len(CLASSES), 3 * (number // len(CLASSES)) % SUBJECTS
    scenes = [_Scene(CLASSES[label[i]], int(subject[i]), np.random.RandomState([seed, int(i)])) for i in number]
    points = _simulate([pose for scene in scenes for pose in scene.poses],
                       [body for scene in scenes for body in scene.bodies])
    views = [scene.observe([next(points) for _ in scene.poses]) for scene in scenes]
    offset = np.concatenate([[0], np.cumsum([len(view) for view in views])])
    test = subject % 4 == 3
    return Archive(
        np.concatenate(views), offset, label, Skeleton.load("nturgb+d"), CLASSES,
        {"train": ~test, "test": test}, fields={"subject": subject},
        info={"fps": 30.0, "unit": "m", "up": "y", "protocol": "cross-subject: test on every fourth of 20 subjects",
              "source": f"sparse_stgcn.data.synthetic.make({num_sequences}, seed={seed})", "finite": True},
        name="synthetic",
    )


class _Scene:
    """Who does what where, and the camera that looks at it."""

    def __init__(self, action: str, subject: int, rng: np.random.RandomState) -> None:
        self.rng = rng
        frames = rng.randint(30, 121)
        self.bodies = [_body(subject, rng)]
        self.poses = [Pose(frames, rng)]
        if action in SINGLE:
            SINGLE[action](self.poses[0])
            if rng.uniform() < 0.3:
                self._add_bystander(frames)
        else:
            self._add_partner(action, frames)
        self.paired = action in PAIRED

    def _add_bystander(self, frames: int) -> None:
        other = Pose(frames, self.rng)
        idle(other)
        angle, distance = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.8, 2.5)
        other.place += (distance * np.sin(angle), 0, distance * np.cos(angle))
        other.heading += self.rng.uniform(0, 2 * np.pi)
        self._add(other)

    def _add_partner(self, action: str, frames: int) -> None:
        motion, start, end, facing = PAIRED[action]
        other = Pose(frames, self.rng)
        for pose in (self.poses[0], other):
            motion(pose)
        begin = self.rng.uniform(*start)
        stop = begin if start == end else self.rng.uniform(*end)
        distance = np.linspace(begin, stop, frames)
        aside = self.rng.uniform(-0.15, 0.15)
        for pose, sign in ((self.poses[0], -1), (other, 1)):
            pose.place[:, 2] = sign * distance / 2 + 0.2 * pose.place[:, 2]
            pose.place[:, 0] = sign * aside + 0.2 * pose.place[:, 0]
            turned = 0.4 * (pose.heading - pose.heading[0]) + self.rng.uniform(-0.2, 0.2)
            pose.heading = turned + (np.pi if (sign > 0) == facing else 0.0)
        self._add(other)

    def _add(self, other: Pose) -> None:
        self.poses.append(other)
        self.bodies.append(_body(self.rng.randint(SUBJECTS), self.rng))

    def observe(self, points: list[np.ndarray]) -> np.ndarray:
        """What the camera reports: (T, 2, 25, 3) float32, noise and losses included."""
        rng = self.rng
        yaw, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.4)
        cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        view = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        away = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.4, 0.2), rng.uniform(2.5, 4.5)])
        frames = len(points[0])
        out = np.zeros((frames, 2, 25, 3))
        noise = rng.uniform(0.003, 0.012)
        for m, person in enumerate(points):
            out[:, m] = person @ view.T + away + noise * rng.standard_normal(person.shape)
            self._lose_joints(out[:, m])
        if len(points) == 2 and not self.paired:
            # A bystander may come late or leave early, as trackers see it.
            late, early = (rng.randint(0, frames // 2) if rng.uniform() < 0.4 else 0 for _ in range(2))
            out[:late, 1] = 0
            out[frames - early:, 1] = 0
        return out.astype(np.float32)

    def _lose_joints(self, person: np.ndarray) -> None:
        for joint in np.flatnonzero(self.rng.uniform(size=25) < 0.04):
            length = self.rng.randint(2, 12)
            # The trunk is seen in the first frame: the normalisation of every later one hangs on it.
            begin = self.rng.randint(1 if joint in _TRUNK else 0, len(person))
            person[begin:begin + length, joint] = 0


def _body(subject: int, rng: np.random.RandomState) -> np.ndarray:
    """Offsets (25, 3) of a subject, with the small difference that two measurements of a person have."""
    person = np.random.RandomState([7919, subject])
    parts = ("trunk", "shoulders", "hips", "arms", "legs")
    proportions = {part: person.uniform(0.85, 1.15) * rng.uniform(0.98, 1.02) for part in parts}
    return rest_offsets(proportions, person.uniform(0.8, 1.15))


def _simulate(poses: list[Pose], bodies: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Coordinates of every pose in turn, standing on the ground y = 0; one pass over the frames of all of them."""
    lengths = [len(pose.angles) for pose in poses]
    points = forward_kinematics(
        np.concatenate([pose.angles for pose in poses]),
        np.repeat(np.stack(bodies), lengths, axis=0),
        np.concatenate([pose.heading for pose in poses]),
    )
    ground = points[:, [*ANKLE, *FOOT], 1].min(axis=1)
    place = np.concatenate([pose.place for pose in poses])
    place[:, 1] += np.concatenate([pose.lift for pose in poses]) - ground
    points += place[:, None]
    return iter(np.split(points, np.cumsum(lengths)[:-1]))
