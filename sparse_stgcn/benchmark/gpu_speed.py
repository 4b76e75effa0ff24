"""The GPU kernels against cuDNN and torch.compile on a real card: every output is checked before it is timed.

``pytest bench/ --benchmark-only -m gpu`` runs it over ST-GCN's shapes and writes results/bench_gpu_<card>.json. The functions
take any device, so that all but the timing of a card is tested without one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import BlockPattern, graph_conv, reference, temporal_conv
from ..kernels.dispatch import backends, forced_backend
from ..skeleton import Skeleton
from . import gpu_model
from .gpu_cards import CARDS, Problem
from .measure import check, environment
from .networks import Pattern
from .ops import draw

DTYPE = {"float32": torch.float32, "tf32": torch.float32, "half": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "half": 2e-2}  # of the largest value
FLUSH = 256 << 20  # bytes written between two timings: more than any L2


@dataclass(frozen=True)
class Product:
    """One product of one shape: what gpu_model predicts and this module measures."""

    op: str
    direction: str
    arithmetic: str
    channels: int
    frames: int
    samples: int = 128

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.channels, gpu_model.OPS[self.op]


@dataclass(frozen=True)
class Measured:
    """One engine on one product.

    Attributes:
        engine: ``sparse_stgcn`` with the backend that ran, or a dense engine. sparsity, block: None for those.
        seconds, best: median and least over the rounds. speedup: of the fastest dense engine, median over this one's.
        error: largest difference from the float64 reference over its largest value.
        predicted: by the static model, for the cards that it knows.
    """

    op: str
    direction: str
    arithmetic: str
    channels: int
    frames: int
    engine: str
    sparsity: float | None
    block: str | None
    seconds: float
    best: float
    speedup: float
    error: float
    predicted: float | None


def products(samples: int = 128) -> list[Product]:
    """Every op, direction, arithmetic and stage of ST-GCN."""
    return [
        Product(op, direction, arithmetic, channels, frames, samples)
        for op in gpu_model.OPS
        for direction in gpu_model.DIRECTIONS
        for arithmetic in DTYPE
        for channels, frames in gpu_model.SHAPES
    ]


@contextmanager
def arithmetic_of(name: str) -> Iterator[None]:
    """float32 products in IEEE float32, or in TF32 for "tf32", in torch's own engines and in this package."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Case:
    """The tensors of a product, and its engines as functions without arguments that return the result."""

    def __init__(self, product: Product, device: str) -> None:
        random = torch.Generator().manual_seed(0)
        dtype, (_, inputs, taps) = DTYPE[product.arithmetic], product.shape
        size = (product.samples, inputs, product.frames, 25)
        self.product, self.device = product, device
        self.x = torch.randn(size, generator=random).to(device, dtype)
        self.dy = torch.randn(size, generator=random).to(device, dtype)
        self.weight = (torch.randn(product.shape, generator=random) / (taps * inputs) ** 0.5).to(device, dtype)
        self.adjacency = Skeleton.load("nturgb+d").adjacency("stgcn_spatial").to(device, dtype)

    def _run(self, op: Callable[..., Tensor], weight: Tensor, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """op(x, weight, adjacency), or its gradients: dX with that of the adjacency, or dW."""
        leaves = [tensor.detach().clone() for tensor in (weight, self.adjacency.to(x.dtype))]
        x = x.detach()  # keeps its strides
        if self.product.direction == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (op(x, *leaves),)

            return forward
        wanted = [x] if self.product.direction == "dX" else [leaves[0]]
        if self.product.op == "graph_conv" and self.product.direction == "dX":
            wanted.append(leaves[1])
        for leaf in wanted:
            leaf.requires_grad_()
        y = op(x, *leaves)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def _dense(self, x: Tensor, weight: Tensor, adjacency: Tensor) -> Tensor:
        if self.product.op == "temporal_conv":
            return F.conv2d(x, weight.unsqueeze(-1), padding=(4, 0))
        n, _, t, v = x.shape
        hidden = F.conv2d(x, weight.permute(2, 0, 1).reshape(-1, x.shape[1], 1, 1))
        return torch.einsum("nkctv,kvw->nctw", hidden.view(n, weight.shape[2], -1, t, v), adjacency)

    def dense_engines(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """torch eager (cuDNN on a card), the same in channels_last, and torch.compile."""
        last = torch.channels_last
        x_last, dy_last = self.x.contiguous(memory_format=last), self.dy.contiguous(memory_format=last)
        compiled = torch.compile(self._dense, dynamic=False, backend="aot_eager" if self.device == "cpu" else "inductor")
        return {
            "torch": self._run(self._dense, self.weight, self.x, self.dy),
            "torch channels_last": self._run(self._dense, self.weight, x_last, dy_last),
            "torch.compile": self._run(compiled, self.weight, self.x, self.dy),
        }

    def sparse(self, pattern: BlockPattern) -> Callable[[], tuple[Tensor, ...]]:
        """This package's op on the live blocks; the backend is chosen when it runs."""
        if self.product.op == "temporal_conv":
            op = lambda x, values, adjacency: temporal_conv(x, values, pattern)
        else:
            op = lambda x, values, adjacency: graph_conv(x, values, pattern, adjacency)
        return self._run(op, pattern.gather(self.weight), self.x, self.dy)

    def expected(self, pattern: BlockPattern | None) -> tuple[Tensor, ...]:
        """The result in float64 from the reference; of a dense product without a pattern."""
        full = pattern or BlockPattern.full(self.product.shape, (1, 1)).to(self.device)
        if self.product.op == "temporal_conv":
            op = lambda x, values, adjacency: reference.temporal_conv(x, values, full)
        else:
            op = lambda x, values, adjacency: reference.graph_conv(x, values, full, adjacency)
        values = full.gather(self.weight.double())
        made = self._run(op, values, self.x.double(), self.dy.double())()
        return tuple(full.scatter(t) if pattern is None and t.shape == values.shape else t for t in made)


def seconds_of(run: Callable[[], object], device: str, scratch: Tensor | None) -> float:
    """Time of one run, with a cold L2; on a card between two events on the current stream."""
    if scratch is not None:
        scratch.zero_()
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def card_name(device: str) -> str:
    """The card's own name, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def measure(product: Product, patterns: Iterable[Pattern], device: str, rounds: int = 20) -> list[Measured]:
    """Every engine on one product, checked, then timed in turn.

    Raises:
        WrongResult: an engine's output is not that of the reference; nothing is timed then.
    """
    with arithmetic_of(product.arithmetic):
        case, tolerance = Case(product, device), TOLERANCE[product.arithmetic]
        entrants: dict[tuple[str, Pattern | None], Callable[[], tuple[Tensor, ...]]] = {}
        errors = {}
        want = case.expected(None)
        for name, run in case.dense_engines().items():
            entrants[name, None] = run
            errors[name, None] = _error(f"{name} {product}", run(), want, tolerance)
        for pattern in dict.fromkeys(patterns):
            drawn = draw(product.shape, pattern).to(device)
            want = case.expected(drawn)
            for backend in _backends(device):
                with forced_backend(backend):
                    run = _forced(case.sparse(drawn), backend)
                entrants[backend, pattern] = run
                errors[backend, pattern] = _error(f"{backend} {pattern.label} {product}", run(), want, tolerance)
        scratch = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device != "cpu" else None
        times: dict[tuple[str, Pattern | None], list[float]] = {key: [] for key in entrants}
        for number in range(rounds + 2):
            for key, run in entrants.items():
                taken = seconds_of(run, device, scratch)
                if number >= 2:
                    times[key].append(taken)
    fastest = min(statistics.median(times[key]) for key in times if key[1] is None)
    rows = []
    for (engine, pattern), taken in times.items():
        median = statistics.median(taken)
        name = engine if pattern is None else f"sparse_stgcn ({engine})"
        sparsity, block = (None, None) if pattern is None else (pattern.sparsity, pattern.block)
        about = (product.op, product.direction, product.arithmetic, product.channels, product.frames, name, sparsity, block)
        predicted = _predicted(product, pattern, engine, device)
        rows.append(Measured(*about, median, min(taken), fastest / median, errors[engine, pattern], predicted))
    return rows


def write(path: Path, device: str, rows: list[Measured]) -> None:
    """The rows with the card's name and what they depend on, as JSON and as markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"card": card_name(device), "cuda": torch.version.cuda, "environment": environment()}
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(card_name(device), rows) + "\n", encoding="utf-8")


def markdown(card: str, rows: list[Measured]) -> str:
    """Every row."""
    lines = [
        f"Measured on {card}.", "",
        "| op | C, T | engine | pattern | us | against the fastest dense engine | predicted us | error |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in rows:
        pattern = "" if r.sparsity is None else f"{r.sparsity:g} ({r.block})"
        predicted = "" if r.predicted is None else f"{1e6 * r.predicted:.1f}"
        lines.append(
            f"| {r.op} {r.direction} {r.arithmetic} | {r.channels}, {r.frames} | {r.engine} | {pattern} | "
            f"{1e6 * r.seconds:.1f} | {r.speedup:.2f}x | {predicted} | {r.error:.0e} |"
        )
    return "\n".join(lines)


def _backends(device: str) -> list[str]:
    if device == "cpu":
        return ["native"]
    return [name for name in ("triton", "cuda") if backends()[name].startswith("available")]


def _forced(run: Callable[[], tuple[Tensor, ...]], backend: str) -> Callable[[], tuple[Tensor, ...]]:
    def run_forced() -> tuple[Tensor, ...]:
        with forced_backend(backend) if backend else nullcontext():
            return run()

    return run_forced


def _error(name: str, made: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> float:
    return max(check(name, a, b, tolerance) for a, b in zip(made, want, strict=True))


def _predicted(product: Product, pattern: Pattern | None, backend: str, device: str) -> float | None:
    card = next((card for key, card in CARDS.items() if key in card_name(device).lower()), None)
    if card is None or pattern is None:
        return None
    block = tuple(map(int, pattern.block.split("x")))
    made = gpu_model.predict(card, Problem(product.op, product.direction, product.arithmetic, product.samples, product.channels,
                                           product.channels, product.frames, 25, product.shape[2], *block, pattern.sparsity),
                             backend)  # fmt: skip
    return None if made is None else made.seconds
