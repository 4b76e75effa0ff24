"""Evaluation protocols: which splits are the training and the test part of "xsub", "ntu60_xview", "fold0", ..."""
from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ..errors import UserError

# Full name -> the prefix of the split names inside a PYSKL pickle ("" for plain train/val).
PROTOCOLS = {
    "ntu60_xsub": "xsub", "ntu60_xview": "xview", "ntu120_xsub": "xsub", "ntu120_xset": "xset", "k400": "", "gym": "",
}
# Full name -> the protocol that its data set has beside it, and the one that the other data set has.
_MARK = {"ntu60_xsub": ("xview", "xset"), "ntu120_xsub": ("xset", "xview")}
_TEST = ("test", "val")


def protocols_in(splits: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Every protocol that has both parts: its name -> (training split, test split).

    "xsub_train" and "xsub_val" make "xsub", "train1" and "test1" make "1", "train" and "val" make "".
    """
    found = {}
    for name in splits:
        match = re.fullmatch(r"(?:(.+)_)?train(\d*)", name)
        if match is None:
            continue
        prefix, number = match.group(1) or "", match.group(2)
        for part in _TEST:
            test = f"{prefix}_{part}{number}" if prefix else f"{part}{number}"
            if test in splits:
                found[prefix + number] = (name, test)
                break
    return found


def resolve_protocol(
    splits: Mapping[str, np.ndarray], fold: np.ndarray | None, protocol: str | None, name: str = "archive"
) -> tuple[str, np.ndarray, np.ndarray]:
    """(protocol name, training mask, test mask) of `protocol` (see `Archive.with_split`).

    Raises:
        UserError: the archive does not hold it, or holds several and none was named.
    """
    found = protocols_in(splits)
    known = [key or "train" for key in found]
    if fold is not None:
        known += [f"fold{k}" for k in np.unique(fold)]
    offered = f"Expected split to be one of {', '.join(known) or '(none)'} in archive '{name}'."
    match = re.fullmatch(r"fold(-?\d+)", protocol or "")
    if match:
        k = int(match.group(1))
        if fold is None or not (fold == k).any() or (fold == k).all():
            raise UserError(f"{offered} Got split={protocol!r}; the archive has no such fold.")
        return f"fold{k}", fold != k, fold == k
    if protocol is None:
        if len(found) != 1 and "" not in found:
            raise UserError(f"{offered} Got none; name one." if found else
                            f"{offered} Got the splits {', '.join(splits) or '(none)'}; add a pair, such as train and val.")
        key = "" if "" in found else next(iter(found))
    else:
        key = protocol if protocol in found else PROTOCOLS.get(protocol, protocol)
        key = "" if key in ("train", "/".join(found.get("", ()))) else key
        # Both NTU sets have an "xsub"; only one of them has an "xview", the other an "xset".
        if protocol in _MARK and _MARK[protocol][1] in found and _MARK[protocol][0] not in found:
            key = protocol
    if key not in found:
        raise UserError(f"{offered} Got split={protocol!r}.")
    train, test = found[key]
    if not splits[train].any() or not splits[test].any():
        raise UserError(f"Expected sequences in both parts of split {key or 'train'!r} of archive '{name}'. Got "
                        f"{int(splits[train].sum())} for training and {int(splits[test].sum())} for testing.")
    return key or f"{train}/{test}", splits[train], splits[test]
