"""python -m sparse_stgcn.plot KIND ...: draw a skeleton, a confusion matrix, masks, training curves, or what accuracy costs."""
from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro

from . import plots
from .errors import UserError, one_of, run, validating
from .options import OptionalFloat, OptionalStr

if TYPE_CHECKING:
    from .recognizer import Recognizer

__all__ = ["label_names", "main", "short_names"]

IMAGES = (".png", ".svg", ".pdf")
COSTS = ("auto", "size", "latency")

Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Sources = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]


@dataclass
class SkeletonPlot:
    """Draw one sequence: an animated GIF, or a strip of frames (.png, .svg, .pdf)."""

    source: Source
    """Archive, data set in another format, or an array (.npy; .json lists)."""
    out: str = "skeleton.gif"
    """File to write."""
    sample: str = "0"
    """Number of the sequence, in an archive also its id."""
    layout: OptionalStr = None
    """Skeleton layout: a name (nturgb+d, coco, ...) or a YAML/JSON file. Default: the file's own, or by the joints."""
    order: OptionalStr = None
    """Axes of an array, e.g. MTVC. Default: TMVC or TVC."""
    up: OptionalStr = None
    """Axis of the data that points up: y, -y, z or -z. Default: as the archive says, or along the spine."""
    yaw: OptionalFloat = None
    """Degrees by which the scene is turned about the vertical. Default: the first person's front, a little aside."""
    pitch: OptionalFloat = None
    """Degrees that the viewer is above the horizontal. Default: 12, in 2D 0."""
    panels: int = 8
    """Frames of a strip."""
    fps: float = 15.0
    """Largest number of frames per second of a GIF."""

    def draw(self) -> str:
        from .data.clip import Clip

        _suffix(self.out, (".gif", *IMAGES))
        clip = Clip.open(self.source, self.sample, self.layout, self.order, self.up)
        yaw, pitch = (None if angle is None else math.radians(angle) for angle in (self.yaw, self.pitch))
        if Path(self.out).suffix.lower() == ".gif":
            frames = plots.animate(clip, self.out, yaw, pitch, self.fps)
        else:
            frames = min(self.panels, len(clip))
            plots.save(plots.strip(clip, self.panels, yaw, pitch), self.out)
        return f"{frames} of {len(clip)} frames of {clip.name}{f' ({clip.label})' if clip.label else ''}"


@dataclass
class ConfusionPlot:
    """Draw which classes a network takes for which."""

    source: Source
    """Work directory of a finished run, or a score file."""
    out: str = "confusion.png"
    """File to write (.png, .svg, .pdf)."""
    label_names: OptionalStr = None
    """Text file with one class name per line. Default: those of the network beside the scores, or numbers."""
    limit: int = 30
    """Classes shown; of more, those with the most errors."""

    def draw(self) -> str:
        from .metrics import confusion_matrix
        from .scores import Scores

        _suffix(self.out)
        file = _in_work_dir(self.source, "scores.npz")
        if not file.is_file():
            raise UserError(f"Expected SOURCE to be the work directory of a finished run, or a score file. Got {file}, which "
                            "does not exist.")
        scores = Scores.load(file)
        counts = confusion_matrix(scores.probability, scores.label)
        figure = plots.confusion(counts, label_names(self.source, len(counts), self.label_names), self.limit)
        plots.save(figure, self.out)
        return f"{len(scores.label)} samples of {len(counts)} classes, {counts.trace() / counts.sum():.2%} of them right"


@dataclass
class DensitiesPlot:
    """Draw what the mask keeps of every layer."""

    source: Source
    """Work directory of a finished run, or a checkpoint."""
    out: str = "densities.png"
    """File to write (.png, .svg, .pdf)."""

    def draw(self) -> str:
        from .sparsity import summary

        _suffix(self.out)
        model = _network(self.source)
        plots.save(plots.densities(model), self.out)
        kept = summary(model)
        return f"{len(kept.layers)} layers; {kept}"


@dataclass
class MasksPlot:
    """Draw where the live blocks of the layers lie."""

    source: Source
    """Work directory of a finished run, or a checkpoint."""
    out: str = "masks.png"
    """File to write (.png, .svg, .pdf)."""
    layers: str = "*"
    """Names of the layers, with * and ?, e.g. '*gcn.4.*'. python -m sparse_stgcn.info lists the blocks."""
    limit: int = 24
    """Layers shown; of more, those with the most weights."""

    def draw(self) -> str:
        _suffix(self.out)
        plots.save(plots.maps(_network(self.source), self.layers, self.limit), self.out)
        return f"sparse layers of {self.source}"


@dataclass
class CurvesPlot:
    """Draw the training of one or more runs: cross entropy, accuracy, and norm of the masked weights."""

    sources: Sources
    """Work directories, finished or not, or their result.json or log.jsonl."""
    out: str = "curves.png"
    """File to write (.png, .svg, .pdf)."""

    def draw(self) -> str:
        from .sweeps.collect import columns, read_history

        _suffix(self.out)
        _some(self.sources)
        histories = {name: [columns(read_history(Path(source)))]
                     for name, source in zip(short_names(self.sources), self.sources, strict=True)}
        plots.save(plots.curves(histories), self.out)
        return ", ".join(f"{name}: {len(history['loss'])} epochs" for name, (history,) in histories.items())


