"""Fusion: one prediction from the scores of several streams or networks, matched by sample id."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data.unpickle import load_pickle
from .errors import UserError
from .scores import Scores

__all__ = ["PRESETS", "Member", "fuse", "parse_weights", "read"]

# Preset -> (weights in the order j, b, jm, bm, or None for equal ones, and what is summed).
PRESETS: dict[str, tuple[tuple[float, ...] | None, str]] = {
    "equal": (None, "probability"),
    "pyskl2": ((1, 1), "probability"),
    "pyskl4": ((2, 2, 1, 1), "probability"),
    "ctrgcn4": ((0.6, 0.6, 0.4, 0.4), "logit"),
}
KINDS = ("probability", "logit")


@dataclass(frozen=True)
class Member:
    """The scores of one file.

    Attributes:
        name: the file.
        sample: (N,) ids, or None where the file only has an order.
        label: (N,) int64, or None where the file has none.
        probability, logit: (N, classes), or None where the file does not have them.
    """

    name: str
    sample: NDArray[np.str_] | None
    label: NDArray[np.int64] | None
    probability: NDArray[np.floating] | None
    logit: NDArray[np.floating] | None

    def __post_init__(self) -> None:
        given = [scores for scores in (self.probability, self.logit) if scores is not None]
        for scores in given:
            if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
                broken = "" if np.isfinite(scores).all() else " with NaN or infinity"
                raise UserError(f"Expected finite scores (samples, classes) in {self.name}. Got shape "
                                f"{scores.shape}{broken}.")
        if self.sample is not None:
            values, counts = np.unique(self.sample, return_counts=True)
            if counts.max() > 1:
                raise UserError(f"Expected every sample once in {self.name}. Got "
                                f"{str(values[counts.argmax()])!r} {counts.max()} times.")

    def __len__(self) -> int:
        return len(self.probability if self.logit is None else self.logit)  # type: ignore[arg-type]

    def scores(self, on: str) -> NDArray[np.float64]:
        """Probabilities or logits, (N, classes); probabilities follow from logits, not the reverse."""
        if on == "logit":
            if self.logit is None:
                raise UserError(f"Expected raw scores in {self.name}. Got probabilities, whose logits are "
                                "not known; fuse with --on probability.")
            return self.logit.astype(np.float64)
        if self.probability is not None:
            return self.probability.astype(np.float64)
        return _softmax(self.logit.astype(np.float64))  # type: ignore[union-attr]


def read(path: str | Path) -> Member:
    """The scores of a file: ``.npz`` of ``evaluate``, PYSKL's ``result.pkl`` or CTR-GCN's score pickle.

    Of a work directory it is ``scores.npz``.

    PYSKL dumps a bare list, one array per sample in the order of its annotation file, so there are no ids;
    CTR-GCN dumps a dict from id to raw score. Rows that are non-negative and sum to 1 are taken for
    probabilities. Pickles go through the restricted unpickler: NumPy arrays and plain containers only.

    Raises:
        UserError: no such file, or not one of these.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "scores.npz").is_file():
            raise UserError(f"Expected a score file or a work directory with scores.npz. Got {path} without; test its network "
                            "with python -m sparse_stgcn.evaluate.")
        path = path / "scores.npz"
    if not path.is_file():
        raise UserError(f"Expected a score file. Got {path}, which does not exist.")
    if path.suffix == ".npz":
        try:
            own = Scores.load(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Member(str(path), own.sample, own.label if (own.label >= 0).all() else None, own.probability,
                      own.logit)
    content = load_pickle(path)
    if isinstance(content, Mapping):
        sample, rows = np.array([str(key) for key in content]), list(content.values())
    elif isinstance(content, (list, tuple)):
        sample, rows = None, list(content)
    else:
        raise UserError(f"Expected {path} to hold a list of scores (PYSKL) or a dict id -> scores (CTR-GCN). "
                        f"Got a {type(content).__name__}.")
    return _from_rows(str(path), sample, rows)


def fuse(members: Sequence[Member], weights: Sequence[float] | None = None, on: str = "probability",
         protocol: Mapping[str, Any] | None = None) -> Scores:
    """score = sum over files of weight * score / sum of the weights, sample by sample.

    Files are matched by sample id, whatever their order; the result has the order of the first. If no file
    has ids, they are matched by position, with a warning. Labels come from the files that have them and are
    -1 where none has.

    Args:
        on: ``probability`` (PYSKL), or ``logit``: raw scores (CTR-GCN).

    Raises:
        UserError: the files hold different samples, classes or labels, some have ids and some do not, or the
            number of weights is not the number of files.
    """
    if not members:
        raise UserError("Expected at least one score file. Got none.")
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=np.float64)
    good = np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0
    if shares.shape != (len(members),) or not good:
        raise UserError(f"Expected --weights to be {len(members)} numbers >= 0, one per file, not all 0. "
                        f"Got {', '.join(f'{w:g}' for w in shares)}.")
    orders = _match(members)
    first = members[0]
    shape = first.scores(on).shape
    total, label = np.zeros(shape), np.full(len(first), -1, np.int64)
    for member, order, share in zip(members, orders, shares, strict=True):
        scores = member.scores(on)
        if scores.shape[1] != shape[1]:
            raise UserError(f"Expected the same number of classes in every file. Got {shape[1]} in "
                            f"{first.name} and {scores.shape[1]} in {member.name}.")
        total += share * scores[order]
        if member.label is not None:
            theirs = member.label[order]
            if clash := np.flatnonzero((label >= 0) & (label != theirs)).tolist():
                which = clash[0] if first.sample is None else repr(str(first.sample[clash[0]]))
                raise UserError(f"Expected the same labels in every file. Got {label[clash[0]]} and "
                                f"{theirs[clash[0]]} for sample {which} ({member.name}).")
            label = theirs
    total /= shares.sum()
    sample = np.array([str(i) for i in range(len(first))]) if first.sample is None else first.sample
    if on == "logit":
        probability, logit = _softmax(total), total
    else:
        # The logarithm is a logit of the mean probability up to a constant, and keeps its order.
        probability, logit = total, np.log(np.maximum(total, np.finfo(np.float32).tiny))
    described = {"files": [m.name for m in members], "weights": shares.tolist(), "on": on, **(protocol or {})}
    return Scores(sample, label, probability.astype(np.float32), logit.astype(np.float32), described)


