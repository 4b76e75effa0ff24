"""masks: exact counts, balance, densities, scopes, seeds."""
from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn import BlockPattern, create_model
from sparse_stgcn.masks import METHODS, Layer, budgets, draw, register
from sparse_stgcn.pattern_coding import Recipe, decode, encode
from sparse_stgcn.sparsity import mask_layers

pytestmark = pytest.mark.filterwarnings("ignore:iid leaves .* block rows without a weight")

# A network in small: a thin input layer, widths that no block divides, several taps.
SHAPES = [(64, 3, 3), (64, 64, 9), (14, 64, 1), (128, 64, 3), (128, 128, 9), (8, 64, 1), (64, 8, 1)]
BLOCKS = [(1, 1), (4, 4), (8, 1), (16, 1), (16, 16), (3, 5)]


def layers(block: tuple[int, int], shapes: list[tuple[int, int, int]] = SHAPES) -> list[Layer]:
    return [Layer(f"layer{i}", shape, block, min(i // 2, 2)) for i, shape in enumerate(shapes)]


def rows(pattern: BlockPattern) -> np.ndarray:
    return (pattern.row_ptr[1:] - pattern.row_ptr[:-1]).numpy()


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_random_is_balanced_and_no_row_is_empty(block: tuple[int, int], sparsity: float) -> None:
    for pattern in draw(layers(block), sparsity).values():
        assert rows(pattern).min() >= 1
        assert np.ptp(rows(pattern)) <= 1


@pytest.mark.parametrize("sparsity", [0.6, 0.8, 0.95])
def test_every_layer_keeps_its_share(sparsity: float) -> None:
    wide = [shape for shape in SHAPES if shape[1] * shape[2] >= 64]  # the floor of one per row does not bind
    patterns = draw(layers((1, 1), wide), sparsity)
    for shape, pattern in zip(wide, patterns.values(), strict=True):
        size = int(np.prod(shape))
        assert pattern.num_live == round((1 - sparsity) * size)


@pytest.mark.parametrize("density", ["uniform", "erk"])
@pytest.mark.parametrize("scope", ["layer", "block", "global"])
@pytest.mark.parametrize("block", [(1, 1), (8, 1), (4, 4)], ids=str)
def test_total_is_met_although_thin_layers_keep_more(
    block: tuple[int, int], scope: str, density: str
) -> None:
    patterns = draw(layers(block), 0.97, density=density, scope=scope)
    kept, total = sum(p.num_live for p in patterns.values()), sum(p.size for p in patterns.values())
    allowed = block[0] * block[1] * len(SHAPES)  # half a block of rounding per layer, ragged blocks vary
    assert abs(kept - 0.03 * total) <= allowed


def test_the_larger_layers_of_the_scope_give_back() -> None:
    # The 16 block rows of the thin layer of group 0 keep 16 blocks; its share is 2.4.
    shapes = [(128, 3, 1), (64, 64, 9), (64, 64, 9), (64, 64, 9)]
    for scope, untouched in (("block", (2, 3)), ("global", ())):
        counts = budgets(layers((8, 1), shapes), 0.95, scope=scope)
        assert counts[0] == 16
        fair = round(0.05 * 8 * 64 * 9)
        assert all(abs(counts[i] - fair) <= 1 for i in untouched)
        assert counts[1] < fair - 1


@pytest.mark.parametrize("scope", ["block", "global"])
def test_iid_is_exact_in_its_pool(scope: str) -> None:
    patterns = list(draw(layers((1, 1)), 0.9, method="iid", scope=scope).values())
    pools = [range(len(SHAPES))] if scope == "global" else [(0, 1), (2, 3), (4, 5, 6)]
    for pool in pools:
        total = sum(patterns[i].size for i in pool)
        assert sum(patterns[i].num_live for i in pool) == round(0.1 * total)


def test_iid_is_not_balanced_and_may_leave_rows_empty() -> None:
    pattern = draw(layers((8, 1)), 0.99, method="iid")["layer1"]
    assert np.ptp(rows(pattern)) > 1
    thin = draw(layers((8, 1)), 0.99, method="iid")["layer0"]
    assert rows(thin).min() == 0
    assert thin.num_blocks == round(0.01 * 8 * 3 * 3)


def test_iid_gives_every_block_the_same_chance() -> None:
    shapes = [(16, 8, 1), (8, 4, 3)]
    live = sum(
        np.concatenate(
            [
                p.blocks().flatten().numpy().astype(int)
                for p in draw(layers((1, 1), shapes), 0.75, method="iid", scope="global", seed=seed).values()
            ]
        )
        for seed in range(400)
    )
    # 400 draws at 0.25: mean 100, standard deviation 8.7; six of them hold for all 224 positions.
    assert abs(live - 100).max() < 6 * 8.7


def test_random_reaches_every_position() -> None:
    live = sum(draw(layers((1, 1), [(8, 8, 3)]), 0.5, seed=seed)["layer0"].blocks().numpy().astype(int)
               for seed in range(200))
    assert abs(live - 100).max() < 6 * 7.1


def test_erk_prefers_thin_layers_and_caps_at_dense() -> None:
    patterns = list(draw(layers((1, 1)), 0.9, density="erk").values())
    share = [sum(shape) / np.prod(shape) for shape in SHAPES]
    assert patterns[0].density == 1
    free = [i for i, p in enumerate(patterns) if p.density < 1]
    ratio = [patterns[i].density / share[i] for i in free]
    assert max(ratio) / min(ratio) < 1.02


@pytest.mark.parametrize("method", ["random", "iid"])
def test_patterns_follow_the_seed(method: str) -> None:
    digests = lambda seed: [p.digest() for p in draw(layers((8, 1)), 0.9, method=method, seed=seed).values()]
    assert digests(3) == digests(3)
    assert not set(digests(3)) & set(digests(4))


def test_a_layers_draw_does_not_depend_on_the_others() -> None:
    alone = draw([Layer("layer4", SHAPES[4], (1, 1))], 0.5)["layer4"]
    assert alone.digest() == draw(layers((1, 1)), 0.5)["layer4"].digest()


def test_known_pattern_stays_what_it_is() -> None:
    """A change of these positions would silently change every experiment with the same seed."""
    pattern = draw([Layer("conv", (4, 6, 1), (1, 1))], 0.6, seed=7)["conv"]
    assert pattern.blocks()[..., 0].int().tolist() == [
        [1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize(("backbone", "block", "happens"), [
    ("stgcn", "8x1", True), ("stgcn", "16x1", True), ("stgcn", "1x1", False), ("ctrgcn", "8x1", True), ("ctrgcn", "1x1", True)])
def test_every_coordinate_of_the_joints_is_read(backbone: str, block: str, happens: bool) -> None:
    """Where the rows suffice; hidden channels stay to chance, and masks that read all coordinates stay what they were."""
    found = mask_layers(create_model(backbone, num_classes=5), block, weights=False)
    found = [layer for layer in found if layer.shape[1] == 3] + [layer for layer in found if layer.shape[1] > 3][:2]
    first = {layer.name for layer in found if layer.shape[1] == 3 and layer.grid[1] <= layer.grid[0]}
    assert first
    blind = 0
    for seed in range(40):
        levels = {level: draw(found, level, seed=seed) for level in (0.6, 0.95, 0.99)}
        for level, patterns in levels.items():
            before = draw(found, level, seed=seed, coordinates=False)
            for name, pattern in patterns.items():
                was_blind = name in first and not bool(before[name].blocks().any(2).any(0).all())
                blind += was_blind
                assert name not in first or bool(pattern.blocks().any(2).any(0).all()), (name, level, seed)
                assert pattern.num_live == before[name].num_live and rows(pattern).tolist() == rows(before[name]).tolist()
                assert name in first or pattern.digest() == before[name].digest()
        for name in first:
            assert not bool((levels[0.99][name].blocks() & ~levels[0.95][name].blocks()).any())
    assert (blind > 0) == happens, "64 rows read all by themselves, the 8 of CTR-GCN's graphs do not"


def test_files_that_say_nothing_of_coordinates_have_the_masks_of_then() -> None:
    found = mask_layers(create_model("stgcn", num_classes=5, base_channels=64), "8x1", weights=False)
    then = Recipe(0.95, (8, 1), seed=1, coordinates=False)
    tensors, description = encode(then.draw(found), found, then)
    assert description["coding"] == "seed" and not tensors
    del description["recipe"]["coordinates"]
    read = decode(tensors, description, found)
    now = draw(found, 0.95, seed=1)
    name = found[0].name
    assert read[name].digest() == then.draw(found)[name].digest() != now[name].digest()
    assert Recipe(0.95, (8, 1), seed=1).draw(found)[name].digest() == now[name].digest()


def test_three_million_weights_in_a_second() -> None:
    big = [Layer(f"layer{i}", (256, 256, 9), (1, 1)) for i in range(5)]
    start = time.process_time()
    draw(big, 0.95)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sparsity": 1.0}, "sparsity to be at least 0 and below 1"),
    ({"sparsity": -0.1}, "Got -0.1"),
    ({"sparsity": float("nan")}, "Got nan"),
    ({"sparsity": "0.9"}, "Got 0.9"),
    ({"method": "magic"}, "method to be one of random, nested, biregular, iid"),
    ({"density": "erdos"}, "density to be one of uniform, erk. Got 'erdos'"),
    ({"scope": "row"}, "scope to be one of layer, block, global. Got 'row'"),
    ({"seed": -1}, "seed to be a whole number"),
    ({"seed": 1.5}, "seed to be a whole number"),
])
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        draw(layers((8, 1)), **{"sparsity": 0.9, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize("block", [(129, 1), (1, 129), (256, 256)], ids=str)
def test_block_larger_than_every_layer(block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"Expected block to fit a layer: at most 128 outputs x 128 inputs"):
        draw(layers(block), 0.9)


def test_block_wider_than_a_thin_layer_is_ragged_there() -> None:
    pattern = draw(layers((16, 16)), 0.5)["layer0"]
    assert pattern.num_live == pattern.num_blocks * 16 * 3


def test_a_new_method_goes_through_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METHODS, "first", raising=False)  # takes it out again afterwards
    from sparse_stgcn import masks

    @register("first")
    def first(plan: masks.Plan) -> list[np.ndarray]:
        return [(np.arange(layer.num_blocks) < count).reshape(layer.grid)
                for layer, count in zip(plan.layers, plan.counts, strict=True)]

    live = draw(layers((8, 1)), 0.9, method="first")["layer1"].blocks().flatten()
    assert live[: int(live.sum())].all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 9])), min_size=1, max_size=5
    ),
    st.floats(0, 0.999),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["uniform", "erk"]),
    st.sampled_from(["layer", "block", "global"]),
)
def test_counts_lie_between_floor_and_dense(
    shapes: list[tuple[int, int, int]], sparsity: float, bo: int, bi: int, density: str, scope: str
) -> None:
    block = (min(bo, max(s[0] for s in shapes)), min(bi, max(s[1] for s in shapes)))
    for pattern in draw(layers(block, shapes), sparsity, density=density, scope=scope).values():
        assert rows(pattern).min() >= 1
        assert rows(pattern).max() - rows(pattern).min() <= 1
        assert pattern.num_live <= pattern.size
