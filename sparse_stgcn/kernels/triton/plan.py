"""Plan: a pattern as the Triton kernels walk over it. Built once for a pattern and kept as long as its index lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import configs


@dataclass(frozen=True, eq=False)
class Plan:
    """The slots of a pattern: a slot is one input channel at one tap, with the `rows` weights that it serves.

    A block of bo x bi is bi slots of bo weights, and `values` (blocks, bi, bo) is (slots, rows) as it lies. The matrix
    unit takes rows of 8, 16, 32 and 64; any other bo, (1, 1) above all, runs on its COVER: the slots of 8 rows that hold
    a stored weight. There `place` says where each weight of a slot is stored, -1 where none is. A cover's weights without
    a place are 0 in every product, and dw neither computes a sum for them in memory nor returns one: they have no place.

    Slots are sorted by block row, then tap, then channel. For dx the same slots are listed once more: an entry is a block
    row at one tap that serves at least one of `columns` neighbouring input channels, sorted by those, then tap, then row.
    Columns are bi, or 8 where bi is less: neighbours then share the rows of dy that they read, and the matrix unit.

    Attributes:
        row_ptr: int32 (G * K + 1,): slots row_ptr[g * K + k] up to row_ptr[g * K + k + 1] have block row g and tap k.
        channel, tap: int32 (slots,). A channel may lie beyond a ragged edge.
        place: int32 (slots, rows) into the flat values, or None if values lie as the slots do.
        column_ptr: int32 (H * K + 1,): the same of the entries, for columns h.
        entry_row, entry_tap: int32 (entries,). entry_slot: int32 (entries, columns), -1 where there is none.
    """

    rows: int
    columns: int
    groups: int
    column_groups: int
    row_ptr: Tensor
    channel: Tensor
    tap: Tensor
    place: Tensor | None
    column_ptr: Tensor
    entry_row: Tensor
    entry_tap: Tensor
    entry_slot: Tensor

    @property
    def slots(self) -> int:
        return self.channel.numel()

    def weights(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights (slots, rows) of `values` (blocks, bi, bo), 0 where the cover has no weight."""
        values = values.to(dtype)
        if self.place is None:
            return values.reshape(self.slots, self.rows)
        gathered = values.reshape(-1)[self.place.clamp(min=0)] if values.numel() else values.new_zeros(self.place.shape)
        return gathered.masked_fill(self.place < 0, 0)


_plans: Any = WeakIdKeyDictionary()  # row_ptr -> Plan


def plan_of(row_ptr: Tensor, input: Tensor, tap: Tensor, shape: tuple[int, int, int], block: tuple[int, int]) -> Plan:
    """The plan of a pattern's index, kept until row_ptr is freed. The first call for an index waits for the GPU."""
    plan = _plans.get(row_ptr)
    if plan is None:
        with torch.inference_mode(False):
            plan = _build(row_ptr, input, tap, shape, block)
        _plans[row_ptr] = plan
    return plan


def _build(row_ptr: Tensor, input: Tensor, tap: Tensor, shape: tuple[int, int, int], block: tuple[int, int]) -> Plan:
    (out_channels, in_channels, taps), (bo, bi), device = shape, block, row_ptr.device
    rows, columns = bo if bo in configs.ROWS else 8, bi if bi in configs.ROWS else 8
    groups = -(-out_channels // rows)
    column_groups = -(-in_channels // columns)
    lengths = (row_ptr[1:] - row_ptr[:-1]).long()
    block_row = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)
    channel = input.long()[:, None] * bi + torch.arange(bi, device=device)
    place: Tensor | None = None
    if rows == bo:
        channel = channel.reshape(-1)
        slot_row, slot_tap = block_row.repeat_interleave(bi), tap.long().repeat_interleave(bi)
    else:
        out = block_row[:, None, None] * bo + torch.arange(bo, device=device)
        width = -(-in_channels // bi) * bi
        key = ((out // rows) * taps + tap.long()[:, None, None]) * width + channel[:, :, None]
        key, slot = torch.unique(key.reshape(-1), return_inverse=True)
        slot_row, slot_tap, channel = key // (taps * width), key // width % taps, key % width
        place = torch.full((key.numel() * rows,), -1, dtype=torch.int32, device=device)
        stored = torch.arange(slot.numel(), dtype=torch.int32, device=device)
        place[slot * rows + (out % rows).expand(-1, bi, -1).reshape(-1)] = stored
        place = place.view(-1, rows)
        groups = max(groups, int(slot_row[-1]) + 1) if slot_row.numel() else groups
    inside = (channel < in_channels).nonzero().squeeze(1)
    key = (channel[inside] // columns * taps + slot_tap[inside]) * groups + slot_row[inside]
    entry, which = torch.unique(key, return_inverse=True)
    entry_slot = torch.full((entry.numel(), columns), -1, dtype=torch.int32, device=device)
    entry_slot[which, channel[inside] % columns] = inside.int()
    return Plan(
        rows, columns, groups, column_groups,
        _pointers(slot_row * taps + slot_tap, groups * taps), channel.int(), slot_tap.int(), place,
        _pointers(entry // groups, column_groups * taps), (entry % groups).int(), (entry // groups % taps).int(), entry_slot,
    )  # fmt: skip


def _pointers(sorted_ids: Tensor, size: int) -> Tensor:
    counts = torch.bincount(sorted_ids, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
