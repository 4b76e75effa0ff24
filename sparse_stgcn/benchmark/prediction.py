"""What a user of a trained network waits for: the start, one call of Predictor, and the frames of a stream."""
from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint
from ..data.preparation import Preparation
from ..inputs import InputFormat
from ..predictor import Predictor
from ..recognizer import Recognizer
from ..streaming.network import StreamNetwork
from ..streaming.predictor import StreamPredictor
from .measure import WrongResult, paired
from .networks import Pattern, Setting, sparse_network
from .peers import candidate, dense_engines

__all__ = ["Latency", "Start", "Stream", "Waits", "latency", "markdown", "start", "streams"]

TOLERANCE = 1e-4  # of probabilities; float32 sums through ten blocks, every engine in its own order
_CHUNKS = (1, 4, 16)
_SOME = 500  # frames of a stream that is timed only
_WARM = 2_000  # frames of a stream before its memory counts: windows are full, and the allocator has what it needs
_START = """
import time
begin = time.perf_counter()
import numpy as np
from sparse_stgcn import Predictor
imported = time.perf_counter()
predictor = Predictor.load({path!r}, clips=1)
loaded = time.perf_counter()
predictor(np.load({array!r}))
print(imported - begin, loaded - imported, time.perf_counter() - loaded)
"""


@dataclass(frozen=True)
class Latency:
    """Calls of ``Predictor`` with one sequence, preparation included, clips=1.

    Attributes:
        median, p99: seconds, over ``calls`` calls in a row, which find the caches as the one before left them.
        dense: median seconds of ONNX Runtime on the dense network, which gets the prepared clip; None without it.
        ratio: median over rounds of dense / ours, timed in turn.
        error: largest difference of a probability from ONNX Runtime's on the densified network.
        turn: median seconds of ours in those rounds, after a rest and a call of the other one; None in results from before it
            was kept.
    """

    threads: int
    calls: int
    median: float
    p99: float
    dense: float | None
    ratio: float | None
    error: float | None
    turn: float | None = None


@dataclass(frozen=True)
class Start:
    """A fresh process: seconds of its parts, of all of it with the start of the interpreter, and of processor time."""

    imports: float
    load: float
    first: float
    process: float
    processor: float


@dataclass(frozen=True)
class Stream:
    """A stream on one thread.

    Attributes:
        rate: frames per second, preparation and head included; core: per second of processor time, which other programs on the
            machine disturb less.
        error: largest difference of a logit from the offline network on the whole sequence, over the largest logit; None where
            means over time make one that depends on the training: ``predict --stream FILE --compare`` measures it.
        held: bytes of frames that are kept.
        growth: bytes by which the process grew over ``frames`` frames.
    """

    backbone: str
    sparsity: float
    chunk: int
    frames: int
    rate: float
    core: float
    delay: int
    error: float | None
    held: int
    growth: int


@dataclass(frozen=True)
class Waits:
    """All of it."""

    latencies: list[Latency]
    start: Start
    streams: list[Stream]


def _sequence(setting: Setting) -> np.ndarray:
    """(M, T, V, C): bodies that move a little, nobody absent."""
    rng = np.random.default_rng(1)
    pose, sway = rng.standard_normal((setting.persons, 1, 25, 3)), rng.standard_normal((setting.persons, setting.frames, 25, 3))
    return (pose + 0.1 * sway).astype(np.float32)


def _saved(setting: Setting, folder: Path) -> tuple[Path, Path, Recognizer]:
    """A checkpoint at 0.95 in blocks of 8 x 1, an array, and the network."""
    model = sparse_network(setting.network(), Pattern(0.95)).eval()
    protocol = {"stream": "j", "clip_len": setting.frames, "num_person": setting.persons, "clips": 10, "coordinates": 3}
    checkpoint.save(model, folder / "m.safetensors", protocol=protocol)
    np.save(folder / "x.npy", _sequence(setting))
    return folder / "m.safetensors", folder / "x.npy", model


def latency(setting: Setting, calls: int, rounds: int) -> Latency:
    """``calls`` calls of one sequence, then rounds in turn with ONNX Runtime.

    Raises:
        WrongResult: the two differ by more than ``TOLERANCE``.
    """
    from ..sparsity import densify

    with tempfile.TemporaryDirectory() as folder:
        path, array, model = _saved(setting, Path(folder))
        predictor, x = Predictor.load(path, clips=1), np.load(array)
    seconds = []
    for index in range(calls + 50):
        begin = time.perf_counter()
        answer = predictor(x)
        if index >= 50:
            seconds.append(time.perf_counter() - begin)
    features, preparation = predictor.inputs.features(x), predictor.inputs.preparation
    clip = torch.from_numpy(preparation.clips(features, preparation.test_frames(setting.frames)))
    engines = dense_engines(densify(model), clip, setting.threads, compile=False)
    peer = next((engine for engine in engines if engine.name == "ONNX Runtime"), None)
    median, p99 = (float(np.percentile(seconds, q)) for q in (50, 99))
    if peer is None:
        return Latency(setting.threads, calls, median, p99, None, None, None)
    error = float(np.abs(peer.output().softmax(1)[0].numpy() - answer.probability).max())
    if not error <= TOLERANCE:
        raise WrongResult(f"Predictor: a probability differs by {error:.3g} from ONNX Runtime's, more than {TOLERANCE:.3g}")
    ours = candidate("Predictor", lambda: torch.from_numpy(predictor(x).probability))
    timings = paired([ours, peer], rounds)
    return Latency(setting.threads, calls, median, p99, timings[peer.name].median, timings[ours.name].ratio(timings[peer.name]),
                   error, timings[ours.name].median)


