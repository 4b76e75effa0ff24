"""Joints of one layout in the order of another, matched by their names."""
from __future__ import annotations

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from .body import plain_name

__all__ = ["joint_order"]


def joint_order(source: Skeleton, target: Skeleton) -> np.ndarray | None:
    """(V of target,) where in ``source`` each joint of ``target`` is; None if the two have the same joints in the same order.

    Names match whatever their case, "_" and "-" are, but the same name before all others; joints that only ``source`` has are
    left out.

    Raises:
        UserError: ``target`` has a joint that ``source`` does not name.
    """
    if source.joints == target.joints:
        return None
    have = {plain_name(name): i for i, name in reversed(list(enumerate(source.joints)))}
    have |= {name: i for i, name in enumerate(source.joints)}
    want = [name if name in source.joints else plain_name(name) for name in target.joints]
    missing = [joint for joint, name in zip(target.joints, want, strict=True) if name not in have]
    if missing:
        raise UserError(f"Expected layout to name all joints of '{target.name}', which the network was trained on. Got layout "
                        f"'{source.name}' without {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}; it has "
                        f"{', '.join(source.joints[:8])}{', ...' if len(source) > 8 else ''}.")
    order = np.array([have[name] for name in want])
    return None if len(source) == len(target) and (order == np.arange(len(target))).all() else order
