"""A Recognizer whose forward pass is a compiled program of csrc/cpu/fused.h."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.aagcn import AAGCN
from ..backbones.ctrgcn import CTRGCN
from ..backbones.dgstgcn import DGSTGCN
from ..backbones.stgcn import STGCN
from ..kernels import _native
from ..recognizer import Ensemble, Head, Recognizer, mean_probability
from .aagcn import AAGCNProgram
from .choice import ENGINES, candidates, dense, fastest, widened
from .columns import ColumnProgram, takes_columns
from .ctrgcn import CTRGCNProgram
from .dgstgcn import DGSTGCNProgram
from .program import Program
from .stgcn import STGCNProgram

PROGRAMS: dict[type[nn.Module], type[Program]] = {
    STGCN: STGCNProgram, AAGCN: AAGCNProgram, CTRGCN: CTRGCNProgram, DGSTGCN: DGSTGCNProgram}

KEPT = 64  # programs: weights are packed for every clip length, 1.6 MB of ST-GCN at 0.95 and 16 MB without zeros


def _program(model: Recognizer) -> type[Program]:
    program = PROGRAMS[type(model.backbone)]
    return ColumnProgram if program is STGCNProgram and takes_columns(model) else program


class FusedRecognizer(nn.Module):
    """A Recognizer made ready for inference on the CPU; made by ``optimize``.

    Attributes:
        engine: "fused" runs the compiled program, "fused in 8x1" one in which well-filled layers of smaller blocks run in
            blocks of 8 outputs, "torch" and "torch channels_last" the dense network in torch; "fastest" takes, at the first
            call for a clip length, the one that is measured to be the fastest on that batch, of those that can be
            (``choice.candidates``).
        choice: the engine that was taken, by clip length.

    Programs of the newest ``KEPT`` clip lengths are kept. They are of the weights as they were: ``load_state_dict`` and ``to``
    have them made again, other changes of ``model`` do not.
    """

    def __init__(self, model: Recognizer, engine: str = "fastest") -> None:
        super().__init__()
        self.model, self.engine = model, engine
        self._forget()

    def _forget(self) -> None:
        self.choice: dict[int, str] = {}
        self._programs: dict[int, Any] = {}  # by clip length, the newest last
        self._dense: dict[str, Recognizer] = {}  # by engine

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._forget()

    def _apply(self, *args: Any, **kwargs: Any) -> FusedRecognizer:
        super()._apply(*args, **kwargs)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A program holds addresses of this process. The choice stays: a copy gives the same bits.
        return {**self.__dict__, "_programs": {}, "_dense": {}}

    @torch.inference_mode()
    def forward(self, keypoint: Tensor) -> Tensor:
        program = self.prepare(keypoint)
        return self.in_torch(keypoint) if program is None else run([(program, self.model.cls_head)], keypoint)[0]

    def in_torch(self, keypoint: Tensor) -> Tensor:
        """Logits from torch, where it was chosen."""
        return self._dense[self.choice[keypoint.shape[2]]](keypoint)

    def prepare(self, keypoint: Tensor) -> Any:
        """The compiled program for clips of this length, or None where torch runs them; made at the first call."""
        self.model.backbone._check(keypoint)
        if keypoint.dtype != torch.float32 or keypoint.device.type != "cpu":
            raise TypeError(f"Expected keypoint to be float32 on the CPU. Got {keypoint.dtype} on {keypoint.device}.")
        if self.model.cls_head.fc_cls.weight.dtype != torch.float32:
            raise TypeError(f"Expected the network to be float32. Got {self.model.cls_head.fc_cls.weight.dtype}; use .float().")
        frames = keypoint.shape[2]
        if frames not in self.choice:
            if not len(keypoint):  # an empty batch says nothing about engines: they are timed on one sample
                keypoint = keypoint.new_zeros(1, *keypoint.shape[1:])
            names = [self.engine] if self.engine in ENGINES else candidates(self.model)
            made = {name: self._make(name, frames) for name in names}
            calls = [(name, engine if name.startswith("torch") else self._call(engine)) for name, engine in made.items()]
            name = names[0] if len(names) == 1 else fastest(calls, keypoint)
            self.choice[frames] = name
            self._keep(name, frames, made[name])
        name = self.choice[frames]
        in_torch = name.startswith("torch")
        made = self._dense.get(name) if in_torch else self._programs.get(frames)
        if made is None:
            made = self._keep(name, frames, self._make(name, frames))
        return None if in_torch else made

    def _keep(self, name: str, frames: int, made: Any) -> Any:
        if name.startswith("torch"):
            self._dense[name] = made
            return made
        while len(self._programs) >= KEPT:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[frames] = made
        return made

    def _make(self, name: str, frames: int) -> Any:
        if name.startswith("torch"):
            return self._dense[name] if name in self._dense else dense(self.model, name)
        model = widened(self.model) if name == "fused in 8x1" else self.model
        return _program(model)(model, frames).build()

    def _call(self, program: Any) -> Callable[[Tensor], Tensor]:
        return lambda keypoint: run([(program, self.model.cls_head)], keypoint)[0]


class FusedEnsemble(nn.Module):
    """An Ensemble made ready for inference on the CPU; made by ``optimize``. ``members`` are FusedRecognizers."""

    def __init__(self, ensemble: Ensemble, engine: str = "fastest") -> None:
        super().__init__()
        self.members = nn.ModuleList(FusedRecognizer(member, engine) for member in ensemble.members)

    @torch.inference_mode()
    def forward(self, keypoint: Tensor) -> Tensor:
        programs = [member.prepare(keypoint) for member in self.members]
        fused = [(program, member.model.cls_head) for program, member in zip(programs, self.members, strict=True) if program]
        logits = iter(run(fused, keypoint) if fused else [])
        return mean_probability([next(logits) if program else member.in_torch(keypoint)
                                 for program, member in zip(programs, self.members, strict=True)])


def run(networks: list[tuple[Any, Head]], keypoint: Tensor) -> list[Tensor]:
    """Logits of compiled networks of the same input, with their heads, in one call."""
    assert _native.module is not None
    batch, persons = keypoint.shape[:2]
    features = [torch.empty(batch, persons, head.fc_cls.in_features) for _, head in networks]
    _native.module.fused_run([program for program, _ in networks], batch, persons, keypoint.data_ptr(), keypoint.stride(),
                             [feature.data_ptr() for feature in features], torch.get_num_threads())
    return [_classify(feature.mean(1), head) for feature, (_, head) in zip(features, networks, strict=True)]


def _classify(features: Tensor, head: Head) -> Tensor:
    """Sample by sample: a product of matrices sums in another order than one with a vector, so bits would follow the batch."""
    logits = torch.empty(len(features), head.fc_cls.out_features)
    for row, sample in zip(logits, features, strict=True):
        row.copy_(head.fc_cls(sample))
    return logits
