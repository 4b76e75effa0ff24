"""Whole networks: inference and a training step, ours at every level and pattern against the dense engines."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import macs, sparsity
from ..backbones import create_model
from ..backbones.base import Block
from ..kernels.dispatch import forced_backend
from ..layers import SparseConv2d
from ..recognizer import Ensemble, Recognizer, mean_probability
from ..runtime import optimize
from ..training.generator import TwoStage
from ..training.memory import keep_freed_memory
from .measure import Candidate, Expected, relative_error
from .memory import StepMemory, peak_memory
from .peers import candidate, dense_engines
from .suite import Entrant, compare
from .table import Row

TOLERANCE = 1e-3  # of logits and of the classifier's gradient; float32 sums through ten blocks, every engine in its own order
# Of gradients that come through the network. A rounding error decides on which side of 0 some of the 10^7 inputs of ReLUs lie,
# and with that whether gradients pass: PyTorch's own step in float32 is up to 3 % off float64's at batch 8, and 42 % for
# DG-STGCN at 0.99 in blocks of 1x1, many of whose channels hardly vary. So it is TIMES what PyTorch is off on the same network,
# at least THROUGH.
THROUGH, TIMES = 0.1, 3


@dataclass(frozen=True)
class Pattern:
    """What to sparsify with."""

    sparsity: float
    block: str = "8x1"
    density: str = "uniform"

    @property
    def label(self) -> str:
        """A name that is unique within one run."""
        return f"ours {self.sparsity:g} {self.block} {self.density}"


@dataclass(frozen=True)
class Setting:
    """One input shape on so many threads."""

    backbone: str
    batch: int
    threads: int
    persons: int = 2
    frames: int = 100
    classes: int = 60
    width: int = 64

    def example(self) -> Tensor:
        """keypoint (batch, persons, frames, 25, 3), nobody absent."""
        return torch.randn(self.batch, self.persons, self.frames, 25, 3, generator=torch.Generator().manual_seed(1))

    def network(self) -> Recognizer:
        """The dense network, always with the same weights."""
        torch.manual_seed(0)
        norm = {"num_person": self.persons} if self.backbone in ("aagcn", "ctrgcn") else {}  # theirs differs per person
        return create_model(self.backbone, self.classes, base_channels=self.width, **norm)


def sparse_network(dense: Recognizer, pattern: Pattern) -> Recognizer:
    """A compact copy, or a dense one at level 0."""
    model = copy.deepcopy(dense)
    if pattern.sparsity == 0:
        return model
    return sparsity.compact(sparsity.sparsify(model, pattern.sparsity, pattern.block, density=pattern.density))


def inference(setting: Setting, patterns: list[Pattern], rounds: int, compile: bool = True) -> list[Row]:
    """Logits of one batch in eval mode, ``optimize(model)`` for ours; every row checked against its own network in float64."""
    x, dense = setting.example(), setting.network().eval()
    work, traffic = _work(dense, setting)
    logits = _logits(dense, x)
    entrants = [Entrant(engine, lambda: logits, work[0], traffic)
                for engine in dense_engines(copy.deepcopy(dense), x, setting.threads, compile)]
    for pattern in _unique(patterns):
        model = sparse_network(dense, pattern).eval()
        fast, kept = optimize(model), _work(model, setting)[0][1]
        entrants.append(Entrant(candidate(pattern.label, _inference(fast, x)), _later(_logits, model, x), kept, traffic,
                                pattern.sparsity, pattern.block, pattern.density))
    return compare("inference", setting.backbone, setting.batch, setting.threads, entrants, rounds, TOLERANCE)


def ensemble(setting: Setting, patterns: list[Pattern], rounds: int, compile: bool = True) -> list[Row]:
    """Mean probabilities of the sparse ``patterns`` as one call of ``optimize(Ensemble(...))``, against ONE dense network.

    The row's sparsity is 1 - (what all members together keep) / (the maskable weights of one network), and may be negative.
    """
    x, dense = setting.example(), setting.network().eval()
    work, traffic = _work(dense, setting)
    logits = _logits(dense, x)
    entrants = [Entrant(engine, lambda: logits, work[0], traffic)
                for engine in dense_engines(copy.deepcopy(dense), x, setting.threads, compile)]
    sparse = [pattern for pattern in patterns if pattern.sparsity > 0]
    members = [sparse_network(dense, pattern).eval() for pattern in sparse]
    kept = round(1 - sum(sparsity.summary(member).kept_fraction for member in members), 2)
    entrants.append(Entrant(candidate("ours", _inference(optimize(Ensemble(members)), x)),
                            lambda: mean_probability([_logits(member, x) for member in members]),
                            sum(_work(member, setting)[0][1] for member in members), len(members) * traffic, kept,
                            sparse[0].block, sparse[0].density))
    return compare(f"ensemble of {len(members)}", setting.backbone, setting.batch, setting.threads, entrants, rounds, TOLERANCE)


def training(setting: Setting, patterns: list[Pattern], rounds: int, compile: bool = True, memory: bool = True) -> list[Row]:
    """Forward, backward and SGD with momentum in train mode after ``compact``, against torch's dense step.

    Checked by the gradients of the classifier, of the input norm and of the convolutions of every block against float64, see
    ``Step.gradients``; the multiply-adds of a step are three times those of inference. Each timed step follows one of its own
    kind, as in training.
    With ``memory`` the peak of a step is measured too, each in a process of its own: of torch eager, and of ours at uniform
    density.
    """
    def peak(pattern: Pattern | None) -> Callable[[], int] | None:
        if not memory or (pattern and pattern.density != "uniform"):
            return None
        level, block = (pattern.sparsity, sparsity.parse_block(pattern.block)) if pattern else (0.0, (8, 1))
        return partial(peak_memory, StepMemory(setting.backbone, level, block, pattern is None, False, setting.batch,
                                               setting.persons, setting.frames, setting.classes, setting.threads))

    x, dense = setting.example(), setting.network()
    label = torch.arange(setting.batch) % setting.classes
    work, traffic = _work(dense, setting)
    want = _expected(dense, x, label)
    entrants = [Entrant(engine, lambda: want, 3 * work[0], 3 * traffic, memory=peak(None) if engine.name == "torch" else None)
                for engine in _torch_steps(dense, x, label, compile)]
    for pattern in _unique(patterns):
        model = sparse_network(dense, pattern)
        kept = _work(model, setting)[0][1]
        untouched = copy.deepcopy(model)  # the timed one is trained
        entrants.append(Entrant(Step(model, x, label).candidate(pattern.label), _later(_expected, untouched, x, label),
                                3 * kept, 3 * traffic, pattern.sparsity, pattern.block, pattern.density, peak(pattern)))
    return compare("training step", setting.backbone, setting.batch, setting.threads, entrants, rounds, TOLERANCE, settle=1)


def warmup(setting: Setting, pattern: Pattern, rounds: int, compile: bool = True) -> list[Row]:
    """A step of the dense warm-up with the group lasso: ours against the same loss written in torch.

    Checked like ``training``; the gradients of masked weights, with the penalty's part, are among those that are compared.
    """
    x, dense = setting.example(), setting.network()
    label = torch.arange(setting.batch) % setting.classes
    work, traffic = _work(dense, setting)

    def prepared() -> Recognizer:
        return sparsity.sparsify(copy.deepcopy(dense), pattern.sparsity, pattern.block, density=pattern.density)

    want = _expected(prepared(), x, label, _torch_penalty)
    entrants = [Entrant(engine, lambda: want, 3 * work[0], 3 * traffic)
                for engine in _torch_steps(prepared(), x, label, compile, _torch_penalty)]
    entrants.append(Entrant(Step(prepared(), x, label, _penalty).candidate(pattern.label), lambda: want, 3 * work[0],
                            3 * traffic, pattern.sparsity, pattern.block, pattern.density))
    return compare("warm-up step", setting.backbone, setting.batch, setting.threads, entrants, rounds, TOLERANCE, settle=1)


Penalty = Callable[[Recognizer], Callable[[], Tensor]]


def _penalty(model: Recognizer) -> Callable[[], Tensor]:
    return TwoStage(model, warmup_epochs=1).penalty


def _torch_penalty(model: Recognizer) -> Callable[[], Tensor]:
    """The sum over network blocks of the norm of all masked weights, in plain torch."""
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for name, conv in sparsity.maskable_convs(model).items():
        dead = 1 - conv.pattern.mask().to(conv.weight_oik())
        groups.setdefault(sparsity.block_of(name), []).append((conv, dead))

    def penalty() -> Tensor:
        return torch.stack([torch.stack([(conv.weight_oik() * dead).square().sum() for conv, dead in group]).sum().sqrt()
                            for group in groups.values()]).sum()

    return penalty


class Step:
    """A training step of ``model``: calling it is what is timed."""

    def __init__(self, model: Recognizer, x: Tensor, label: Tensor, penalty: Penalty | None = None,
                 forward: Callable[[Tensor], Tensor] | None = None, rate: float = 1e-6, backend: str | None = None) -> None:
        keep_freed_memory()  # as every training run does, and for every engine
        self.model, self.x, self.label, self.backend = model.train(), x, label, backend
        self.optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4,
                                         fused=True)
        self.extra, self.forward = penalty(model) if penalty else None, forward or model

    def __call__(self) -> None:
        with forced_backend(self.backend) if self.backend else nullcontext():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.forward(self.x), self.label)
            (loss + self.extra() if self.extra else loss).backward()
            self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Of one more step: those of the classifier, which the forward pass alone decides, and those behind the whole backward
        pass: of the input norm's weight, and of the convolutions of each block as one vector, dense and 0 where no block lives.

        With a penalty the masked weights have gradients as well: its part and the loss's.
        """
        self()
        backbone = self.model.backbone
        made = {"classifier": self.model.cls_head.fc_cls.weight.grad, "input norm": backbone.data_bn.weight.grad}
        for number, block in enumerate(backbone.blocks):
            convs = sparsity.maskable_convs(block).values()
            made[f"block {number}"] = torch.cat([self._gradient(conv).flatten() for conv in convs])
        return {name: gradient.clone() for name, gradient in made.items()}

    def _gradient(self, conv: SparseConv2d) -> Tensor:
        if conv.values is not None:
            return conv.pattern.scatter(conv.values.grad)
        dense = conv.as_oik(conv.weight.grad)
        return dense if conv.pattern is None or self.extra else dense * conv.pattern.mask()

    def candidate(self, name: str) -> Candidate:
        """The step under a name; only its gradients are gathered for the check, outside of what is timed."""
        return Candidate(name, self, self.gradients)