@dataclass
class ParetoPlot:
    """Draw accuracy over size, or over latency where a benchmark is given, and the networks that none beats in both."""

    sources: Sources
    """Results of sweeps (NAME.json), work directories or result.json of runs, and results of the benchmark."""
    out: str = "pareto.png"
    """File to write (.png, .svg, .pdf)."""
    cost: str = "auto"
    """size (of the file), latency (of the benchmark), or auto: latency if there is a benchmark."""
    batch: int = 1
    """Batch size of the benchmark."""

    def draw(self) -> str:
        from .sweeps import tradeoff

        _suffix(self.out)
        _some(self.sources)
        one_of("--cost", self.cost, COSTS)
        results = tradeoff.read_results(self.sources)
        if not results.entries:
            raise UserError("Expected results of a sweep or of runs, which hold the accuracy. Got none in "
                            f"{', '.join(self.sources)}; entries marked former do not count.")
        cost, label = (tradeoff.latency(results, self.batch)
                       if self.cost == "latency" or (self.cost == "auto" and results.rows)
                       else (tradeoff.size, "size of the file (kB)"))
        points = tradeoff.points(results.entries, cost)
        if not points:
            raise UserError("Expected a benchmark of the networks of the results. Got no timing of any of them: backbone, "
                            "sparsity, block and density must be the same.")
        plots.save(plots.pareto(points, label), self.out)
        untimed = sum(cost(entry) is None for entry in results.entries)
        return (f"{len(points)} networks from {len(results.entries) - untimed} runs, {len(plots.front(points))} on the front"
                + (f"; left out for want of a timing: {untimed}" if untimed else ""))


Kind: TypeAlias = (  # tyro makes a subcommand of each
    Annotated[SkeletonPlot, tyro.conf.subcommand("skeleton")] | Annotated[ConfusionPlot, tyro.conf.subcommand("confusion")]
    | Annotated[DensitiesPlot, tyro.conf.subcommand("densities")] | Annotated[MasksPlot, tyro.conf.subcommand("masks")]
    | Annotated[CurvesPlot, tyro.conf.subcommand("curves")] | Annotated[ParetoPlot, tyro.conf.subcommand("pareto")])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    asked: Kind = tyro.cli(Kind, args=argv, prog="python -m sparse_stgcn.plot",  # type: ignore[arg-type]
                           description="Draw a skeleton, a confusion matrix, masks, training curves, or what accuracy costs.")
    plots.require()
    with validating():
        said = asked.draw()
    print(f"{said}\nfigure    {asked.out}")
    return 0


def label_names(source: str, classes: int, file: str | None = None) -> list[str]:
    """Names of the classes: of a text file, of the network beside the scores, or numbers.

    Raises:
        UserError: the file cannot be read or has too few or too many names.
    """
    from .checkpoint import read_metadata
    from .convert import read_names

    network = Path(source if Path(source).is_dir() else Path(source).parent) / "model.safetensors"
    names: Sequence[str] = [str(i) for i in range(classes)]
    if file is not None:
        names = read_names(file)
    elif network.is_file():
        names = read_metadata(network)["meta"].get("label_names", names)
    if len(names) != classes:
        raise UserError(f"Expected {classes} label names, one per class of the scores. Got {len(names)} in {file or network}.")
    return list(names)


def short_names(sources: Sequence[str]) -> list[str]:
    """What a legend calls the sources: the last part of each path that tells them apart."""
    paths = [Path(source) for source in sources]
    parts = [(path.parent if path.name in ("result.json", "log.jsonl") else path.with_suffix("") if path.suffix == ".json"
              else path).parts or (str(path),) for path in paths]
    longest = max(map(len, parts))
    for depth in range(1, longest + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"Expected each run once. Got {', '.join(sources)}.")


def _network(source: str) -> Recognizer:
    from .info import trained

    members = trained(source)
    if len(members) > 1:
        raise UserError(f"Expected a checkpoint of one network. Got an ensemble of {len(members)} in {source}; draw its "
                        "members' own files.")
    return members[0]


def _in_work_dir(source: str, name: str) -> Path:
    return Path(source) / name if Path(source).is_dir() else Path(source)


def _suffix(out: str, allowed: Sequence[str] = IMAGES) -> None:
    if Path(out).suffix.lower() not in allowed:
        raise UserError(f"Expected --out to end in {', '.join(allowed)}. Got {out}.")
    if not Path(out).parent.is_dir():
        raise UserError(f"Expected --out to be in a directory that exists. Got {out}; create {Path(out).parent}.")


def _some(sources: Sequence[str]) -> None:
    if not sources:
        raise UserError("Expected at least one SOURCE. Got none.")


if __name__ == "__main__":
    sys.exit(run(main))
