"""The ops between convolutions and norms in dense PyTorch, any dtype and device: the definition of correct."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(y: Tensor, joint_weight: Tensor, joint_bias: Tensor, frame_weight: Tensor, frame_bias: Tensor, fc1_weight: Tensor,
           fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """AA-GCN's attention: y times 1 + s for joints, then frames, then channels, each s a sigmoid.

    Shapes: y (N, C, T, V); joint_weight and frame_weight (1, C, taps); fc1_weight (H, C); fc2_weight (C, H).
    """
    along = lambda x, weight, bias: torch.sigmoid(F.conv1d(x, weight, bias, padding=weight.shape[2] // 2))
    y = y * (1 + along(y.mean(2), joint_weight, joint_bias)).unsqueeze(2)
    y = y * (1 + along(y.mean(3), frame_weight, frame_bias)).unsqueeze(3)
    hidden = F.relu(F.linear(y.mean((2, 3)), fc1_weight, fc1_bias))
    return y * (1 + torch.sigmoid(F.linear(hidden, fc2_weight, fc2_bias)))[:, :, None, None]


def max_pool(x: Tensor, stride: int = 1) -> Tensor:
    """y[n,c,t,v] = max of x[n,c,u,v] over the frames u from t*stride - 1 to t*stride + 1 that exist."""
    return F.max_pool2d(x, (3, 1), (stride, 1), (1, 0))


def share(x: Tensor, count: int, mean: bool = False) -> tuple[Tensor, ...]:
    """x, ``count`` times, then its mean over frames (N, C, 1, V) if asked for."""
    return (x,) * count + ((x.mean(2, keepdim=True),) if mean else ())


def append_mean(x: Tensor, count: int = 1) -> tuple[Tensor, ...]:
    """x (N, C, T, V) with its mean over joints as joint V, ``count`` times."""
    return (torch.cat([x, x.mean(3, keepdim=True)], 3),) * count


def spread_mean(xs: Sequence[Tensor], coef: Tensor) -> Tensor:
    """y[n,c,t,v] = x[n,c,t,v] + x[n,c,t,V] coef[v], x the channels of ``xs`` (N, C_i, T, V + 1) one after the other."""
    x = torch.cat(list(xs), 1)
    return x[..., :-1] + x[..., -1:] * coef
