"""A Recognizer whose forward pass is a compiled program of csrc/cpu/fused.h."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backbones.aagcn import AAGCN
from ..backbones.ctrgcn import CTRGCN
from ..backbones.dgstgcn import DGSTGCN
from ..backbones.stgcn import STGCN
from ..recognizer import Recognizer
from .aagcn import AAGCNProgram
from .choice import ENGINES, MEASURED_ABOVE, dense, density, fastest
from .ctrgcn import CTRGCNProgram
from .dgstgcn import DGSTGCNProgram
from .program import Program
from .stgcn import STGCNProgram

PROGRAMS: dict[type[nn.Module], type[Program]] = {
    STGCN: STGCNProgram, AAGCN: AAGCNProgram, CTRGCN: CTRGCNProgram, DGSTGCN: DGSTGCNProgram}


class FusedRecognizer(nn.Module):
    """A Recognizer made ready for inference on the CPU; made by ``optimize``.

    Attributes:
        engine: "fused" runs the compiled program, "torch" and "torch channels_last" the dense network in torch; "fastest"
            takes, at the first call for a clip length, the one that is measured to be the fastest on that batch. At
            densities of 0.5 and below that is the program, and nothing is measured.
        choice: the engine that was taken, by clip length.
    """

    def __init__(self, model: Recognizer, engine: str = "fastest") -> None:
        super().__init__()
        self.model, self.engine = model, engine
        self.choice: dict[int, str] = {}
        self._run: dict[int, Callable[[Tensor], Tensor]] = {}

    @torch.inference_mode()
    def forward(self, keypoint: Tensor) -> Tensor:
        self.model.backbone._check(keypoint)
        if keypoint.dtype != torch.float32 or keypoint.device.type != "cpu":
            raise TypeError(f"Expected keypoint to be float32 on the CPU. Got {keypoint.dtype} on {keypoint.device}.")
        frames = keypoint.shape[2]
        if frames not in self._run:
            names = [self.engine] if self.engine in ENGINES else ENGINES[:1 if density(self.model) <= MEASURED_ABOVE else None]
            made = ((name, self._make(name, frames)) for name in names)
            self.choice[frames], self._run[frames] = next(made) if len(names) == 1 else fastest(made, keypoint)
        return self._run[frames](keypoint)

    def _make(self, name: str, frames: int) -> Callable[[Tensor], Tensor]:
        if name != "fused":
            return dense(self.model, name)
        program, head = PROGRAMS[type(self.model.backbone)](self.model, frames).build(), self.model.cls_head.fc_cls

        def run(keypoint: Tensor) -> Tensor:
            batch, persons = keypoint.shape[:2]
            features = torch.empty(batch, persons, head.in_features)
            program.run(batch, persons, keypoint.data_ptr(), keypoint.stride(), features.data_ptr(), torch.get_num_threads())
            return head(features.mean(1))

        return run
