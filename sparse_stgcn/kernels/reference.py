"""Every op of the package in dense PyTorch, any dtype and device: the definition of correct.

All of them are differentiable by autograd, so that they define the gradients too.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import BlockPattern


def temporal_conv(x: Tensor, values: Tensor, pattern: BlockPattern, bias: Tensor | None = None,
                  stride: int = 1, dilation: int = 1) -> Tensor:
    """Y[n,o,t,v] = b[o] + sum over live (o,i,k) of W[o,i,k] X[n, i, t*stride + (k - (K-1)/2)*dilation, v].

    Shapes: x (N, I, T, V) -> (N, O, ceil(T / stride), V); frames outside of X count as 0; K is odd.
    """
    weight = pattern.scatter(values).unsqueeze(-1)
    padding = (pattern.shape[2] - 1) // 2 * dilation
    return F.conv2d(x, weight, bias, stride=(stride, 1), padding=(padding, 0), dilation=(dilation, 1))


def graph_conv(x: Tensor, values: Tensor, pattern: BlockPattern, adjacency: Tensor, bias: Tensor | None = None
               ) -> Tensor:
    """Y[n,o,t,w] = sum over k, v of A_k[v,w] (b_k[o] + sum over live i of W_k[o,i] X[n,i,t,v]).

    Shapes: x (N, I, T, V) -> (N, O, T, V); pattern (O, I, K subsets); bias (K, O);
    adjacency shared (K, V, V), per sample (N, K, V, V) or per channel (N, K, O, V, V).
    """
    hidden = torch.einsum("oik,nitv->nkotv", pattern.scatter(values), x)
    if bias is not None:
        hidden = hidden + bias[None, :, :, None, None]
    spec = {3: "nkotv,kvw->notw", 4: "nkotv,nkvw->notw", 5: "nkotv,nkovw->notw"}[adjacency.dim()]
    return torch.einsum(spec, hidden, adjacency)


def group_lasso(weights: Sequence[Tensor], patterns: Sequence[BlockPattern], groups: Sequence[int] | None = None
                ) -> Tensor:
    """L_c = sum over groups of the 2-norm of all masked weights of the group (paper, Eq. 9).

    weights: (O, I, K) each; masked = not kept by the pattern. A group is a layer of the paper; None makes every
    weight its own group. The gradient is W* / norm on masked entries, 0 elsewhere, and 0 where the norm is 0.
    """
    squares: dict[int, Tensor] = {}
    for index, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
        group = index if groups is None else groups[index]
        square = weight.masked_fill(pattern.mask(), 0).square().sum()
        squares[group] = squares[group] + square if group in squares else square
    total = weights[0].new_zeros(())
    for square in squares.values():
        positive = square > 0
        total = total + torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), 0)
    return total


def norm(xs: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None,
         relu: bool = False, relu_before: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """y = weight (x - mean) / sqrt(var + eps) + bias, x the channels of ``xs`` one after the other; then, each if asked for,
    ReLU (``relu_before``), plus residual, ReLU (``relu``).

    Shapes: xs (N, C_i, T, V) -> y (N, C, T, V), mean (C,) and unbiased variance (C,) over samples and pixels.
    """
    x = torch.cat(list(xs), 1)
    variance, mean = torch.var_mean(x, (0, 2, 3))
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    y = F.relu(y) if relu_before else y
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y, mean, variance
