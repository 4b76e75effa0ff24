"""Convolutions with weights that stay: prepared once, for many calls of few frames each, without gradients."""
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from .dispatch import runs_natively
from .graph_conv import Support, graph_conv, prepare
from .pattern import BlockPattern

__all__ = ["FixedGraphConv", "WindowConv"]


class _Prepared(ABC):
    """What keeps addresses of its own tensors: a copy, or what was pickled, has other tensors and takes theirs."""

    @abstractmethod
    def _take_addresses(self) -> None:
        """Read the addresses of this object's own tensors."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_addresses()


class WindowConv(_Prepared):
    """The k x 1 convolution of whole windows of frames, without padding; which backend runs it is decided here, once.

    Y[n,o,t,v] = b[o] + sum over live (o,i,k) of W[o,i,k] X[n, i, t*stride + k*dilation, v], for frames t that were asked for.

    Natively it is the kernel of ``temporal_conv`` with the taps moved behind the frame where an output
    stands: the pattern gets K - 1 dead taps in front, which cost no multiply-add, and their place falls on frames before the
    first, which are not there.

    Args:
        weight: (O, I, K), 0 outside of the pattern.
        pattern: the live blocks of the weight.
        bias: (O,) or None.
        stride, dilation: of the frames.
    """

    def __init__(self, weight: Tensor, pattern: BlockPattern, bias: Tensor | None, stride: int = 1, dilation: int = 1) -> None:
        outputs, inputs, taps = pattern.shape
        self.taps, self.stride, self.dilation = taps, stride, dilation
        live = pattern.blocks()
        self.pattern = BlockPattern.from_blocks(
            torch.cat([live.new_zeros(*live.shape[:2], taps - 1), live], 2), (outputs, inputs, 2 * taps - 1), pattern.block)
        self.values = self.pattern.gather(F.pad(weight, (taps - 1, 0))).contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self._native = weight.dtype != torch.bfloat16 and runs_natively("temporal_conv", weight)
        self._sizes = _native.sizes(self.pattern.shape, self.pattern.block, self.pattern.num_blocks)
        self._take_addresses()

    def _take_addresses(self) -> None:
        self._index = _native.index(self.pattern.row_ptr, self.pattern.input, self.pattern.tap)

    @property
    def reach(self) -> int:
        """Frames from the first to the last one that an output reads, less one."""
        return (self.taps - 1) * self.dilation

    def __call__(self, x: Tensor, frames: int) -> Tensor:
        """x (N, I, F, V), any strides, F >= (frames - 1) * stride + reach + 1 -> (N, O, frames, V), contiguous.

        Raises:
            ValueError: too few frames, or another number of channels. TypeError: another dtype than the weights'.
        """
        batch, channels, given, joints = x.shape
        if channels != self.pattern.shape[1] or given < (frames - 1) * self.stride + self.reach + 1:
            raise ValueError(f"Expected x with {self.pattern.shape[1]} channels and at least "
                             f"{(frames - 1) * self.stride + self.reach + 1} frames. Got {channels} and {given}.")
        if x.dtype != self.values.dtype:
            raise TypeError(f"Expected x to have the dtype of the weights, {self.values.dtype}. Got {x.dtype}.")
        if not self._native:
            weight = self.pattern.scatter(self.values)[:, :, self.taps - 1:, None]
            wanted = x[:, :, :(frames - 1) * self.stride + self.reach + 1]
            return F.conv2d(wanted, weight, self.bias, (self.stride, 1), 0, (self.dilation, 1))
        y = x.new_empty(batch, self.pattern.shape[0], frames, joints)
        _native.module.temporal_forward(
            _native.storage(x), [batch, given, frames, joints, self.stride, self.dilation], self._sizes, self._index,
            x.data_ptr(), x.stride(), self.values.data_ptr(), _native.address(self.bias), y.data_ptr(), torch.get_num_threads())
        return y


class FixedGraphConv(_Prepared):
    """``graph_conv`` with one adjacency; which backend runs it is decided here, once.

    Y[n,o,t,w] = c[o] + sum over k, v of A_k[v,w] (b_k[o] + sum over i of W_k[o,i] X[n,i,t,v])

    Args:
        weight: (O, I, K), 0 outside of the pattern.
        pattern: the live blocks of the weight.
        bias: (K, O) or None.
        offset: c, (O,).
        adjacency: (K, V, V); its zeros cost nothing.
    """

    def __init__(self, weight: Tensor, pattern: BlockPattern, bias: Tensor | None, offset: Tensor, adjacency: Tensor) -> None:
        self.pattern, self.values, self.bias, self.offset = pattern, pattern.gather(weight).contiguous(), bias, offset
        self.adjacency, self.support = adjacency, Support.of(adjacency != 0)
        _, coefficients, through = prepare(adjacency, bias, self.support)
        self._coefficients = coefficients.contiguous()
        joints = adjacency.shape[1]
        self._map = offset[:, None].expand(-1, joints).contiguous() if through is None else through + offset[:, None]
        self._native = weight.dtype != torch.bfloat16 and runs_natively("graph_conv", weight)
        self._sizes = _native.sizes(pattern.shape, pattern.block, pattern.num_blocks)
        self._take_addresses()

    def _take_addresses(self) -> None:
        self._index = _native.index(self.pattern.row_ptr, self.pattern.input, self.pattern.tap)
        self._graph = [self.support.ptr.data_ptr(), self.support.source.data_ptr()]

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, I, T, V), any strides -> (N, O, T, V), contiguous. Raises like ``graph_conv``."""
        fits = x.dim() == 4 and x.shape[2] > 0 and (x.shape[1], x.shape[3]) == (self.pattern.shape[1], self.adjacency.shape[1])
        if not self._native or x.dtype != self.values.dtype or not fits:
            return graph_conv(x, self.values, self.pattern, self.adjacency, self.bias, self.support, offset=self.offset)
        batch, _, frames, joints = x.shape
        y = x.new_empty(batch, self.pattern.shape[0], frames, joints)
        _native.module.graph_forward(
            _native.storage(x), [batch, frames, joints, self.pattern.shape[2], self.support.source.shape[0]], self._sizes,
            self._index, self._graph, x.data_ptr(), x.stride(), self.values.data_ptr(), self._coefficients.data_ptr(),
            self._map.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y
