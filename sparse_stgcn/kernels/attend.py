"""attend: AA-GCN's attention over joints, frames and channels. Definition: reference_units.py; native: csrc/cpu/attend.inl."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native, reference_units
from ._library import LIBRARY, check_plane, implement
from ._memory import empty
from .dispatch import backend_for

__all__ = ["attend"]

_NAMES = ("joint_weight", "joint_bias", "frame_weight", "frame_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def attend(y: Tensor, joint_weight: Tensor, joint_bias: Tensor, frame_weight: Tensor, frame_bias: Tensor, fc1_weight: Tensor,
           fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """out[n,c,t,v] = y[n,c,t,v] a[n,v] b[n,t] g[n,c]: the attention of AA-GCN (Shi et al. 2020, section 3.3).

    a = 1 + sigmoid(convolution along joints of the mean of y over frames),
    b = 1 + sigmoid(convolution along frames of the mean of y a over joints),
    g = 1 + sigmoid(fc2 relu(fc1 of the mean of y a b over both)).

    Args:
        y: (N, C, T, V).
        joint_weight, frame_weight: (1, C, taps), an odd number of taps; their biases (1,).
        fc1_weight: (H, C), fc1_bias (H,); fc2_weight (C, H), fc2_bias (C,).

    Returns:
        (N, C, T, V), contiguous.

    Stored for the backward pass: the arguments, the three means, the hidden units and the three sigmoids of a sample; neither
    of the two tensors between the gates exists.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the dtypes differ.
    """
    parameters = (joint_weight, joint_bias, frame_weight, frame_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if y.dim() != 4:
        raise ValueError(f"Expected y of shape (N, C, T, V). Got {tuple(y.shape)}.")
    check_plane(y=y)
    for name, weight in (("joint_weight", joint_weight), ("frame_weight", frame_weight)):
        if weight.dim() != 3 or weight.shape[:2] != (1, y.shape[1]) or weight.shape[2] % 2 == 0:
            raise ValueError(f"Expected {name} of shape (1, {y.shape[1]}, an odd number). Got {tuple(weight.shape)}.")
    channels, hidden = y.shape[1], fc1_bias.numel()
    shapes: tuple[tuple[int, ...], ...] = (joint_weight.shape, (1,), frame_weight.shape, (1,),
                                           (hidden, channels), (hidden,), (channels, hidden), (channels,))
    for name, tensor, shape in zip(_NAMES, parameters, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"Expected {name} of shape {tuple(shape)}. Got {tuple(tensor.shape)}.")
        if tensor.dtype != y.dtype:
            raise TypeError(f"Expected {name} to have the dtype of y, {y.dtype}. Got {tensor.dtype}.")
    if backend_for("attend", y.device, y.dtype) == "reference":
        return reference_units.attend(y, *parameters)
    return _Attend.apply(y, *parameters)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        out, state = torch.ops.sparse_stgcn.attend(y, parameters)
        ctx.save_for_backward(y, state, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        y, state, *parameters = ctx.saved_tensors
        return tuple(torch.ops.sparse_stgcn.attend_backward(dout, y, parameters, state))


LIBRARY.define("attend(Tensor y, Tensor[] parameters) -> (Tensor, Tensor)")
LIBRARY.define("attend_backward(Tensor dout, Tensor y, Tensor[] parameters, Tensor state) -> Tensor[]")


def _sizes(y: Tensor, parameters: list[Tensor]) -> list[int]:
    return [*y.shape, parameters[0].shape[2], parameters[2].shape[2], parameters[4].shape[0]]


def _fake_forward(y: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    batch, channels, frames, joints = y.shape
    state = channels * (joints + frames + 2) + parameters[4].shape[0] + joints + frames
    return empty(y, y.shape), y.new_empty((batch, state))


@implement("attend", _fake_forward)
def _forward(y: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, state = _fake_forward(y, parameters)
    given = [y.contiguous(), *(tensor.contiguous() for tensor in parameters)]
    _native.module.attend_forward(y.dtype == torch.float64, _sizes(y, parameters),
                                  [tensor.data_ptr() for tensor in (*given, out, state)], torch.get_num_threads())
    return out, state


def _fake_backward(dout: Tensor, y: Tensor, parameters: list[Tensor], state: Tensor) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (y, *parameters)]


@implement("attend_backward", _fake_backward)
def _backward(dout: Tensor, y: Tensor, parameters: list[Tensor], state: Tensor) -> list[Tensor]:
    gradients = _fake_backward(dout, y, parameters, state)
    given = [y.contiguous(), dout.contiguous(), *(tensor.contiguous() for tensor in parameters)]
    _native.module.attend_backward(y.dtype == torch.float64, _sizes(y, parameters),
                                   [tensor.data_ptr() for tensor in (*given, state, *gradients)], torch.get_num_threads())
    return gradients
