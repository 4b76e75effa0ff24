"""What the page of one training run says."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import plots
from ..config import TrainConfig
from ..errors import UserError
from ..metrics import confusion_matrix
from ..scores import Scores
from ..sparsity import stage, summary
from ..sweeps.collect import columns, confidence
from ..work_dir import remedy
from .figures import embedded
from .page import Headline, Image, Page, Section, Table
from .samples import archive_of, label_names, playback, telling

__all__ = ["build", "settings"]


def build(work_dir: Path, samples: int = 16, megabytes: float = 4.0) -> Page:
    """The page of a finished run.

    Args:
        work_dir: as training leaves it.
        samples: test sequences to play, half of them the surest mistakes, half the least sure answers; with 0 the archive is
            not read.
        megabytes: for all sequences together; what does not fit is left out, and the page says so.

    Raises:
        UserError: no finished run there, or its archive is gone or has changed.
    """
    from ..checkpoint import load

    result = _result(work_dir)
    model, scores = load(work_dir / "model.safetensors"), Scores.load(work_dir / "scores.npz")
    names = label_names(work_dir, scores)
    sections = [_training(result), *_classes(scores, names)]
    if samples:
        sections.append(playback("Mistakes and doubts", "the surest mistakes, then the least sure answers.",
                                 archive_of(work_dir), scores, telling(scores, samples), names, megabytes))
    sections.append(_mask(model))
    sections.append(Section("Configuration", [Table(("key", "value"), settings(result["config"]))], folded=True))
    sections.append(Section("Environment", [Table(("what", "value"), settings(result["environment"]))], folded=True))
    config = result["config"]
    level = TrainConfig(sparsity=config["sparsity"]).level
    how = f"sparsity {level}, block {config['block']}" if config["sparsity"] else "dense"
    protocol = result["test"]["protocol"]
    return Page(f"{config['backbone']}, {how}", f"{protocol['data']}, split {protocol['split']}, stream {protocol['stream']}; "
                f"{work_dir.name}", _headlines(result, scores), sections)


def settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table: keys and values as text, those of inner mappings under their path."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{inner}", text) for inner, text in settings(value)]
        else:
            rows.append((str(key), "–" if value is None else str(value)))
    return rows


def _headlines(result: Mapping[str, Any], scores: Scores) -> list[Headline]:
    test, weights, file = result["test"], result["weights"], result["file"]
    sure = confidence(scores)
    return [
        Headline("top-1 accuracy", f"{test['top1']:.2%}", f"of {test['samples']} sequences, {test['protocol']['clips']} clips"),
        Headline("top-5 accuracy", f"{test['top5']:.2%}"),
        Headline("mean class accuracy", f"{test['mean_class']:.2%}"),
        Headline("calibration error", f"{sure['expected_calibration_error']:.3f}",
                 f"{sure['under_half']:.1%} of the answers under 0.5"),
        Headline("kept weights", f"{weights['maskable_kept_fraction']:.2%}",
                 f"{weights['maskable_kept']:,} of {weights['maskable']:,} maskable"),
        Headline("kept parameters", f"{weights['all_kept_fraction']:.2%}", f"{weights['all_kept']:,} of {weights['all']:,}"),
        Headline("file", f"{file['bytes'] / 1e3:,.0f} kB",
                 f"{file['times_smaller']:.1f} times smaller than dense, {file['dense_bytes'] / 1e3:,.0f} kB"),
        Headline("time", f"{sum(result['seconds'].values()):,.0f} s",
                 ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in result["seconds"].items())),
    ]


def _training(result: Mapping[str, Any]) -> Section:
    history = columns(result["history"])
    tested = [value for value in history["test_accuracy"] if value is not None]
    words = (f"Cross entropy, test accuracy and norm of the masked weights over {len(history['loss'])} epochs: cross entropy "
             f"falls from {history['loss'][0]:.3f} to {history['loss'][-1]:.3f}; test accuracy of one clip ends at "
             f"{tested[-1]:.1%}.")
    one = result["one_clip"]
    return Section("Training", [Image(embedded(plots.curves({"this run": [history]})), words)],
                   f"One clip per sequence, last epoch: {one['last']:.2%}. Best: {one['best']:.2%} in epoch "
                   f"{one['best_epoch'] + 1}, chosen on {one['best_is_chosen_on'].removeprefix('on ')}.")


def _classes(scores: Scores, names: Sequence[str]) -> list[Section]:
    counts = confusion_matrix(scores.probability, scores.label)
    right, wrong = counts.trace(), counts.sum() - counts.trace()
    rows = _per_class(counts, names)
    words = (f"Confusion matrix of {len(names)} classes: {right} of {counts.sum()} sequences are right, {wrong} wrong. The "
             "table below says for each class what it is taken for.")
    return [Section("Confusion", [Image(embedded(plots.confusion(counts, names)), words)]),
            Section("Classes", [Table(("class", "sequences", "recall", "precision", "most often taken for"), rows)],
                    "Lowest recall first.")]


def _per_class(counts: NDArray[np.int64], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows (name, samples, recall, precision, most frequent wrong answer) of the classes, by rising recall."""
    total, answered, own = counts.sum(1), counts.sum(0), counts.diagonal()
    recall = np.divide(own, total, out=np.full(len(own), np.inf), where=total > 0)
    rows: list[tuple[str, ...]] = []
    for i in np.argsort(recall, kind="stable").tolist():
        others = counts[i].copy()
        others[i] = 0
        taken = f"{names[int(others.argmax())]} ({others.max()})" if others.any() else ""
        rows.append((names[i], str(total[i]), f"{recall[i]:.1%}" if total[i] else "",
                     f"{own[i] / answered[i]:.1%}" if answered[i] else "", taken))
    return rows


def _mask(model: Any) -> Section:
    kept = summary(model)
    by_share = sorted(kept.layers, key=lambda layer: layer.kept / layer.total)
    if stage(model) == "dense":
        return Section("Weights", [Table(("layer", "weights"), [(layer.name, f"{layer.total:,}") for layer in kept.layers])],
                       "The network is dense.", folded=True)
    words = (f"Share of kept weights of {len(kept.layers)} layers, from {by_share[0].kept / by_share[0].total:.2%} "
             f"({by_share[0].name}) to {by_share[-1].kept / by_share[-1].total:.2%} ({by_share[-1].name}).")
    where = f"Maps of the live weights of the layers with the most weights; {kept.kept:,} of {kept.maskable:,} live."
    rows = [(layer.name, " x ".join(map(str, layer.shape)), f"{layer.total:,}", f"{layer.kept:,}",
             f"{layer.kept / layer.total:.2%}") for layer in kept.layers]
    return Section("Mask", [
        Image(embedded(plots.densities(model)), words), Image(embedded(plots.maps(model, limit=12)), where),
        Table(("layer", "outputs x inputs x taps", "weights", "kept", "share"), rows)], str(kept) + ".", folded=True)


def _result(work_dir: Path) -> dict[str, Any]:
    for name in ("result.json", "model.safetensors", "scores.npz", "config.yaml"):
        if not (work_dir / name).is_file():
            raise UserError(f"Expected SOURCE to be the work directory of a finished run. Got {work_dir} without {name}; "
                            f"{remedy(work_dir, 'SOURCE')}")
    try:
        result = json.loads((work_dir / "result.json").read_text(encoding="utf-8"))
        missing = {"test", "one_clip", "weights", "file", "seconds", "environment", "config", "history"} - set(result)
        if missing:
            raise ValueError(f"no {min(missing)}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"Expected {work_dir / 'result.json'} to be the result of a training run. Got: {error}.") from error
    return result
