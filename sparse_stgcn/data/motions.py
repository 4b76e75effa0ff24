"""The synthetic actions as joint angles over time: what `kinematics` turns into coordinates."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .kinematics import CHEST, ELBOW, HIP, KNEE, LEFT, NECK, RIGHT, SHOULDER, SPINE

FLEX, SPREAD, TWIST = 0, 1, 2
Angle = float | np.ndarray


class Pose:
    """Angles of one person over T frames, starting from an idle stance that differs from sequence to sequence.

    Attributes:
        angles: (T, 25, 3) radians (see `kinematics.forward_kinematics`).
        place: (T, 3) where the person stands on the ground, metres; `heading` (T,) which way, radians.
        lift: (T,) metres of both feet above the ground.
        beat: (T,) phase of the action, radians; `rise`: (T,) from 0 to 1 once, for actions that happen once.
        strength: amplitude of the action, about 1.
    """

    def __init__(self, num_frames: int, rng: np.random.RandomState) -> None:
        self.rng = rng
        self.time = np.arange(num_frames) / 30.0  # seconds at 30 frames per second
        share = np.linspace(0, 1, num_frames)
        self.angles = np.zeros((num_frames, 25, 3))
        self.place, self.lift = np.zeros((num_frames, 3)), np.zeros(num_frames)
        self.heading = np.zeros(num_frames)
        cycles = np.clip(self.time[-1] * rng.uniform(0.7, 1.5), 1.6, 4.2)
        self.beat = 2 * np.pi * (cycles * share + rng.uniform())
        begin, length = rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.55)
        self.rise = _smooth((share - begin) / length)
        self.strength = rng.uniform(0.85, 1.2)
        self._stand(share)

    def _stand(self, share: np.ndarray) -> None:
        """An idle stance: where the arms rest, how the trunk leans, and a slow sway."""
        u = self.rng.uniform
        for side in (LEFT, RIGHT):
            rest = self.rng.randint(3)
            flex, spread, twist, elbow = [
                (u(-0.2, 0.4), u(0.03, 0.35), u(-0.3, 0.5), u(0.05, 0.8)),   # hanging
                (u(-0.5, -0.2), u(0.5, 0.9), u(0.7, 1.1), u(1.4, 1.9)),      # hand on the hip
                (u(-0.1, 0.2), u(0.03, 0.2), u(-0.2, 0.2), u(0.0, 0.3)),     # straight down
            ][rest]
            self.arm(side, flex, spread, twist, elbow)
            self.leg(side, u(-0.05, 0.12), u(0.0, 0.25), u(0.0, 0.15))
        self.trunk(u(-0.1, 0.2), u(-0.12, 0.12), u(-0.3, 0.3))
        self.angles[:, NECK] = (u(-0.4, 0.2), u(-0.2, 0.2), u(-0.5, 0.5))
        for joint, size in ((SPINE, 0.05), (NECK, 0.15), *((j, 0.08) for j in (*SHOULDER, *ELBOW))):
            wave = np.sin(2 * np.pi * (u(0.2, 0.9, 3) * self.time[:, None] + u(size=3)))
            self.angles[:, joint] += size * u(0, 1, 3) * wave
        turn, drift = u(-0.4, 0.4), u(-0.4, 0.4, 2)
        self.heading += turn * (share - share[0])
        self.place[:, ::2] += drift * share[:, None]

    def arm(self, side: int, flex: Angle, spread: Angle = 0.0, twist: Angle = 0.0, elbow: Angle = 0.0) -> None:
        """Set an arm, a little off as every person does it differently: radians, scalars or (T,)."""
        off = self.rng.uniform(-0.15, 0.15, 4)
        for axis, value in enumerate((flex, spread, twist)):
            self.angles[:, SHOULDER[side], axis] = value + off[axis]
        self.angles[:, ELBOW[side], FLEX] = np.maximum(elbow + off[3], 0.0)

    def leg(self, side: int, flex: Angle, spread: Angle = 0.0, knee: Angle = 0.0) -> None:
        """Set a leg: hip flexion, spread, knee flexion."""
        self.angles[:, HIP[side], FLEX] = flex
        self.angles[:, HIP[side], SPREAD] = spread
        self.angles[:, KNEE[side], FLEX] = -np.asarray(knee)

    def trunk(self, bend: Angle, lean: Angle = 0.0, turn: Angle = 0.0) -> None:
        """Set the trunk: forward bend (half at the base, half at the spine), sideways lean, turn."""
        bend = np.asarray(bend)
        self.angles[:, SPINE, FLEX], self.angles[:, CHEST, FLEX] = -0.6 * bend, -0.4 * bend
        self.angles[:, SPINE, SPREAD] = lean
        self.angles[:, SPINE, TWIST] = turn

    @property
    def pulse(self) -> np.ndarray:
        """0 to 1 and back with every beat."""
        return (1 - np.cos(self.beat)) / 2


def _smooth(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _wave(p: Pose, side: int) -> None:
    swing = 0.55 * p.strength * np.sin(p.beat)
    p.arm(side, 0.3, 1.5, -1.3 + swing, 1.6 - 0.3 * swing)


def wave_right(p: Pose) -> None:
    """The right forearm up, swinging sideways."""
    _wave(p, RIGHT)


def wave_left(p: Pose) -> None:
    """The left forearm up, swinging sideways."""
    _wave(p, LEFT)


def clap(p: Pose) -> None:
    """Both forearms in front of the chest, hands meeting."""
    for side in (LEFT, RIGHT):
        p.arm(side, 0.8, 0.1, 0.9 - 1.0 * p.strength * p.pulse, 1.2)


def jumping_jack(p: Pose) -> None:
    """Arms up and legs apart in the same beat, with a hop."""
    for side in (LEFT, RIGHT):
        p.arm(side, 0.1, 0.2 + 2.5 * p.pulse, 0.0, 0.2)
        p.leg(side, 0.05, 0.05 + 0.45 * p.strength * p.pulse, 0.05)
    p.lift += 0.12 * np.abs(np.sin(p.beat / 2 + 0.4))


def kick(p: Pose) -> None:
    """The right leg swings forward, the knee straightens at the top."""
    p.leg(RIGHT, -0.3 + 1.8 * p.strength * p.pulse, 0.05, 0.9 * np.maximum(np.sin(p.beat), 0))
    p.trunk(-0.2 * p.pulse)


def bow(p: Pose) -> None:
    """The trunk bends forward and comes back, legs straight."""
    p.trunk(0.1 + 1.3 * p.strength * p.pulse)
    p.angles[:, NECK, FLEX] -= 0.3 * p.pulse


def crawl(p: Pose) -> None:
    """Both straight arms go round forward in turns, as a swimmer's."""
    for side, phase in ((LEFT, 0.0), (RIGHT, np.pi)):
        p.arm(side, p.beat + phase, 0.15, 0.0, 0.2)
    p.trunk(0.3, 0.0, 0.3 * np.sin(p.beat))


