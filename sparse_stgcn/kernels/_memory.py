"""Memory of large tensors that ops make in a training run: blocks that are used again, none of them beside small objects.

A tensor of 10 MB that malloc hands out is aligned, and its hole is too short for the next tensor of the same size and alignment
once a small object lies in front of it: a step of DG-STGCN needed 1.9 GB for 1.2 GB of live tensors. Here a block is mapped for
one tensor, and free blocks wait for the same size. All of them together are at most a tenth more than what was ever alive at
once, so that another batch size does not double them.
"""
from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["Pool", "empty", "use_pool"]

_HUGE = 2 << 20  # bytes of a huge page
_STEP = 7 * 64  # between the places of tensors in a page: all at its begin would share the same sets of a cache
_LARGE = 1 << 20  # bytes from which on a tensor has a block
_ROOM = 2.1  # a tensor may take a free block that is so many times its size: half of the frames and a mean joint
_SPARE = 1.1  # blocks in all, of what was alive at most
_MAP = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class _Block:
    """Memory that is mapped for one tensor at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Huge pages begin at multiples of their size; what lies before the first is never touched and costs no memory.
        self.map = mmap.mmap(-1, size + _HUGE + mmap.PAGESIZE, **_MAP)
        self.first = -torch.frombuffer(self.map, dtype=torch.uint8, count=1).data_ptr() % _HUGE
        with suppress(AttributeError, OSError):  # not on Linux, or a Linux without them
            self.map.madvise(mmap.MADV_HUGEPAGE, self.first, size // _HUGE * _HUGE)  # a last one would be mostly empty


class Pool:
    """Blocks of memory, in use by tensors or free.

    Attributes:
        total, live, most: bytes of all blocks, of those in use, and the largest number of bytes in use at once.
    """

    def __init__(self) -> None:
        self.total = self.live = self.most = self._made = 0
        self._lock = threading.Lock()
        self._free: dict[int, list[_Block]] = {}  # size -> blocks; the sizes used last are at the end
        self._leases: dict[int, weakref.ref] = {}
        self._back: deque[_Block] = deque()  # a tensor can die at any time: blocks wait here until the next one is made

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with any values, whose block is free when its storage dies."""
        count = math.prod(shape)
        with self._lock:
            while self._back:
                back = self._back.popleft()
                self.live -= back.size
                self._free.setdefault(back.size, []).append(back)
            block = self._take(-(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE)
            self.live += block.size
            self.most = max(self.most, self.live)
            self._made += 1
            view = memoryview(block.map)[block.first + self._made * _STEP % mmap.PAGESIZE:]
            self._watch(view, block)
        return torch.frombuffer(view, dtype=dtype, count=count).view(tuple(shape))

    def _watch(self, view: memoryview, block: _Block) -> None:
        def freed(_: weakref.ref) -> None:  # the tensor's storage held the view; within any statement, so without the lock
            self._leases.pop(id(block), None)
            self._back.append(block)

        self._leases[id(block)] = weakref.ref(view, freed)

    def _take(self, size: int) -> _Block:
        fitting = size if size in self._free else min((s for s in self._free if size <= s <= _ROOM * size), default=None)
        if fitting is not None:
            blocks = self._free.pop(fitting)
            block = blocks.pop()
            if blocks:
                self._free[fitting] = blocks  # at the end: used last
            return block
        for old in list(self._free):  # those that have waited longest
            while old in self._free and self.total + size > _SPARE * max(self.most, self.live + size):
                self.total -= old
                self._free[old].pop()
                if not self._free[old]:
                    del self._free[old]
        self.total += size
        return _Block(size)


_pool: Pool | None = None


def use_pool(on: bool) -> None:
    """Whether large results of ops on the CPU come from a pool of blocks that are used again, or from torch's allocator."""
    global _pool
    _pool = (_pool or Pool()) if on else None


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """``like.new_empty(shape)``, from the pool where there is one and the tensor is large and on the CPU."""
    if _pool is None or type(like) is not Tensor or like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(shape)
    large = math.prod(shape) * like.element_size() >= _LARGE
    return _pool.empty(shape, like.dtype) if large else like.new_empty(shape)
