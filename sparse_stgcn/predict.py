"""python -m sparse_stgcn.predict MODEL FILE...: labels for files with joints, or for a stream of frames."""
from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .errors import UserError, one_of, run
from .options import OptionalFloat, OptionalInt, OptionalStr, image_size

if TYPE_CHECKING:
    import numpy as np

    from .predictor import Prediction, Predictor

__all__ = ["PredictConfig", "main"]

_FORMATS = ("json", "csv")
_TOGETHER = 16  # sequences that share forward passes


@dataclass
class PredictConfig:
    """Say what is done in sequences of joints: one line each, the best classes first.

    A file that cannot be used is reported and does not stop the others; the exit code is then 1.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Checkpoint of a network or an ensemble, or the work directory with it."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")] = ()
    """Arrays .npy (T, M, V, C) or (T, V, C), archives, PYSKL pickles, NTU .skeleton files, or folders of them."""
    stream: OptionalStr = None
    """A file whose first sequence is given frame by frame, as from a camera: one line per new prediction."""
    layout: OptionalStr = None
    """Layout of the arrays: a name or a YAML/JSON file; joints are matched by name. Default: that of the network."""
    order: OptionalStr = None
    """Axes of the arrays, e.g. MTVC. Default: TMVC or TVC, as in convert."""
    image: OptionalStr = None
    """Height x width of the image that 2D arrays are in, e.g. 720x1280; 1x1: they are parts of it. Default: 1080x1920."""
    fps: OptionalFloat = None
    """Frames per second of the files. Default: that of the training data."""
    top: int = 5
    """Classes per sequence."""
    clips: OptionalInt = None
    """Clips per sequence. Default: those of the training's test; 1 is the fastest."""
    missing: OptionalStr = None
    """Lost joints: keep, interpolate, zero or drop. Default: what training did."""
    window: OptionalInt = None
    """Frames that a prediction of --stream looks back; 0: all. Default: the clip length of the training."""
    chunk: int = 1
    """Frames that --stream computes together: more are faster, and later."""
    rolling: bool = False
    """Run the network on the last --window frames as a clip of their own, every --chunk frames: the offline answer of any
    backbone without delay, for the work of a clip each time."""
    compare: bool = False
    """After --stream, compare with the offline network on the same frames."""
    format: OptionalStr = None
    """json (a line per sequence) or csv (a line per class). Default: by the name of --out, or json."""
    out: OptionalStr = None
    """File for the predictions, written at the end, and not at all if no sequence could be predicted. Default: standard
    output."""
    threads: OptionalInt = None
    """CPU threads. Default: what torch chooses, and 1 for --stream."""

    def validate(self) -> None:
        """Raise UserError for what cannot be right without reading a file."""
        if not self.files and self.stream is None:
            raise UserError("Expected at least one file to predict, or --stream FILE. Got none.")
        if self.files and self.stream is not None:
            raise UserError("Expected files or --stream FILE. Got both.")
        for name in ("top", "clips", "chunk", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"Expected --{name} to be at least 1. Got {value}.")
        if self.rolling and (self.compare or self.window == 0):
            raise UserError("Expected --rolling without --compare and with a --window of at least 1. Got both, or --window 0.")
        if self.window is not None and self.window < 0:
            raise UserError(f"Expected --window to be at least 0. Got {self.window}.")
        if self.order is not None:
            from .data.arrays import check_order

            check_order(self.order)
        self.image_size()
        if self.format is not None:
            one_of("--format", self.format, _FORMATS)
        if self.out is not None:
            out = Path(self.out)
            if out.is_dir():
                raise UserError(f"Expected --out to be a file. Got the directory '{self.out}'; name a file in it.")
            if not out.resolve().parent.is_dir():
                raise UserError(f"Expected --out to be in a directory that exists. Got {self.out}.")
            if not _special(out) and not os.access(out.resolve().parent, os.W_OK):
                raise UserError(f"Expected --out to be in a directory that may be written to. Got {self.out}.")

    def image_size(self) -> tuple[float, float]:
        """Height and width of the image of plain arrays."""
        from .data.preparation import IMAGE

        return IMAGE if self.image is None else image_size(self.image)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``--help``. Errors are for ``errors.run`` to report."""
    config = tyro.cli(PredictConfig, args=argv, prog="python -m sparse_stgcn.predict")
    config.validate()
    _spare_inputs(config)
    import torch

    if config.threads is not None or config.stream is not None:
        torch.set_num_threads(config.threads or 1)
    return _stream(config) if config.stream is not None else _predict(config)


def _special(out: Path) -> bool:
    """Whether ``out`` is a pipe or a device, which a renamed file would take the place of."""
    return out.exists() and not out.is_file()


def _spare_inputs(config: PredictConfig) -> None:
    """Raise UserError where --out is a file that the command reads, by whatever name."""
    if config.out is None or not Path(config.out).exists():
        return
    from .data.samples import find_files
    from .inputs import checkpoint_file

    read = [checkpoint_file(config.model)]
    if config.layout is not None and Path(config.layout).is_file():
        read.append(Path(config.layout))
    for file in find_files(config.files if config.stream is None else [config.stream]):
        read += [file / "meta.json", *file.glob("*.npy")] if file.is_dir() else [file]  # a folder here is an archive
    for file in read:
        if file.exists() and Path(config.out).samefile(file):
            raise UserError(f"Expected --out to be none of the files that are read. Got {config.out}, which is {file}; choose "
                            "another name.")


def _predict(config: PredictConfig) -> int:
    from .data.samples import find_files
    from .predictor import Predictor

    files = list(find_files(config.files))
    predictor = Predictor.load(config.model, config.clips, config.missing)
    if config.layout is not None:
        predictor.inputs.order(config.layout)
    failed, count = 0, 0
    waiting: list[tuple[str, str, np.ndarray]] = []
    write = _Writer(config, ("file", "sample"))
    for file, sample, features in _features(config, predictor, files):
        count += 1
        if isinstance(features, UserError):
            failed += 1
            print(f"error: {file}: {features}", file=sys.stderr)
            continue
        waiting.append((file, sample, features))
        if len(waiting) == _TOGETHER:
            _flush(predictor, waiting, write)
    _flush(predictor, waiting, write)
    if failed < count:
        write.save()
    if failed:
        print(f"{failed} of {count} sequences could not be predicted", file=sys.stderr)
    return 1 if failed else 0


def _features(config: PredictConfig, predictor: Predictor, files: Sequence[Path]
              ) -> Iterator[tuple[str, str, np.ndarray | UserError]]:
    """(file, sample, what its clips are drawn from, or why there is none) of every sequence."""
    from .data.samples import open_samples

    for file in files:
        try:
            samples = open_samples(file, config.layout, config.order, config.image_size())
        except (ValueError, OSError) as error:
            yield str(file), "", UserError(str(error))
            continue
        for name, read in samples:
            try:
                sample = read()
                layout = config.layout if config.layout is not None else sample.layout
                yield str(file), name, predictor.inputs.features(
                    sample.keypoint, layout, config.fps, sample.score, sample.image)
            except (ValueError, OSError) as error:
                yield str(file), name, UserError(str(error))


def _flush(predictor: Predictor, waiting: list[tuple[str, str, np.ndarray]], write: Callable[..., None]) -> None:
    predictions = predictor.predict_features([features for _, _, features in waiting])
    for (file, sample, _), prediction in zip(waiting, predictions, strict=True):
        write(prediction, file=file, sample=sample)
    waiting.clear()


def _stream(config: PredictConfig) -> int:
    import torch

    from .data.samples import find_files, open_samples
    from .streaming.offline import difference
    from .streaming.predictor import StreamPredictor
    from .streaming.rolling import RollingPredictor

    file = next(find_files([str(config.stream)]))
    sample = open_samples(file, config.layout, config.order, config.image_size())[0][1]()
    layout = config.layout if config.layout is not None else sample.layout
    kind = RollingPredictor if config.rolling else StreamPredictor
    stream = kind.load(config.model, config.window, config.chunk, layout, config.fps, sample.image, config.missing)
    frames, last, spent = sample.keypoint.shape[-3], None, 0.0
    write, begin = _Writer(config, ("frame",)), time.perf_counter()
    for number, prediction in enumerate(stream.run(sample.keypoint, sample.score), 1):
        if prediction is not None and prediction is not last:
            spent += time.perf_counter() - begin
            write(prediction, frame=min(number, frames))
            begin, last = time.perf_counter(), prediction
    spent += time.perf_counter() - begin
    write.save()
    print(f"streamed  {frames} frames in {spent:.2f} s, {frames / spent:,.0f} frames per second on {torch.get_num_threads()} "
          f"thread(s), {stream.chunk} at a time; a frame counts {stream.delay} frames later", file=sys.stderr)
    if config.compare and isinstance(stream, StreamPredictor):
        own = difference(stream, sample.keypoint, sample.score)
        windows = (f"over windows of {stream.window or frames} frames {own.windows:.2g} (mean {own.mean:.2g}), same class in "
                   f"{own.agree:.1%}" if not math.isnan(own.mean) else "no window whose frames were all answered for")
        print(f"offline   largest difference of a probability over the whole sequence {own.whole:.2g}, {windows}",
              file=sys.stderr)
    return 0


class _Writer:
    """write(prediction, **columns): to standard output at once, or to --out by ``save``."""

    def __init__(self, config: PredictConfig, columns: Sequence[str]) -> None:
        self.config, self.csv = config, (config.format or (config.out and Path(config.out).suffix[1:])) == "csv"
        self.file = sys.stdout if config.out is None else io.StringIO()
        self.table = csv.writer(self.file)
        if self.csv:
            self.table.writerow([*columns, "rank", "name", "probability"])

    def __call__(self, prediction: Prediction, **values: Any) -> None:
        top = prediction.top(self.config.top)
        if self.csv:
            self.table.writerows([*values.values(), rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(top, 1))
        else:
            best = {"label": prediction.label, "name": top[0][0], "probability": top[0][1]}
            listed = [{"name": name, "probability": p} for name, p in top]
            print(json.dumps({**values, **best, "top": listed}), file=self.file)

    def save(self) -> None:
        """Write --out, as a whole or not at all."""
        if self.config.out is None:
            return
        from .checkpoint import write_atomically

        out, content = Path(self.config.out), self.file.getvalue().encode()
        if _special(out):
            out.write_bytes(content)
        else:
            write_atomically(out.resolve(), content)  # resolved: a link goes on pointing to the file


if __name__ == "__main__":
    sys.exit(run(main))
