"""The methods of masks beyond random and iid: fan_in, magnitude, predefined, nested; and how training reaches them."""
from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_loop import quiet
from test_masks import BLOCKS, SHAPES, layers, rows

from sparse_stgcn import compact, create_model, save, sparsify
from sparse_stgcn.checkpoint import load, read_metadata
from sparse_stgcn.errors import UserError
from sparse_stgcn.masks import LEVELS, METHODS, Layer, draw, draw_levels, register
from sparse_stgcn.sparsity import mask_layers, maskable_convs, summary
from sparse_stgcn.training.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*block rows without a weight")
DRAWN = [name for name in METHODS if name not in ("predefined", "biregular")]  # masks of one seed are inside each other


def weighted(block: tuple[int, int], shapes: list[tuple[int, int, int]] = SHAPES) -> list[Layer]:
    rng = np.random.default_rng(5)
    return [Layer(f"layer{i}", shape, block, min(i // 2, 2), rng.standard_normal(shape).astype(np.float32) * (1 + i))
            for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("density", ["uniform", "erk"])
@pytest.mark.parametrize("scope", ["layer", "block", "global"])
@pytest.mark.parametrize("method", DRAWN)
def test_levels_are_inside_each_other_with_exact_counts(method: str, scope: str, density: str) -> None:
    dense = sum(int(np.prod(shape)) for shape in SHAPES)
    for block in ((1, 1), (3, 5)):
        drawn = draw_levels(weighted(block), LEVELS, method, density, scope, seed=3)
        assert list(drawn) == list(LEVELS)
        if block == (1, 1):
            kept = [sum(pattern.num_live for pattern in patterns.values()) for patterns in drawn.values()]
            assert np.abs(kept - (1 - np.array(LEVELS)) * dense).max() <= len(SHAPES) / 2  # rounding in each layer
        for lower, sparser in itertools.pairwise(LEVELS):
            for name, pattern in drawn[sparser].items():
                assert bool((drawn[lower][name].blocks() | ~pattern.blocks()).all())
                assert drawn[lower][name].num_blocks >= pattern.num_blocks


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_biregular_balances_rows_and_columns(block: tuple[int, int], sparsity: float) -> None:
    for layer, pattern in zip(layers(block), draw(layers(block), sparsity, "biregular", seed=4).values(), strict=True):
        blocks = pattern.blocks().numpy()
        assert np.ptp(blocks.sum((1, 2))) <= 1
        assert np.ptp(blocks.sum((0, 2))) <= 1
        assert (blocks.sum((0, 2)) > 0).sum() == min(blocks.sum(), layer.grid[1])


@pytest.mark.parametrize("sparsity", [0.55, 0.6, 0.9, 0.95, 0.995])
def test_nested_contains_every_sparser_level_of_the_paper(sparsity: float) -> None:
    mask = draw(layers((8, 1)), sparsity, "nested", "erk", "global", seed=2)
    for level in (level for level in LEVELS if level > sparsity):
        for name, pattern in draw(layers((8, 1)), level, "nested", "erk", "global", seed=2).items():
            assert bool((mask[name].blocks() | ~pattern.blocks()).all())
    assert all(np.ptp(rows(pattern)) <= 1 for pattern in mask.values())


def test_levels_refuse_a_method_that_is_not_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METHODS, "ends", raising=False)

    @register("ends", floor=False)
    def ends(plan):  # the first blocks at odd counts, the last ones at even counts
        order = lambda count, size: np.arange(size) < count if count % 2 else np.arange(size)[::-1] < count
        return [order(c, x.num_blocks).reshape(x.grid) for x, c in zip(plan.layers, plan.counts, strict=True)]

    with pytest.raises(ValueError, match="masks are inside each other. Got 'ends'"):
        draw_levels(layers((1, 1), [(10, 10, 1)]), (0.5, 0.71), "ends")


@pytest.mark.parametrize("scope", ["block", "global"])
def test_fan_in_keeps_of_each_layer_what_its_law_leaves_above_the_threshold(scope: str) -> None:
    """P(score > t) = (1 - t / a) / 2 with a = sqrt(6 / fan_in), and one t in each pool."""
    chosen = layers((1, 1))
    patterns = draw(chosen, 0.8, "fan_in", scope=scope, seed=1)
    for pool in [range(7)] if scope == "global" else [(0, 1), (2, 3), (4, 5, 6)]:
        size = np.array([chosen[i].num_weights for i in pool])
        law = np.array([np.sqrt(6 / (chosen[i].shape[1] * chosen[i].shape[2])) for i in pool])
        live = np.array([patterns[f"layer{i}"].num_live for i in pool])
        assert live.sum() == round(0.2 * size.sum())
        share = lambda t, law=law: np.clip((1 - t / law) / 2, 0, 1)
        grid = np.linspace(0, law.max(), 20001)
        t = grid[np.abs([size @ share(t) - live.sum() for t in grid]).argmin()]
        assert (np.abs(live - size * share(t)) <= 6 * np.sqrt(size * share(t) * (1 - share(t))) + 0.01 * size).all()
        assert np.ptp(live / size) > 0.1


def test_fan_in_leaves_the_temporal_convolutions_of_a_network_empty_and_says_so() -> None:
    model = create_model("stgcn", 5)
    with pytest.warns(UserWarning, match="fan_in leaves .* block rows without a weight") as caught:
        sparsify(model, 0.99, "1x1", "fan_in", scope="global")
    convs = maskable_convs(model)
    empty = [name for name, conv in convs.items() if conv.pattern.num_blocks == 0]
    assert "backbone.gcn.9.tcn.conv" in empty
    assert f"{len(empty)} of 22 layers keep nothing: {', '.join(empty)}" in str(caught[0].message)
    assert summary(model).kept == round(0.01 * summary(model).maskable)
    # The fan-in of a graph convolution does not count its subsets.
    gcn = next(layer for layer in mask_layers(create_model("stgcn", 5)) if layer.name == "backbone.gcn.1.gcn.conv")
    assert (gcn.shape, gcn.fan_in) == ((64, 64, 3), 64)


def test_methods_with_a_floor_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(layers((8, 1)), 0.99)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitude_keeps_the_largest_blocks(scope: str, block: tuple[int, int]) -> None:
    chosen = weighted(block)
    patterns = draw(chosen, 0.9, "magnitude", scope=scope)
    kept, cut = [], []
    for layer in chosen:
        live, (bo, bi) = patterns[layer.name].blocks().numpy(), block
        own = [[0.0], [np.inf]]
        for g, h, k in np.ndindex(*layer.grid):
            part = layer.weight[g * bo:(g + 1) * bo, h * bi:(h + 1) * bi, k].astype(float)
            own[int(live[g, h, k])].append(np.sqrt((part**2).mean()))
        if scope == "layer":
            assert min(own[1]) >= max(own[0])
        cut, kept = cut + own[0], kept + own[1]
    if scope == "global":
        assert min(kept) >= max(cut)
    total = sum(pattern.num_live for pattern in patterns.values())
    assert abs(total - 0.1 * sum(layer.num_weights for layer in chosen)) <= block[0] * block[1] * len(SHAPES)


def test_magnitude_of_unstructured_weights_is_that_of_topk() -> None:
    chosen = weighted((1, 1))
    patterns = draw(chosen, 0.9, "magnitude", scope="global")
    flat = torch.cat([torch.from_numpy(layer.weight).flatten().abs() for layer in chosen])
    mask = torch.cat([patterns[layer.name].mask().flatten() for layer in chosen])
    assert set(flat.topk(round(0.1 * len(flat))).indices.tolist()) == set(mask.nonzero().flatten().tolist())


def test_equal_scores_keep_the_exact_number() -> None:
    pattern = draw([Layer("flat", (10, 10, 1), (1, 1), weight=np.ones((10, 10, 1)))], 0.7, "magnitude")["flat"]
    assert pattern.num_live == 30


def test_a_density_for_every_layer() -> None:
    asked = {f"layer{i}": d for i, d in enumerate([1, 0.5, 0.2, 0.1, 0.05, 0.5, 0.0])}
    patterns = draw(layers((1, 1)), 0.9, density=asked)
    assert [patterns[f"layer{i}"].num_live for i in range(6)] == \
        [round(d * np.prod(s)) for d, s in zip(list(asked.values())[:6], SHAPES[:6], strict=True)]
    assert patterns["layer6"].num_live == 64  # one for every row
    with pytest.raises(ValueError, match=r"density to give each of the 7 layers a number in \[0, 1\]"):
        draw(layers((1, 1)), 0.9, density={"layer0": 0.5})


def sparse_checkpoint(folder: Path, block: tuple[int, int] = (4, 1)) -> dict[str, torch.Tensor]:
    model = compact(tiny.model(0.7, seed=4, block=block))
    save(model, folder / "model.safetensors")
    return {name: conv.pattern.mask() for name, conv in maskable_convs(model).items()}


def test_predefined_masks_come_from_a_checkpoint_a_work_directory_and_arrays(tmp_path: Path) -> None:
    masks = sparse_checkpoint(tmp_path)
    np.savez(tmp_path / "masks.npz", **{name: mask.numpy() for name, mask in masks.items()})
    grids = {name: conv.pattern.blocks().numpy()
             for name, conv in maskable_convs(load(tmp_path / "model.safetensors")).items()}
    np.savez(tmp_path / "grids.npz", **grids)
    for file, block in (("model.safetensors", (4, 1)), (".", (4, 1)), (".", (2, 1)), ("masks.npz", (1, 1)),
                        ("grids.npz", (4, 1))):
        model = tiny.model()
        sparsify(model, 0.9, block, "predefined", file=str(tmp_path / file))
        for name, conv in maskable_convs(model).items():
            assert torch.equal(conv.pattern.mask(), masks[name])
            assert conv.pattern.block == block


@pytest.mark.parametrize(("change", "block", "message"), [
    (lambda m: m.pop("backbone.gcn.0.tcn.conv"), (4, 1), "Got 1 missing and 0 unknown (backbone.gcn.0.tcn.conv"),
    (lambda m: m.update(other=np.ones(3, bool)), (4, 1), "Got 0 missing and 1 unknown (other"),
    (lambda m: m.update({"backbone.gcn.0.tcn.conv": np.ones((8, 8, 9))}), (4, 1), "to be bool. Got float64; save mask"),
    (lambda m: m.update({"backbone.gcn.0.tcn.conv": np.ones((8, 9), bool)}), (4, 1), "shape (8, 8, 9), or (2, 8, 9)"),
    (lambda m: None, (8, 1), "made of whole 8x1 blocks"),
])
def test_masks_that_do_not_fit(tmp_path: Path, change, block: tuple[int, int], message: str) -> None:
    masks = {name: mask.numpy() for name, mask in sparse_checkpoint(tmp_path).items()}
    change(masks)
    np.savez(tmp_path / "masks.npz", **masks)
    with pytest.raises(ValueError, match=re.escape(message)):
        sparsify(tiny.model(), 0.9, block, "predefined", file=str(tmp_path / "masks.npz"))


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    save(tiny.model(), tmp_path / "dense.safetensors")
    for file, message in (("text.npz", "an .npz of bool masks"), ("dense.safetensors", "Got a dense one"),
                          (None, "Expected file"), ("none.safetensors", "which does not exist")):
        with pytest.raises((ValueError, OSError), match=message):
            sparsify(tiny.model(), 0.9, (4, 1), "predefined", file=file and str(tmp_path / file))
    with pytest.raises(ValueError, match="method 'predefined' only. Got method 'random'"):
        sparsify(tiny.model(), 0.9, (4, 1), file="a.npz")


def test_training_from_a_checkpoint_with_its_largest_weights_and_its_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file, dense = tiny.write_npz(tmp_path / "tiny.npz"), tmp_path / "dense"
    run = lambda name, **options: prepare(tiny.config(data=str(file), work_dir=str(tmp_path / name), **options), quiet(1))
    first = run("dense", sparsity=0.0, warmup_epochs=0, epochs=1)
    first.fit()
    first.finish()
    cut = run("cut", init=str(dense), method="magnitude", scope="global", block="1x1", warmup_epochs=0, epochs=1)
    weights = {name: conv.weight_oik() for name, conv in maskable_convs(first.model).items()}
    kept = torch.cat([conv.pattern.mask().flatten() for conv in maskable_convs(cut.model).values()])
    flat = torch.cat([w.detach().flatten() for w in weights.values()]).abs()
    assert flat[kept].min() >= flat[~kept].max()
    assert all(torch.equal(weights[name], conv.weight_oik()) for name, conv in maskable_convs(cut.model).items())
    cut.fit()
    cut.finish()
    assert read_metadata(tmp_path / "cut" / "model.safetensors")["meta"]["mask"] == {
        "method": "magnitude", "density": "uniform", "scope": "global", "block": "1x1", "seed": 0, "mask_file": None}
    again = run("again", method="predefined", mask_file=str(tmp_path / "cut"), block="1x1", sparsity=0.5)
    assert all(torch.equal(conv.pattern.mask(), again_conv.pattern.mask()) for conv, again_conv in zip(
        maskable_convs(cut.model).values(), maskable_convs(again.model).values(), strict=True))
    assert again.config.sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "predefined"}, "--mask-file together with --method predefined. Got --method predefined"),
    ({"method": "predefined", "mask_file": "nope"},
     "(--mask-file) to be a checkpoint, a work directory or an .npz of masks. Got nope"),
    ({"mask_file": "a.npz"}, "Got --method random and --mask-file a.npz"),
    ({"method": "predefined", "mask_file": "a.npz", "sparsity": 0.0, "warmup_epochs": 0}, "--sparsity > 0 with"),
    ({"init": "nowhere"}, "--init: No such checkpoint: nowhere"),
])
def test_options_that_do_not_fit_together(tmp_path: Path, options: dict, message: str) -> None:
    file = tiny.write_npz(tmp_path / "tiny.npz")
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(tiny.config(data=str(file), work_dir=str(tmp_path / "run"), **options), quiet(1))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = tiny.write_npz(tmp_path / "tiny.npz")
    save(tiny.model(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--init to hold the same network"):
        prepare(tiny.config(data=str(file), base_channels=16, init=str(tmp_path / "a.safetensors")), quiet(1))
