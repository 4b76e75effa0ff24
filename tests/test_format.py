"""The file format: codings of the patterns, float16, sizes, and files of earlier versions."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from sparse_stgcn import BlockPattern, Ensemble, checkpoint, compact, create_model, densify, sparsify
from sparse_stgcn.masks import Layer
from sparse_stgcn.pattern_coding import CODINGS, Recipe, decode, encode
from sparse_stgcn.sparsity import mask_layers, maskable_convs

FILES = Path(__file__).parent / "files"


def digests(model: torch.nn.Module) -> list[str]:
    return [conv.pattern.digest() for conv in maskable_convs(model).values()]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("block", [(8, 1), (5, 3), (1, 1)], ids=str)
def test_every_coding_gives_the_same_network(block: tuple[int, int], coding: str, tmp_path: Path) -> None:
    model = compact(tiny.model(0.7, block=block))
    checkpoint.save(model, tmp_path / "m.safetensors", coding=coding)
    tensors, back = load_file(tmp_path / "m.safetensors"), checkpoint.load(tmp_path / "m.safetensors")
    assert ("sparse.live" in tensors, "sparse.gaps" in tensors) == (coding == "bitmask", coding == "index")
    assert digests(back) == digests(model)
    ours, theirs = model.state_dict(), back.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("live", [[0], [254], [255], [256], [509, 510, 511], [0, 300, 999], range(1000), []], ids=str)
def test_gaps_of_any_length(live: list[int]) -> None:
    blocks = torch.zeros(1000, dtype=torch.bool)
    blocks[torch.tensor(list(live), dtype=torch.long)] = True
    layer = Layer("a", (10, 100, 1), (1, 1))
    pattern = BlockPattern.from_blocks(blocks.view(10, 100, 1), layer.shape, layer.block)
    tensors, fields = encode({"a": pattern}, [layer], None, "index")
    assert torch.equal(decode(tensors, fields, [layer])["a"].blocks().flatten(), blocks)


def test_index_is_the_distance_between_live_blocks() -> None:
    layers = [Layer("a", (4, 1, 1), (1, 1)), Layer("b", (1, 600, 1), (1, 1))]
    live = {"a": [False, True, False, False], "b": [i in (298, 299) for i in range(600)]}
    patterns = {x.name: BlockPattern.from_blocks(torch.tensor(live[x.name]).view(x.grid), x.shape, x.block) for x in layers}
    tensors, _ = encode(patterns, layers, None, "index")
    assert tensors["sparse.gaps"].tolist() == [1, 255, 45, 0]  # 2 + 298 dead blocks between the first two


def test_smallest_coding_is_chosen() -> None:
    model = compact(tiny.model(0.5, block=(1, 1)))
    assert checkpoint.pack(model)[1]["coding"] == "seed"
    model.mask_recipe = None
    assert checkpoint.pack(model)[1]["coding"] == "bitmask"
    sparse = compact(sparsify(tiny.model(), 0.95, (1, 1)))
    sparse.mask_recipe = None
    assert checkpoint.pack(sparse)[1]["coding"] == "index"


def test_a_seed_is_kept_only_where_it_gives_the_masks(tmp_path: Path) -> None:
    model = tiny.model(0.7)
    first = next(iter(maskable_convs(model).values()))
    first.pattern = BlockPattern.from_blocks(~first.pattern.blocks(), first.shape_oik, first.pattern.block)
    assert checkpoint.pack(model)[1]["coding"] != "seed"
    with pytest.raises(ValueError, match="Expected patterns that sparsify drew"):
        checkpoint.save(model, tmp_path / "m.safetensors", coding="seed")
    magnitude = sparsify(tiny.model(), 0.7, (4, 1), method="magnitude")
    assert magnitude.mask_recipe is None and "recipe" not in checkpoint.pack(magnitude)[1]
    again = sparsify(densify(tiny.model(0.7), forget=True), 0.7, (4, 1), method="magnitude")
    assert checkpoint.pack(again)[1]["coding"] != "seed"


@pytest.mark.parametrize("changed", [{"seed": 1}, {"method": "magnitude"}, {"method": "predefined"}, {"file": "/etc/passwd"},
                                     {"sparsity": "much"}], ids=str)
def test_a_recipe_that_does_not_fit_is_refused(changed: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.save(compact(tiny.model(0.8)), path)
    tensors, description = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, tensors, {**description, "recipe": {**description["recipe"], **changed}})
    with pytest.raises(ValueError, match="Expected"):
        checkpoint.load(path)


@pytest.mark.parametrize("gaps", [[], [255], [255] * 4000 + [0]], ids=["none", "open", "beyond"])
def test_damaged_gaps_are_refused(gaps: list[int], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.save(compact(tiny.model(0.8)), path, coding="index")
    tensors, description = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, {**tensors, "sparse.gaps": torch.tensor(gaps, dtype=torch.uint8)}, description)
    with pytest.raises(ValueError, match=r"Expected (sparse.gaps|the patterns)"):
        checkpoint.load(path)


def test_seeded_masks_have_not_changed() -> None:
    """A file keeps no more than a seed: if this fails, files of earlier versions cannot be read."""
    drawn = {method: Recipe(0.8, (4, 1), method, seed=3).draw(mask_layers(tiny.model(), (4, 1), weights=False))
             for method in ("random", "nested", "iid", "fan_in")}
    found = {method: checkpoint._digest(list(patterns.values()))[:16] for method, patterns in drawn.items()}
    assert found == {"random": "fcc09545946eef4f", "nested": "fcc09545946eef4f", "iid": "fc28ad3395ebd8d3",
                     "fan_in": "47cf3aff56e278cb"}


def test_float16_rounds_weights_and_keeps_vectors(tmp_path: Path) -> None:
    model = compact(tiny.model(0.8))
    size = checkpoint.save(model, tmp_path / "m.safetensors")
    assert checkpoint.save(model, tmp_path / "half.safetensors", dtype="float16") < size
    back = checkpoint.load(tmp_path / "half.safetensors").state_dict()
    for name, ours in model.state_dict().items():
        theirs = back[name]
        assert theirs.dtype == ours.dtype, name
        if ours.dim() < 2:
            assert torch.equal(theirs, ours), name
        else:  # half a unit in the last place, and the spacing of subnormal numbers
            assert bool(((theirs - ours).abs() <= 2.0**-11 * ours.abs() + 2.0**-25).all()), name


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = compact(tiny.model(0.8))
    with torch.no_grad():
        model.cls_head.fc_cls.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"at most 65504 .*cls_head\.fc_cls\.weight; use float32"):
        checkpoint.save(model, tmp_path / "m.safetensors", dtype="float16")
    with pytest.raises(ValueError, match="Expected dtype"):
        checkpoint.save(model, tmp_path / "m.safetensors", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected coding"):
        checkpoint.save(model, tmp_path / "m.safetensors", coding="zip")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [(8, 1), (1, 1)], ids=str)
def test_sizes_at_95_percent(block: tuple[int, int], tmp_path: Path) -> None:
    model = compact(sparsify(create_model("stgcn", 60), 0.95, block))
    dense = checkpoint.dense_bytes(model)
    size = lambda **options: checkpoint.save(model, tmp_path / "m.safetensors", **options)
    assert 10 * size() < dense
    assert 20 * size(dtype="float16") < dense
    assert 20 * size(dtype="float16", coding="index") < dense


def test_four_levels_in_one_file(tmp_path: Path) -> None:
    models = [compact(tiny.model(level, seed=i)) for i, level in enumerate((0.6, 0.8, 0.95, 0.99))]
    ensemble = Ensemble(models).eval()
    checkpoint.save(ensemble, tmp_path / "e.safetensors")
    back = checkpoint.load(tmp_path / "e.safetensors")
    assert [member.mask_recipe for member in back.members] == [model.mask_recipe for model in models]
    keypoint = torch.randn(2, 1, 8, 5, 3)
    with torch.no_grad():
        assert torch.equal(back(keypoint), ensemble(keypoint))


@pytest.mark.parametrize("name", ["format1", "format1_ensemble"])
def test_files_of_earlier_versions(name: str, tmp_path: Path) -> None:
    """Written by version 0.1.0 in format 1, with the outputs of the network in ``meta``."""
    path = tmp_path / "old.safetensors"
    path.write_bytes(gzip.decompress((FILES / f"{name}.safetensors.gz").read_bytes()))
    description = checkpoint.read_metadata(path)
    assert description["format"] == 1
    keypoint = torch.sin(0.7 * torch.arange(2 * 8 * 5 * 3.0)).view(2, 1, 8, 5, 3)
    model = checkpoint.load(path)
    with torch.no_grad():
        outputs = model(keypoint)
    np.testing.assert_allclose(outputs.numpy(), description["meta"]["expected"], rtol=1e-5, atol=1e-6)
    checkpoint.save(model, path, **description["meta"])
    assert checkpoint.read_metadata(path)["format"] == checkpoint.FORMAT
    with torch.no_grad():
        assert torch.equal(checkpoint.load(path)(keypoint), outputs)