def drink(p: Pose) -> None:
    """The right hand goes to the mouth and back."""
    up = 0.25 + 0.75 * p.pulse
    p.arm(RIGHT, 1.0 * up, 0.3, 0.7 * up, 0.7 + 1.5 * up)
    p.angles[:, NECK, FLEX] += 0.3 * p.pulse


def _sit(p: Pose, down: np.ndarray) -> None:
    for side in (LEFT, RIGHT):
        p.leg(side, 1.5 * down, 0.15, 1.5 * down)
    p.trunk(0.1 + 0.9 * down * (1 - down) * 4 * 0.5)


def sit_down(p: Pose) -> None:
    """From standing to sitting, once."""
    _sit(p, p.rise)


def stand_up(p: Pose) -> None:
    """From sitting to standing, once."""
    _sit(p, 1 - p.rise)


def walk(p: Pose) -> None:
    """Steps of both legs against the swing of both arms; who calls it moves the person along."""
    swing = 0.5 * p.strength * np.sin(2 * p.beat)
    for side, sign in ((LEFT, 1), (RIGHT, -1)):
        p.leg(side, 0.1 + sign * swing, 0.05, 0.15 + 0.6 * np.maximum(sign * np.cos(2 * p.beat), 0))
        p.arm(side, -0.8 * sign * swing, 0.1, 0.0, 0.3)


def shake_hand(p: Pose) -> None:
    """The right arm reaches forward and pumps."""
    pump = 0.25 * p.strength * np.sin(2 * p.beat)
    p.arm(RIGHT, 0.9 + pump, 0.0, 0.3, 0.75 - 0.8 * pump)


def idle(p: Pose) -> None:
    """Nothing but the stance."""


SINGLE: dict[str, Callable[[Pose], None]] = {
    "wave right hand": wave_right, "wave left hand": wave_left, "clap": clap,
    "jumping jack": jumping_jack, "kick": kick, "bow": bow, "swim": crawl, "drink": drink,
    "sit down": sit_down, "stand up": stand_up,
}
# Two persons: the motion of each, their distance (m) at the start and the end, and whether they face each other.
# Who walks towards the other and who walks away does the same: only where the other one is tells them apart.
PAIRED: dict[str, tuple[Callable[[Pose], None], tuple[float, float], tuple[float, float], bool]] = {
    "shake hands": (shake_hand, (0.8, 1.05), (0.8, 1.05), True),
    "walk towards each other": (walk, (2.6, 3.6), (0.7, 1.2), True),
    "walk apart": (walk, (0.7, 1.2), (2.6, 3.6), False),
}