def _torch_steps(dense: Recognizer, x: Tensor, label: Tensor, compile: bool, penalty: Penalty | None = None
                 ) -> Iterator[Candidate]:
    """The dense step on torch alone: eager, channels_last, compiled."""
    yield Step(copy.deepcopy(dense), x, label, penalty, backend="reference").candidate("torch")
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    yield Step(last, x, label, penalty, backend="reference").candidate("torch channels_last")
    if compile:
        model = copy.deepcopy(dense)
        yield Step(model, x, label, penalty, torch.compile(model), backend="reference").candidate("torch.compile")


def _expected(model: Recognizer, x: Tensor, label: Tensor, penalty: Penalty | None = None) -> Expected:
    """The gradients of ``Step.gradients`` in float64, and how far those through the network may be off."""
    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        twin = copy.deepcopy(model) if penalty else sparsity.densify(copy.deepcopy(model))
        return Step(twin.to(dtype), x.to(dtype), label, penalty, rate=0.0, backend="reference").gradients()

    want, rounded = gradients(torch.float64), gradients(torch.float32)
    off = max(relative_error(rounded[name], want[name]) for name in list(want)[1:])
    return Expected(want, max(THROUGH, TIMES * off))


def _inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def _logits(model: Recognizer, x: Tensor) -> Tensor:
    return _inference(sparsity.densify(copy.deepcopy(model)).double().eval(), x.double())()


def _later(function: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _unique(patterns: list[Pattern]) -> list[Pattern]:
    """The patterns, with level 0 once: it has no blocks."""
    return list(dict.fromkeys(Pattern(0.0) if pattern.sparsity == 0 else pattern for pattern in patterns))


def _work(model: Recognizer, setting: Setting) -> tuple[tuple[int, int], int]:
    """((multiply-adds dense, effective), bytes of all tensors between blocks written and read once), of the batch."""
    counted = macs.count(model, setting.frames, setting.persons)
    sizes: list[int] = []
    twin = Recognizer.from_config(model.config).to("meta").eval()
    for module in twin.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel() * 4))
    with torch.no_grad():
        twin(torch.empty(1, setting.persons, setting.frames, 25, 3, device="meta"))
    return (counted.dense * setting.batch, counted.effective * setting.batch), 2 * sum(sizes) * setting.batch
