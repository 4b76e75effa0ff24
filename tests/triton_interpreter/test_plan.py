"""Plans: the slots of a pattern and the cover of small blocks, against the dense mask."""

from __future__ import annotations

import pytest
import torch

from sparse_stgcn.kernels import BlockPattern
from sparse_stgcn.kernels.triton.plan import Plan, plan_of

SHAPE = (21, 11, 3)
BLOCKS = [(1, 1), (4, 1), (4, 4), (3, 5), (8, 1), (16, 16), (64, 64), (12, 2)]


def plan_and_pattern(block: tuple[int, int]) -> tuple[Plan, BlockPattern]:
    rows, columns = -(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1])
    live = torch.rand(rows, columns, SHAPE[2], generator=torch.Generator().manual_seed(3)) < 0.3
    live[0, 0] = True
    pattern = BlockPattern.from_blocks(live, SHAPE, block)
    return plan_of(pattern.row_ptr, pattern.input, pattern.tap, pattern.shape, pattern.block), pattern


def slot_rows(plan: Plan) -> torch.Tensor:
    lengths = (plan.row_ptr[1:] - plan.row_ptr[:-1]).long()
    return torch.repeat_interleave(torch.arange(lengths.numel()), lengths) // SHAPE[2]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_slots_hold_the_weights_and_nothing_else(block: tuple[int, int]) -> None:
    plan, pattern = plan_and_pattern(block)
    weight = torch.randn(SHAPE).masked_fill(~pattern.mask(), 0)
    weights = plan.weights(pattern.gather(weight), torch.float32)
    dense = torch.zeros(plan.groups * plan.rows, SHAPE[1], SHAPE[2])
    for row, channel, tap, ws in zip(slot_rows(plan), plan.channel, plan.tap, weights, strict=True):
        if channel < SHAPE[1]:
            dense[row * plan.rows : (row + 1) * plan.rows, channel, tap] += ws
        else:
            assert not ws.any()
    assert torch.equal(dense[: SHAPE[0]], weight)
    assert not dense[SHAPE[0] :].any()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_entries_of_dx_lead_to_every_slot_once(block: tuple[int, int]) -> None:
    plan, _ = plan_and_pattern(block)
    lengths = (plan.column_ptr[1:] - plan.column_ptr[:-1]).long()
    group = torch.repeat_interleave(torch.arange(lengths.numel()), lengths) // SHAPE[2]
    entry, column = (plan.entry_slot >= 0).nonzero(as_tuple=True)
    slot = plan.entry_slot[entry, column].long()
    assert torch.equal(slot.sort().values, (plan.channel < SHAPE[1]).nonzero().squeeze(1))
    assert torch.equal(group[entry] * plan.columns + column, plan.channel[slot].long())
    assert torch.equal(plan.entry_tap[entry], plan.tap[slot])
    assert torch.equal(plan.entry_row[entry].long(), slot_rows(plan)[slot])


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (4, 4), (3, 5)], ids=str)
def test_a_cover_has_a_place_for_every_stored_weight_and_no_other(block: tuple[int, int]) -> None:
    plan, pattern = plan_and_pattern(block)
    assert plan.place is not None
    places = plan.place[plan.place >= 0].sort().values
    assert torch.equal(places.long(), torch.arange(pattern.num_blocks * block[0] * block[1]))


def test_the_matrix_units_own_sizes_need_no_cover() -> None:
    for block in ((8, 1), (16, 16), (64, 64)):
        assert plan_and_pattern(block)[0].place is None


def test_a_plan_is_built_once() -> None:
    plan, pattern = plan_and_pattern((8, 1))
    assert plan_of(pattern.row_ptr, pattern.input, pattern.tap, pattern.shape, pattern.block) is plan
