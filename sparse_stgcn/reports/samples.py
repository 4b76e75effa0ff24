"""Test sequences worth a look, to play on the page."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..data.archive import Archive
from ..data.clip import Clip
from ..errors import UserError
from ..scores import Scores
from .clips import fit, packed
from .page import Player, Section

__all__ = ["archive_of", "label_names", "playback", "telling"]

PREDICTIONS = 3  # shown of a sample


def telling(scores: Scores, samples: int) -> list[tuple[int, str]]:
    """(position, why) of the test sequences worth a look: the surest mistakes first, then the least sure answers.

    Half of ``samples`` are mistakes, by falling probability of the wrong answer; the others have the smallest largest
    probability of those that are left.
    """
    largest, wrong = scores.probability.max(1), scores.probability.argmax(1) != scores.label
    mistakes = [i for i in np.argsort(-largest, kind="stable").tolist() if wrong[i]][:(samples + 1) // 2]
    unsure = [i for i in np.argsort(largest, kind="stable").tolist() if i not in mistakes][:samples - len(mistakes)]
    return [(i, "One of the surest mistakes.") for i in mistakes] + [(i, "One of the least sure answers.") for i in unsure]


def playback(title: str, text: str, archive: Archive, scores: Scores, chosen: Sequence[tuple[int, str]], names: Sequence[str],
             megabytes: float) -> Section:
    """The chosen sequences (position in the scores, why) with their best answers, as far as they fit.

    Raises:
        UserError: the archive does not have one of them, or there is no room for the first.
    """
    position = {name: i for i, name in enumerate(archive.sample_ids.tolist())}
    clips = []
    for row, why in chosen:
        index = position.get(str(scores.sample[row]))
        if index is None or archive.label[index] != scores.label[row]:
            raise UserError(f"Expected the archive that the run was tested on. Got '{archive.name}' without sample "
                            f"{scores.sample[row]} of class {names[scores.label[row]]}; evaluate again, or pass --samples 0.")
        best = np.argsort(-scores.probability[row], kind="stable")[:PREDICTIONS].tolist()
        clips.append(packed(Clip.from_archive(archive, index), why=why,
                            predictions=[[names[i], round(float(scores.probability[row, i]), 4)] for i in best]))
    shown = fit(clips, round(megabytes * 1e6))
    if not shown:
        raise UserError(f"Expected --megabytes to have room for one sequence ({len(clips[0]['data']) / 1e6:.2f} MB). Got "
                        f"{megabytes:g}.")
    left_out = "" if len(shown) == len(clips) else f" {len(clips) - len(shown)} more do not fit into {megabytes:g} MB."
    return Section(title, [Player(shown)], f"{len(shown)} test sequences: {text}{left_out}")


def label_names(work_dir: Path, scores: Scores) -> list[str]:
    """Names of the classes of a run's network. Raises UserError where the scores have more or fewer classes."""
    from ..checkpoint import read_metadata

    names = read_metadata(work_dir / "model.safetensors")["meta"].get("label_names") or []
    if len(names) != scores.probability.shape[1]:
        raise UserError(f"Expected scores of the network's {len(names)} classes. Got {scores.probability.shape[1]} in "
                        f"{work_dir / 'scores.npz'}; evaluate again.")
    return list(names)


def archive_of(work_dir: Path) -> Archive:
    """The archive that a run was trained on. Raises UserError where it is gone."""
    from ..training.run import open_archive

    try:
        config = TrainConfig.read(work_dir / "config.yaml")
        config.validate()
        return open_archive(config)
    except UserError as error:
        raise UserError(f"{error} The report reads the test sequences from it; pass --samples 0 for a page without them.") \
            from error
