"""BlockPattern: which blocks of a weight exist. The one noun of the kernels."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockPattern:
    """The live blocks of a weight W of shape (O, I, K taps), in blocks of ``block = (bo, bi)`` at one tap.

    A block is bo consecutive output channels x bi consecutive input channels x one tap; the last block of a row or a
    column is ragged where O or I is not a multiple. Blocks are ordered by block row, then tap, then block column.

    The live weights are stored as ``values`` of shape (nnz, bi, bo): input-major, so that the bo weights that one
    input serves lie side by side. Entries of a ragged block beyond the edge of W are stored and always 0.

    Attributes:
        shape: (O, I, K).
        block: (bo, bi).
        row_ptr: int32 (G + 1,), G = ceil(O / bo): blocks ``row_ptr[g]:row_ptr[g+1]`` form block row g.
        input: int32 (nnz,): block column of each block, below H = ceil(I / bi).
        tap: int32 (nnz,): tap of each block, below K.
        t_ptr: int32 (H + 1,), t_perm: int32 (nnz,): the transposed index. ``t_perm[t_ptr[h]:t_ptr[h+1]]`` are the
            blocks of block column h in stored order (stable), t_row: int32 (nnz,) their block rows.

    Example: O = 4, I = 2, K = 1, block (2, 1), and the upper left and both lower blocks live:

        >>> live = torch.tensor([[[True], [False]], [[True], [True]]])
        >>> p = BlockPattern.from_blocks(live, (4, 2, 1), (2, 1))
        >>> p.row_ptr.tolist(), p.input.tolist(), p.tap.tolist()
        ([0, 1, 3], [0, 0, 1], [0, 0, 0])
        >>> p.t_ptr.tolist(), p.t_perm.tolist(), p.t_row.tolist()
        ([0, 2, 3], [0, 1, 2], [0, 1, 1])
        >>> p
        BlockPattern(shape=(4, 2, 1), block=(2, 1), blocks=3, density=0.7500)
    """

    shape: tuple[int, int, int]
    block: tuple[int, int]
    row_ptr: Tensor
    input: Tensor
    tap: Tensor
    t_ptr: Tensor
    t_perm: Tensor
    t_row: Tensor
    num_live: int
    _cache: dict = field(default_factory=dict)

    @classmethod
    def from_blocks(cls, live: Tensor, shape: tuple[int, int, int], block: tuple[int, int]) -> BlockPattern:
        """Build the pattern whose live blocks are the True entries of ``live`` (G, H, K).

        Raises:
            ValueError: a size is not positive, or ``live`` does not have shape (G, H, K).
            TypeError: ``live`` is not a bool tensor.
        """
        (out_channels, in_channels, taps), (bo, bi) = shape, block
        if min(*shape, *block) < 1:
            raise ValueError(f"Expected shape and block to be positive. Got shape {shape}, block {block}.")
        rows, cols = -(-out_channels // bo), -(-in_channels // bi)
        if live.dtype != torch.bool:
            raise TypeError(f"Expected live to be a bool tensor. Got {live.dtype}; use live != 0.")
        if tuple(live.shape) != (rows, cols, taps):
            raise ValueError(f"Expected live of shape {(rows, cols, taps)} for shape {shape} and block {block}. "
                             f"Got {tuple(live.shape)}.")
        with torch.inference_mode(False):
            row, tap, col = live.cpu().permute(0, 2, 1).nonzero(as_tuple=True)
            order = torch.sort(col, stable=True).indices
            height = (out_channels - torch.arange(rows) * bo).clamp(max=bo)
            width = (in_channels - torch.arange(cols) * bi).clamp(max=bi)
            return cls(
                shape=(int(out_channels), int(in_channels), int(taps)), block=(int(bo), int(bi)),
                row_ptr=_pointers(row, rows), input=col.int(), tap=tap.int(),
                t_ptr=_pointers(col, cols), t_perm=order.int(), t_row=row[order].int(),
                num_live=int((height[row] * width[col]).sum()),
            )

    @classmethod
    def full(cls, shape: tuple[int, int, int], block: tuple[int, int] = (8, 1)) -> BlockPattern:
        """The pattern of a dense weight: every block lives."""
        rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        return cls.from_blocks(torch.ones(rows, cols, shape[2], dtype=torch.bool), shape, block)

    def __deepcopy__(self, memo: dict[int, object]) -> BlockPattern:
        """Itself: a pattern never changes, and copies of a network share it."""
        return self

    @property
    def num_blocks(self) -> int:
        """Number of live blocks (nnz)."""
        return self.input.numel()

    @property
    def size(self) -> int:
        """Number of weights of the dense tensor, O * I * K."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def density(self) -> float:
        """Live weights over all weights; entries beyond a ragged edge do not count."""
        return self.num_live / self.size

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape (nnz, bi, bo) of the stored weights."""
        return self.num_blocks, self.block[1], self.block[0]

    @property
    def device(self) -> torch.device:
        return self.row_ptr.device

    @property
    def rows(self) -> Tensor:
        """Block row of every block, int64 (nnz,)."""
        def make() -> Tensor:
            counts = (self.row_ptr[1:] - self.row_ptr[:-1]).long()
            return torch.repeat_interleave(torch.arange(counts.numel(), device=self.device), counts)

        return self._kept("rows", make)

    def blocks(self) -> Tensor:
        """Bool (G, H, K): True where a block lives."""
        cols = self.t_ptr.numel() - 1
        live = torch.zeros(self.row_ptr.numel() - 1, cols, self.shape[2], dtype=torch.bool, device=self.device)
        live[self.rows, self.input.long(), self.tap.long()] = True
        return live

    def mask(self) -> Tensor:
        """Bool (O, I, K): True where a weight is kept."""
        (o, i, _), (bo, bi) = self.shape, self.block
        return self._kept("mask", lambda: self.blocks().repeat_interleave(bo, 0).repeat_interleave(bi, 1)[:o, :i].contiguous())

    def inputs_read(self) -> Tensor | None:
        """Int32 (I,), 0 for every input that a live block reads and -1 for the others; None if all are read."""
        def make() -> Tensor | None:
            read = self.blocks().any(2).any(0).repeat_interleave(self.block[1])[:self.shape[1]]
            return None if bool(read.all()) else read.int() - 1

        return self._kept("read", make)

    def within(self, outer: BlockPattern) -> Tensor:
        """Int64 (nnz,): the position of each block among those of ``outer``, so that values = outer_values[position].

        Raises:
            ValueError: ``outer`` has another shape or block, or does not have all of these blocks.
        """
        if (outer.shape, outer.block) != (self.shape, self.block):
            raise ValueError(f"Expected outer of shape {self.shape} and block {self.block}. "
                             f"Got {outer.shape} and {outer.block}.")
        cols, taps = self.t_ptr.numel() - 1, self.shape[2]
        position = torch.full((self.row_ptr.numel() - 1, taps, cols), -1, device=self.device)
        position[outer.rows, outer.tap.long(), outer.input.long()] = torch.arange(outer.num_blocks, device=self.device)
        found = position[self.rows, self.tap.long(), self.input.long()]
        if bool((found < 0).any()):
            raise ValueError(f"Expected outer to have all blocks of this pattern. Got {int((found < 0).sum())} of "
                             f"{self.num_blocks} that it does not have.")
        return found

    def gather(self, dense: Tensor) -> Tensor:
        """The live blocks of ``dense`` (O, I, K) as values (nnz, bi, bo); entries beyond a ragged edge are 0."""
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"Expected dense of shape {self.shape}. Got {tuple(dense.shape)}.")
        if self.num_blocks == math.prod(self._grid):  # every block lives: a permutation, whose gradient is one too
            (rows, cols, taps), (bo, bi) = self._grid, self.block
            whole = F.pad(dense, (0, 0, 0, cols * bi - self.shape[1], 0, rows * bo - self.shape[0])) if self._ragged else dense
            ordered = whole.reshape(rows, bo, cols, bi, taps).permute(0, 4, 2, 3, 1)
            return ordered.clone(memory_format=torch.contiguous_format).view(self.values_shape)  # never a view of ``dense``
        index = self._flat_index()
        values = dense.reshape(-1)[index.clamp(min=0)]
        return values.masked_fill(index < 0, 0) if self._ragged else values

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight (O, I, K) of ``values`` (nnz, bi, bo), 0 where no block lives. The inverse of gather."""
        if tuple(values.shape) != self.values_shape:
            raise ValueError(f"Expected values of shape {self.values_shape} (blocks, bi, bo). "
                             f"Got {tuple(values.shape)}.")
        index = self._flat_index()
        inside = index >= 0
        dense = values.new_zeros(self.size)
        return dense.index_put((index[inside],), values[inside]).view(self.shape)

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        index = {name: getattr(self, name).to(device)
                 for name in ("row_ptr", "input", "tap", "t_ptr", "t_perm", "t_row")}
        return BlockPattern(shape=self.shape, block=self.block, num_live=self.num_live, **index)

    def digest(self) -> str:
        """SHA-256 of shape, block and indices: equal patterns on any machine have equal digests."""
        sha = hashlib.sha256(repr((self.shape, self.block)).encode())
        for part in (self.row_ptr, self.input, self.tap):
            sha.update(part.cpu().numpy().astype("<i4").tobytes())
        return sha.hexdigest()

    @property
    def _grid(self) -> tuple[int, int, int]:
        """(G, H, K): block rows, block columns and taps."""
        return self.row_ptr.numel() - 1, self.t_ptr.numel() - 1, self.shape[2]

    @property
    def _ragged(self) -> bool:
        return bool(self.shape[0] % self.block[0] or self.shape[1] % self.block[1])

    def _flat_index(self) -> Tensor:
        """Int64 (nnz, bi, bo): position of each stored entry in the flat dense weight, -1 beyond a ragged edge."""
        def make() -> Tensor:
            (o, i, k), (bo, bi), device = self.shape, self.block, self.device
            out = (self.rows * bo)[:, None, None] + torch.arange(bo, device=device)
            inp = (self.input.long() * bi)[:, None, None] + torch.arange(bi, device=device)[:, None]
            flat = (out * i + inp) * k + self.tap.long()[:, None, None]
            return flat.masked_fill((out >= o) | (inp >= i), -1)

        return self._kept("flat", make)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once; but while torch.export traces, its tensors have no values and are not kept."""
        if name in self._cache:
            return self._cache[name]
        with torch.inference_mode(False):  # what is kept must serve training too
            made = make()
        if made is None or type(made) is Tensor:
            self._cache[name] = made
        return made

    def __repr__(self) -> str:
        return (f"BlockPattern(shape={self.shape}, block={self.block}, blocks={self.num_blocks}, "
                f"density={self.density:.4f})")


def _pointers(index: Tensor, size: int) -> Tensor:
    """Int32 (size + 1,) cumulative counts of the sorted or unsorted ids ``index``."""
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
