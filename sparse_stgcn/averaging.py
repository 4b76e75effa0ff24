"""Weight averaging: one network from several, the mean of their weights over the union of their masks."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import BlockPattern
from .recognizer import Recognizer
from .sparsity import compact, densify, maskable_convs, stage

__all__ = ["average"]


def average(models: Sequence[Recognizer]) -> Recognizer:
    """theta = 1 / L sum over members l of theta_l, masked weights being 0 in their member; the members are left as they are.

    A weight lives where any member keeps it; if a member is dense, all do. Source: the uniform soup of Wortsman et al., Model
    soups, ICML 2022. The running statistics of the batch norms do not fit the activations of the mean:
    ``torch.optim.swa_utils.update_bn`` takes them anew from training data.

    Raises:
        ValueError: no member, members of another architecture, or with another block.
    """
    if not models:
        raise ValueError("Expected at least one model. Got none.")
    if any(model.config != models[0].config for model in models):
        raise ValueError("Expected models of one architecture, whose weights correspond. Got different ones.")
    states = [densify(_live(copy.deepcopy(model)), forget=True).state_dict() for model in models]
    mean = Recognizer.from_config(models[0].config).to(next(models[0].parameters()).device)
    mean.load_state_dict({key: _mean([state[key] for state in states]) for key in states[0]})
    if all(stage(model) != "dense" for model in models):
        convs = [maskable_convs(model) for model in models]
        for name, conv in maskable_convs(mean).items():
            conv.attach(_union([own[name].pattern for own in convs], name))
            conv.compact()
    return mean.eval()


def _live(model: Recognizer) -> Recognizer:
    """The model in the compact stage, if it has masks: a warm-up trains masked weights too."""
    if stage(model) == "warmup":
        compact(model)
    return model


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of floating point; of counters and the like, which cannot be averaged, the first."""
    return torch.stack(list(tensors)).mean(0) if tensors[0].is_floating_point() else tensors[0]


def _union(patterns: Sequence[Any], name: str) -> BlockPattern:
    first = patterns[0]
    if any(pattern is None or pattern.block != first.block for pattern in patterns):
        blocks = ", ".join("none" if pattern is None else f"{pattern.block[0]}x{pattern.block[1]}" for pattern in patterns)
        raise ValueError(f"Expected models with masks of the same block. Got {blocks} in {name}.")
    live = torch.stack([pattern.blocks().cpu() for pattern in patterns]).any(0)
    return BlockPattern.from_blocks(live, first.shape, first.block)
