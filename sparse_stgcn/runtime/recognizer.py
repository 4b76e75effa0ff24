"""A Recognizer whose forward pass is a compiled program of csrc/cpu/fused.h."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.aagcn import AAGCN
from ..backbones.ctrgcn import CTRGCN
from ..backbones.dgstgcn import DGSTGCN
from ..backbones.stgcn import STGCN
from ..recognizer import Recognizer
from .aagcn import AAGCNProgram
from .ctrgcn import CTRGCNProgram
from .dgstgcn import DGSTGCNProgram
from .program import Program
from .stgcn import STGCNProgram

PROGRAMS: dict[type[nn.Module], type[Program]] = {
    STGCN: STGCNProgram, AAGCN: AAGCNProgram, CTRGCN: CTRGCNProgram, DGSTGCN: DGSTGCNProgram}


class FusedRecognizer(nn.Module):
    """A Recognizer compiled for inference on the CPU; made by ``optimize``."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model
        self._programs: dict[int, Any] = {}

    @torch.inference_mode()
    def forward(self, keypoint: Tensor) -> Tensor:
        self.model.backbone._check(keypoint)
        if keypoint.dtype != torch.float32 or keypoint.device.type != "cpu":
            raise TypeError(f"Expected keypoint to be float32 on the CPU. Got {keypoint.dtype} on {keypoint.device}.")
        batch, persons, frames = keypoint.shape[:3]
        if frames not in self._programs:
            self._programs[frames] = PROGRAMS[type(self.model.backbone)](self.model, frames).build()
        head = self.model.cls_head.fc_cls
        features = torch.empty(batch, persons, head.in_features)
        self._programs[frames].run(batch, persons, keypoint.data_ptr(), keypoint.stride(), features.data_ptr(),
                                   torch.get_num_threads())
        return head(features.mean(1))
