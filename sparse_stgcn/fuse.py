"""python -m sparse_stgcn.fuse: combine the scores of several streams or networks."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from . import fusion
from .errors import UserError, one_of, run, validating
from .metrics import top_k_accuracy
from .options import OptionalInt, OptionalStr, check_part

__all__ = ["FuseConfig", "main"]


@dataclass
class FuseConfig:
    """Combine score files by sample id: .npz of evaluate, PYSKL's result.pkl, CTR-GCN's score pickles."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    """Score files or work directories, in the order of the weights (presets: j b jm bm)."""
    weights: str = "equal"
    """equal, pyskl2 (1:1), pyskl4 (2:2:1:1), ctrgcn4 (.6:.6:.4:.4, raw scores), or numbers: 2,2,1,1."""
    on: OptionalStr = None
    """What is summed: probability or logit. Default: what the preset's authors sum."""
    data: OptionalStr = None
    """Archive that the scores were made on: gives labels, and ids to files that have none."""
    split: OptionalStr = None
    """Evaluation protocol of the archive."""
    fold: OptionalInt = None
    """Fold that the scores were made on."""
    out: OptionalStr = None
    """Write the fused scores to this .npz file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked = tyro.cli(FuseConfig, args=argv, prog="python -m sparse_stgcn.fuse")
    if not asked.files:
        raise UserError("Expected at least one score file. Got none.")
    check_part(asked.split, asked.fold)
    weights, on = fusion.parse_weights(asked.weights, len(asked.files))
    on = asked.on or on
    one_of("--on", on, fusion.KINDS)
    with validating():
        members = [fusion.read(path) for path in asked.files]
    if asked.data is not None:
        from .data.archive import Archive

        with validating("--data"):
            archive = Archive.open(asked.data)
        archive = archive.with_split(asked.split) if asked.fold is None else archive.fold(asked.fold)
        chosen = archive.members("test")
        members = [fusion.with_ids(m, archive.sample_ids[chosen], archive.label[chosen]) for m in members]
    fused = fusion.fuse(members, weights, on)
    with validating():
        if asked.out:
            fused.save(Path(asked.out))
    report(members, fused)
    return 0


def report(members: Sequence[fusion.Member], fused: fusion.Scores) -> None:
    """Print the accuracy of each file and of their fusion, where labels are known."""
    print(f"samples   {len(fused.sample)}, matched by "
          f"{'position' if members[0].sample is None else 'sample id'}; sum of {fused.protocol['on']}")
    if (fused.label < 0).any():
        print("accuracy  not known, as no file has labels; give --data and --split")
        return
    label = dict(zip(fused.sample.tolist(), fused.label.tolist(), strict=True))
    for member, weight in zip(members, fused.protocol["weights"], strict=True):
        ids = map(str, range(len(member))) if member.sample is None else member.sample.tolist()
        top1 = top_k_accuracy(member.scores(fused.protocol["on"]), [label[i] for i in ids])
        print(f"          top-1 {top1:.2%}  x {weight:g}  {member.name}")
    total = fused.metrics()
    print(f"fused     top-1 {total['top1']:.2%}, top-5 {total['top5']:.2%}, mean class "
          f"{total['mean_class']:.2%}")


if __name__ == "__main__":
    sys.exit(run(main))