def start(setting: Setting) -> Start:
    """Import, load and first prediction in a process of its own, the median of three."""
    with tempfile.TemporaryDirectory() as folder:
        path, array, _ = _saved(setting, Path(folder))
        code, runs = _START.format(path=str(path), array=str(array)), []
        for _ in range(3):
            begin, used = time.perf_counter(), _children()
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            runs.append(Start(*map(float, said.split()), time.perf_counter() - begin, _children() - used))
    return sorted(runs, key=lambda run: run.process)[1]


def streams(setting: Setting, sparsity: float = 0.95, frames: int = _SOME) -> list[Stream]:
    """The backbone at several chunks; the last one runs on for ``frames`` frames and shows whether memory grows."""
    model = sparse_network(setting.network(), Pattern(sparsity)).eval()
    preparation = Preparation(model.backbone.skeleton, clip_len=setting.frames, num_person=setting.persons)
    inputs, names = InputFormat(preparation, persons=setting.persons), tuple(map(str, range(model.num_classes)))
    x = _sequence(setting)
    rows = []
    for chunk in _CHUNKS:
        error = _error(model, inputs.features(x), chunk) if setting.backbone == "stgcn" else None
        stream = StreamPredictor(model, inputs, names, chunk=chunk)
        count = frames if chunk == _CHUNKS[-1] else min(frames, _SOME)
        for t in range(min(_WARM, 2 * count)):
            stream.push(x[:, t % setting.frames])
        before, begin, used = _resident(), time.perf_counter(), time.process_time()
        for t in range(count):
            stream.push(x[:, t % setting.frames])
        rate, core = count / (time.perf_counter() - begin), count / (time.process_time() - used)
        growth = _resident() - before
        rows.append(Stream(setting.backbone, sparsity, chunk, count, rate, core, stream.delay, error, stream.nbytes, growth))
    return rows


@torch.inference_mode()
def _error(model: Recognizer, features: np.ndarray, chunk: int) -> float:
    network, clip = StreamNetwork(model), torch.from_numpy(features)
    made = [network.push(clip[:, t:t + chunk]) for t in range(0, clip.shape[1], chunk)]
    logits = network.head(torch.cat([*made, network.push(clip[:, :0], end=True)]).mean(0))
    offline = model(clip[None])[0]
    return float((logits - offline).abs().max() / offline.abs().max())


def _children() -> float:
    """Seconds of processor time of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident() -> int:
    """Bytes of this process in memory now; where the system does not say, the most there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def markdown(waits: Waits) -> str:
    """Three tables."""
    begin = waits.start
    cell = lambda value, form: "" if value is None else form.format(value)
    lines = ["| Predictor, one sequence | calls | median ms | p99 ms | p99 / median | in turn: ours, ms | "
             "ONNX Runtime dense, ms | times faster | error |", "| --- |" + " ---: |" * 8]
    for c in waits.latencies:
        turn, dense = cell(c.turn and 1e3 * c.turn, "{:.2f}"), cell(c.dense and 1e3 * c.dense, "{:.1f}")
        lines.append(f"| {c.threads} thread(s) | {c.calls} | {1e3 * c.median:.2f} | {1e3 * c.p99:.2f} | "
                     f"{c.p99 / c.median:.2f} | {turn} | {dense} | {cell(c.ratio, '{:.1f}')} | {cell(c.error, '{:.0e}')} |")
    lines += ["", "| fresh process | import | load | first prediction | all of it | processor time |",
              "| --- | ---: | ---: | ---: | ---: | ---: |", f"| seconds | {begin.imports:.2f} | {begin.load:.2f} | "
              f"{begin.first:.2f} | {begin.process:.2f} | {begin.processor:.2f} |"]
    lines += ["", "| stream, one thread | chunk | frames | frames per second | per second of processor time | delay, frames | "
              "difference to offline | held, MB | growth, MB |", "| --- |" + " ---: |" * 8]
    lines += [f"| {r.backbone} {r.sparsity:g} | {r.chunk} | {r.frames:,} | {r.rate:,.0f} | {r.core:,.0f} | {r.delay} | "
              f"{cell(r.error, '{:.0e}')} | {r.held / 1e6:.1f} | {r.growth / 1e6:.1f} |" for r in waits.streams]
    return "\n".join(lines)
