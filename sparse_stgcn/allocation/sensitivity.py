"""How much the loss depends on the blocks of every layer: one number per layer, from gradients of a few batches.

Keep each block of layer l with probability d, independently, and scale what is kept by 1 / d, as the batch norm behind the
layer does. The change of block b has mean 0 and variance w_b^2 (1 - d) / d, so to second order the loss grows by

    E[dL] = 1/2 sum over b of w_b' H_b w_b (1 - d) / d  ~  s_l (1 / d - 1),     s_l = 1/2 sum over b of E[(w_b . g_b)^2]

with the empirical Fisher matrix E[g g'] in the place of the Hessian H (Theis et al. 2018, arXiv 1801.05787, use it to
prune). g is the gradient of a batch's mean loss, times the square root of its size.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..masks import Layer
from ..sparsity import maskable_convs

__all__ = ["sensitivity"]


def sensitivity(model: nn.Module, layers: Sequence[Layer], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """s_l of every layer of a dense network; the network, its batch norms' statistics included, is left as it was.

    Args:
        layers: of ``mask_layers(model, block)``: they give the blocks.
        batches: (keypoint, label) on the network's device.
    """
    model = copy.deepcopy(model).train()
    convs = maskable_convs(model)
    total, count = dict.fromkeys(convs, 0.0), 0
    for keypoint, label in batches:
        model.zero_grad()
        F.cross_entropy(model(keypoint), label).backward()
        for layer in layers:
            conv = convs[layer.name]
            gradient = torch.zeros_like(conv.weight) if conv.weight.grad is None else conv.weight.grad
            blocks = layer.block_sums(conv.as_oik((conv.weight.detach() * gradient).double()).cpu().numpy())
            total[layer.name] += 0.5 * len(label) * float(np.square(blocks).sum())
        count += 1
    return {name: value / count for name, value in total.items()}
