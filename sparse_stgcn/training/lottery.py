"""A winning ticket: frozen weights, and a score for every block that learns which of them to keep (paper, 3.2).

With frozen weights W and scores S, one for each block, the network computes with

    W * M,   M = 1 where S is among the highest of its pool, else 0      (paper, Eqs. 7 and 8)

with an exact number of ones. M has no gradient, so the scores take that of the mask (straight-through estimator,
Bengio et al. 2013): dL/dS = sum over the weights of the block of W * dL/d(W M). With ``absolute`` the ranking is by |S|
and the gradient gets the sign of S (edge-popup, Ramanujan et al. 2020). A block that is cut has a gradient too, so
it can come back; that is why the forward pass here is the dense convolution.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import masks
from ..kernels import BlockPattern
from ..sparsity import mask_layers, maskable_convs, stage

__all__ = ["SCORE_INITS", "ScoredNetwork"]

SCORE_INITS = ("uniform", "fan_in", "magnitude")


class ScoredNetwork(nn.Module):
    """A network with frozen weights whose parameters are the scores of its blocks.

    Args:
        model: a dense network, pre-trained or freshly initialised. Its weights are frozen; the running statistics of
            its batch norms still follow the data.
        sparsity, block, density, scope: how many blocks are kept, as for ``sparsify``, without a floor for each row;
            the pool of the ranking is the scope, and each layer with density ``erk``.
        absolute: rank by |S|.
        init: how scores begin. ``uniform``: one law for all layers, +-sqrt(6 / mean fan_in); ``fan_in``: the authors',
            +-sqrt(6 / fan_in) for each layer; ``magnitude``: root mean square of the block's weights, so that the
            first mask is that of magnitude pruning.
        seed: of the scores.
        train_norm, train_head: also train scale and shift of the batch norms, and the classifier.

    Raises:
        ValueError: the model is not dense, or an argument is out of range.
    """

    def __init__(self, model: nn.Module, sparsity: float, block: tuple[int, int] | str = (1, 1),
                 density: masks.Density = "uniform", scope: str = "global", absolute: bool = False, init: str = "uniform",
                 seed: int = 0, train_norm: bool = False, train_head: bool = False) -> None:
        super().__init__()
        if stage(model) != "dense":
            raise ValueError(f"Expected a dense network. Got one in stage {stage(model)!r}; its masked weights are lost.")
        if init not in SCORE_INITS:
            raise ValueError(f"Expected init to be one of {', '.join(SCORE_INITS)}. Got {init!r}.")
        self.model, self.absolute = model, absolute
        self._layers = mask_layers(model, block)
        counts = masks.budgets(self._layers, sparsity, density, scope, floor=False)
        alone = scope == "layer" or density != "uniform"
        pools = [[i] for i in range(len(counts))] if alone else masks.pools(self._layers, scope)
        self._pools = [([int(i) for i in pool], int(sum(counts[i] for i in pool))) for pool in pools]
        self.scores = nn.ParameterList(self._initial(init, seed))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in model.modules():
            if (train_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)) or \
                    (train_head and isinstance(module, nn.Linear) and module is model.get_submodule("cls_head.fc_cls")):
                module.requires_grad_(True)

    @property
    def config(self) -> dict[str, Any]:
        """Of the network, for ``checkpoint.pack``."""
        return self.model.config  # type: ignore[return-value]

    def live(self) -> list[Tensor]:
        """Bool (G, H, K) for each layer: the blocks with the highest scores of each pool, an exact number of them."""
        ranked = [score.detach().abs() if self.absolute else score.detach() for score in self.scores]
        kept = [torch.zeros_like(score, dtype=torch.bool) for score in ranked]
        for pool, count in self._pools:
            joined = torch.cat([ranked[i].flatten() for i in pool])
            chosen = torch.zeros_like(joined, dtype=torch.bool)
            chosen[joined.topk(count, sorted=False).indices] = True
            for i, part in zip(pool, chosen.split([ranked[i].numel() for i in pool]), strict=True):
                kept[i] = part.view_as(ranked[i])
        return kept

    def forward(self, keypoint: Tensor) -> Tensor:
        """keypoint (N, M, T, V, C) -> logits (N, classes) of the masked network."""
        weights = {}
        convs = maskable_convs(self.model)
        for (name, conv), layer, score, live in zip(convs.items(), self._layers, self.scores, self.live(), strict=True):
            through = score.abs() if self.absolute else score
            # The value is that of the mask to the bit; the gradient is that of the score.
            mask = live.to(score.dtype) + (through - through.detach())
            weights[f"{name}.weight"] = conv.from_oik(conv.as_oik(conv.weight) * _spread(mask, layer))
        return functional_call(self.model, weights, (keypoint,))

    def ticket(self) -> nn.Module:
        """The network with its present mask as patterns, compact. The scores have done their work then."""
        for conv, layer, live in zip(maskable_convs(self.model).values(), self._layers, self.live(), strict=True):
            conv.attach(BlockPattern.from_blocks(live, layer.shape, layer.block))
            conv.compact()
        return self.model.requires_grad_(True)

    def _initial(self, init: str, seed: int) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(seed)
        mean_fan_in = sum(layer.fan_in for layer in self._layers) / len(self._layers)
        scores = []
        for conv, layer in zip(maskable_convs(self.model).values(), self._layers, strict=True):
            if init == "magnitude":
                score = torch.from_numpy(masks.methods.root_mean_square(layer)).float()
            else:
                bound = (6 / (layer.fan_in if init == "fan_in" else mean_fan_in)) ** 0.5
                score = bound * (2 * torch.rand(layer.grid, generator=generator) - 1)
            scores.append(nn.Parameter(score.to(conv.weight.device)))
        return scores


def _spread(mask: Tensor, layer: masks.Layer) -> Tensor:
    """(G, H, K) of blocks -> (O, I, K) of weights."""
    (out_channels, in_channels, _), (bo, bi), (rows, cols, taps) = layer.shape, layer.block, layer.grid
    if (bo, bi) == (1, 1):
        return mask
    full = mask[:, None, :, None].expand(rows, bo, cols, bi, taps).reshape(rows * bo, cols * bi, taps)
    return full[:out_channels, :in_channels]
