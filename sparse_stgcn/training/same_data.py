"""Which data a run is trained on: what its processes compare with each other, and its continuation with the resume file.

Everything is compared but the coordinates themselves, which would have to be read whole, and what the archive and its file are
called: a copy, or the same data elsewhere, are the same.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import read_metadata
from ..data.archive import Archive
from ..errors import UserError

__all__ = ["check", "describe", "fingerprint"]


def describe(archive: Archive) -> dict[str, Any]:
    """What there is, by the names that an error gives it: numbers, and a SHA-256 of each array."""
    persons, joints, coordinates = (int(size) for size in archive.keypoint.shape[1:])
    found: dict[str, Any] = {
        "sequences": len(archive), "frames": int(archive.offset[-1]), "persons": persons, "joints": joints,
        "coordinates": coordinates, "type of coordinates": str(archive.keypoint.dtype),
        "lengths": _digest(archive.lengths.tobytes()), "labels": _digest(archive.label.tobytes())}
    if "train" in archive.splits:
        found["training split"] = _digest(np.packbits(archive.splits["train"]).tobytes())
    if "sample" in archive.fields:
        found["sample ids"] = _digest("\n".join(archive.sample_ids.tolist()).encode())
    return found


def fingerprint(archive: Archive) -> str:
    """SHA-256 of what :func:`describe` says."""
    return _digest(json.dumps(describe(archive), sort_keys=True).encode())


def check(state: Path, archive: Archive, data: str | None) -> None:
    """Check that a run goes on with the data that it began with.

    Args:
        state: its resume file; one that does not say which data (an older one) is taken for one of these.
        data: where the archive comes from, for the message.

    Raises:
        UserError: the archive is another one; the message says in what.
    """
    here, there = describe(archive), read_metadata(state).get("data") or {}
    # What only one of them has, such as ids that an older archive lacked, says nothing.
    changed = [name for name in here if name in there and here[name] != there[name]]
    if changed:
        numbers = [f"{here[name]} {name} instead of {there[name]}" for name in changed if isinstance(here[name], int)]
        others = [f"other {name}" for name in changed if not isinstance(here[name], int)]
        raise UserError(f"Expected --data to be what the run in {state.parent} was trained on. Got "
                        f"{data or 'the embedded synthetic set'} with {', '.join([*numbers, *others])}; give it its own data, "
                        "or train on these in a new --work-dir, without --resume.")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