def parse_weights(text: str, count: int) -> tuple[tuple[float, ...] | None, str]:
    """(weights, what is summed) of a preset's name or of numbers such as ``2,2,1,1`` or ``2:2:1:1``.

    Raises:
        UserError: neither, or another number of weights than files.
    """
    if text in PRESETS:
        weights, on = PRESETS[text]
    else:
        try:
            weights, on = tuple(float(part) for part in text.replace(":", ",").split(",")), "probability"
        except ValueError:
            raise UserError(f"Expected --weights to be one of {', '.join(PRESETS)} or numbers such as "
                            f"2,2,1,1. Got {text!r}.") from None
    if weights is not None and len(weights) != count:
        raise UserError(f"Expected as many files as --weights {text} has numbers ({len(weights)}). Got "
                        f"{count} files.")
    return weights, on


def with_ids(member: Member, sample: NDArray[np.str_], label: NDArray[np.int64]) -> Member:
    """The member with the ids of a split that it lists in order, and with the split's labels.

    Raises:
        UserError: another number of samples, ids that the split does not have, or labels beyond the classes of the scores.
    """
    scores = next(given for given in (member.probability, member.logit) if given is not None)
    if label.size and label.max() >= scores.shape[1]:
        raise UserError(f"Expected --data with the {scores.shape[1]} classes of {member.name}. Got the label {label.max()}; "
                        "name the archive that it was made on.")
    if member.sample is None:
        if len(member) != len(sample):
            raise UserError(f"Expected {member.name} to have the {len(sample)} samples of the split. Got "
                            f"{len(member)}; name the split it was made on with --split.")
        return replace(member, sample=sample, label=label)
    known = dict(zip(sample.tolist(), label.tolist(), strict=True))
    if strange := [s for s in member.sample.tolist() if s not in known]:
        raise UserError(f"Expected the samples of {member.name} to be in the split of --data. Got "
                        f"{strange[0]!r}, which is not; name the right --split.")
    return replace(member, label=np.array([known[s] for s in member.sample.tolist()], np.int64))


def _match(members: Sequence[Member]) -> list[NDArray[np.int64]]:
    """For each member the positions of the first one's samples."""
    first = members[0]
    anonymous = [m for m in members if m.sample is None]
    if anonymous and len(anonymous) < len(members):
        raise UserError(f"Expected sample ids in every file or in none. Got none in {anonymous[0].name}; "
                        "give the archive and split it was made on with --data and --split.")
    if anonymous:
        if len({len(m) for m in members}) > 1:
            raise UserError("Expected files without sample ids to have the same number of samples. Got "
                            + ", ".join(f"{len(m)} in {m.name}" for m in members) + ".")
        if len(members) > 1:
            warnings.warn("these files have no sample ids and are matched by position; give --data and "
                          "--split to check their number against a split", stacklevel=3)
        return [np.arange(len(first))] * len(members)
    orders = []
    for member in members:
        where = {s: i for i, s in enumerate(member.sample.tolist())}  # type: ignore[union-attr]
        wanted = first.sample.tolist()  # type: ignore[union-attr]
        missing = [s for s in wanted if s not in where]
        extra = set(where).difference(wanted)
        if missing or extra:
            one, has, lacks = ((missing[0], first.name, member.name) if missing
                               else (min(extra), member.name, first.name))
            raise UserError(f"Expected the same samples in every file. Got {one!r} in {has} but not in "
                            f"{lacks} ({len(missing) + len(extra)} differ in all).")
        orders.append(np.array([where[s] for s in wanted], np.int64))
    return orders


def _from_rows(name: str, sample: NDArray[np.str_] | None, rows: list[Any]) -> Member:
    try:
        scores = np.stack([np.asarray(row, dtype=np.float64).reshape(-1) for row in rows])
    except (TypeError, ValueError) as error:
        raise UserError(f"Expected {name} to hold one array of class scores per sample. "
                        f"Got: {error}.") from error
    # Tolerance: probabilities are stored in float32 or float16.
    probable = scores.size and (scores >= 0).all() and np.allclose(scores.sum(1), 1, atol=1e-2)
    return Member(name, sample, None, scores if probable else None, None if probable else scores)


def _softmax(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    power = np.exp(logit - logit.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)
