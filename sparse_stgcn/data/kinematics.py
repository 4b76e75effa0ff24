"""Forward kinematics of the 25-joint NTU body: from joint angles to coordinates."""
from __future__ import annotations

import numpy as np

from ..skeleton import Skeleton

# Joints of the layout nturgb+d by short names.
BASE, SPINE, NECK, HEAD, CHEST = 0, 1, 2, 3, 20
SHOULDER, ELBOW, WRIST, HAND, TIP, THUMB = (4, 8), (5, 9), (6, 10), (7, 11), (21, 23), (22, 24)
HIP, KNEE, ANKLE, FOOT = (12, 16), (13, 17), (14, 18), (15, 19)
LEFT, RIGHT = 0, 1
_RIGHT_JOINTS = (8, 9, 10, 11, 16, 17, 18, 19, 23, 24)

# Where a joint sits as seen from the joint that carries it, metres, standing with hanging arms:
# x to the person's left, y up, z forward. Right limbs are the mirror image.
_REST = {
    SPINE: (0, 0.24, -0.01), CHEST: (0, 0.24, 0), NECK: (0, 0.08, 0), HEAD: (0, 0.18, 0.02),
    SHOULDER[LEFT]: (0.18, -0.03, 0), ELBOW[LEFT]: (0.02, -0.29, 0), WRIST[LEFT]: (0, -0.25, 0.01),
    HAND[LEFT]: (0, -0.08, 0.01), TIP[LEFT]: (0, -0.09, 0.01), THUMB[LEFT]: (-0.03, -0.04, 0.04),
    HIP[LEFT]: (0.09, -0.05, 0), KNEE[LEFT]: (0.01, -0.42, 0.01), ANKLE[LEFT]: (0, -0.40, -0.02),
    FOOT[LEFT]: (0.01, -0.06, 0.13),
}
_PARTS = {  # which proportion of a body stretches which offsets
    "trunk": (SPINE, CHEST, NECK, HEAD), "shoulders": SHOULDER, "hips": HIP,
    "arms": (*ELBOW, *WRIST, *HAND, *TIP, *THUMB), "legs": (*KNEE, *ANKLE, *FOOT),
}


def rest_offsets(proportions: dict[str, float], height: float = 1.0) -> np.ndarray:
    """Offsets (25, 3) of every joint from the one that carries it, for a body with these proportions (1 = average)
    of trunk, shoulders, hips, arms and legs."""
    offsets = np.zeros((25, 3))
    for joint, offset in _REST.items():
        offsets[joint] = offset
    for left, right in (SHOULDER, ELBOW, WRIST, HAND, TIP, THUMB, HIP, KNEE, ANKLE, FOOT):
        offsets[right] = offsets[left] * (-1, 1, 1)
    for part, joints in _PARTS.items():
        offsets[list(joints)] *= proportions[part]
    return offsets * height


def forward_kinematics(angles: np.ndarray, offsets: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """Coordinates (P, 25, 3) of P poses with the base of the spine at the origin.

    `angles` (P, 25, 3) turn the bones that start at a joint: flex (about x, positive = forward for a hanging limb),
    spread (about z, positive = away from the body) and twist (about the limb, positive = inwards); the matrix is
    R = Rz(spread) Rx(-flex) Ry(-twist), mirrored for right limbs. `offsets` (P, 25, 3) as from `rest_offsets`;
    `heading` (P,) turns the whole body about y, 0 = facing +z.
    """
    skeleton = Skeleton.load("nturgb+d")
    # The chain starts at the base of the spine; the layout's root is the chest, so two edges run the other way.
    parent = dict(skeleton.edges) | {SPINE: BASE, CHEST: SPINE}
    del parent[BASE]
    points = np.zeros_like(offsets)
    turns = {BASE: _turn_y(heading) @ _matrix(angles[:, BASE])}
    waiting = [joint for joint in range(25) if joint != BASE]
    while waiting:
        for joint in [j for j in waiting if parent[j] in turns]:
            above = turns[parent[joint]]
            points[:, joint] = points[:, parent[joint]] + np.einsum("pij,pj->pi", above, offsets[:, joint])
            local = angles[:, joint] * ((1, -1, -1) if joint in _RIGHT_JOINTS else (1, 1, 1))
            turns[joint] = above @ _matrix(local) if local.any() else above
            waiting.remove(joint)
    return points


def _turn_y(angle: np.ndarray) -> np.ndarray:
    zero, one = np.zeros_like(angle), np.ones_like(angle)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c, zero, s, zero, one, zero, -s, zero, c], axis=-1).reshape(-1, 3, 3)


def _matrix(angles: np.ndarray) -> np.ndarray:
    """Rz(spread) Rx(-flex) Ry(-twist) written out, (P, 3, 3)."""
    (cx, cz, cy), (sx, sz, sy) = (f(angles.T * [[-1], [1], [-1]]) for f in (np.cos, np.sin))
    return np.stack([
        cz * cy - sz * sx * sy, -sz * cx, cz * sy + sz * sx * cy,
        sz * cy + cz * sx * sy, cz * cx, sz * sy - cz * sx * cy,
        -cx * sy, sx, cx * cy,
    ], axis=-1).reshape(-1, 3, 3)
