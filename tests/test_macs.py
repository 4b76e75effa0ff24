"""macs: multiply-adds of the four networks."""
from __future__ import annotations

import pytest

from sparse_stgcn import compact, create_model, sparsify
from sparse_stgcn.macs import KINDS, count
from sparse_stgcn.sparsity import maskable_convs

# 60 classes, M = 2, T = 100, V = 25, in millions: 1x1, temporal, aggregation, building the graph, other.
TABLE = {
    "stgcn": (5_697_615_360, (1354.560, 4055.040, 288.0, 0, 0.01536)),
    "aagcn": (6_472_807_048, (2124.960, 4055.040, 217.125, 72.0, 3.682048)),
    "ctrgcn": (2_971_615_360, (2402.0, 281.6, 288.0, 0, 0.01536)),
    "dgstgcn": (2_496_195_360, (2237.4592, 160.9608, 96.0, 1.76, 0.01536)),
}


@pytest.mark.parametrize("name", TABLE)
def test_dense_counts(name: str) -> None:
    total, kinds = TABLE[name]
    counts = count(create_model(name, 60))
    assert counts.dense == total
    assert [counts.of(kind=kind).dense for kind in KINDS] == pytest.approx(
        [1e6 * value for value in kinds], rel=1e-12
    )
    blocks = counts.per_block()
    assert len(blocks) == 10
    assert sum(dense for dense, _ in blocks) == total - 256 * 60
    assert count(create_model(name, 60), frames=50).dense < 0.53 * total


def test_effective_counts_by_hand() -> None:
    """ST-GCN, block 1: live weights times places, and the non-zeros of the graph times channels."""
    model = sparsify(create_model("stgcn", 60), 0.9)
    kept = {name: conv.pattern.num_live for name, conv in maskable_convs(model).items()}
    live = int((model.backbone.blocks[0].gcn.A != 0).sum())
    first = count(model).per_block()[0][1]
    frames = 2 * 100
    assert live == 73
    assert first == frames * 25 * (kept["backbone.gcn.0.gcn.conv"] + kept["backbone.gcn.0.tcn.conv"]) + \
        frames * 64 * live


@pytest.mark.parametrize("name", TABLE)
def test_effective_counts_do_not_depend_on_the_stage(name: str) -> None:
    model = create_model(name, 60)
    warmup = count(sparsify(model, 0.95))
    assert count(compact(model)) == warmup
    assert warmup.dense == TABLE[name][0]
    convolutions = [item for item in warmup.counts if item.kind in ("1x1", "temporal") and item.effective]
    ratio = sum(item.effective for item in convolutions) / sum(item.dense for item in convolutions)
    assert 0.0495 < ratio < 0.06  # thin layers keep one block per row
    assert len(convolutions) == len(maskable_convs(model))


def test_embeddings_of_ctrgcn_are_cheaper_than_pyskls() -> None:
    counts = count(create_model("ctrgcn", 60))
    embeddings = sum(
        c.out_channels * c.in_channels * 2 * 25 * frames
        for b, frames in zip(
            create_model("ctrgcn", 60).backbone.blocks, [100] * 5 + [50] * 3 + [25] * 2, strict=True
        )
        for u in b.gcn1.convs
        for c in (u.conv1, u.conv2)
    )
    once = sum(c.out_channels * c.in_channels * 2 * 25 for b in create_model("ctrgcn", 60).backbone.blocks
               for u in b.gcn1.convs for c in (u.conv1, u.conv2))
    assert counts.dense - counts.effective == embeddings - once


@pytest.mark.parametrize(("arguments", "message"), [
    ({"frames": 0}, "frames to be at least 1"), ({"persons": 0}, "persons to be at least 1"),
    ({"persons": 3}, "num_person=3")])
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        count(create_model("aagcn", 5, base_channels=16), **arguments)
    assert message in str(error.value)
