"""Checkpoints: round trips at every stage, size, atomic writing, and files that are not ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from sparse_stgcn import BlockPattern, checkpoint, compact, create_model, sparsify
from sparse_stgcn.sparsity import maskable_convs, stage, summary


def staged(which: str) -> torch.nn.Module:
    model = tiny.model(0.0 if which == "dense" else 0.8)
    return compact(model) if which == "compact" else model


def forward(model: torch.nn.Module) -> torch.Tensor:
    keypoint = torch.randn(3, 2, 8, 5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(keypoint)


@pytest.mark.parametrize("which", ["dense", "warmup", "compact"])
def test_round_trip(which: str, tmp_path: Path) -> None:
    model = staged(which)
    forward(model.train())
    size = checkpoint.save(model, tmp_path / "m.safetensors", labels=["a", "b"], accuracy=0.5)
    assert size == (tmp_path / "m.safetensors").stat().st_size
    back = checkpoint.load(tmp_path / "m.safetensors")
    assert stage(back) == which
    assert not back.training
    assert back.config == model.config
    ours, theirs = model.state_dict(), back.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name, conv in maskable_convs(model).items():
        if conv.pattern is not None:
            assert maskable_convs(back)[name].pattern.digest() == conv.pattern.digest()
    assert torch.equal(forward(model), forward(back))
    assert checkpoint.read_metadata(tmp_path / "m.safetensors")["meta"] == {"labels": ["a", "b"],
                                                                            "accuracy": 0.5}


@pytest.mark.parametrize("block", [(8, 1), (5, 3), (1, 1), (16, 16)], ids=str)
def test_ragged_blocks_survive(block: tuple[int, int], tmp_path: Path) -> None:
    model = compact(tiny.model(0.7, block=block))
    checkpoint.save(model, tmp_path / "m.safetensors")
    assert torch.equal(forward(model), forward(checkpoint.load(tmp_path / "m.safetensors")))
    live = sum(conv.pattern.num_live for conv in maskable_convs(model).values())
    assert load_file(tmp_path / "m.safetensors")["sparse.values"].shape == (live,)


@pytest.mark.parametrize("name", ["aagcn", "ctrgcn", "dgstgcn"])
def test_other_backbones(name: str, tmp_path: Path) -> None:
    options = {} if name == "dgstgcn" else {"num_person": 1}
    model = compact(sparsify(create_model(name, 3, layout=tiny.SKELETON, base_channels=8, **options), 0.7,
                             (4, 1)))
    checkpoint.save(model, tmp_path / "m.safetensors")
    keypoint = torch.randn(2, 1, 8, 5, 3)
    back = checkpoint.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(model.eval()(keypoint), back(keypoint))


def test_layout_is_as_the_docstring_says(tmp_path: Path) -> None:
    model = compact(tiny.model(0.8))
    checkpoint.save(model, tmp_path / "m.safetensors", coding="bitmask")
    tensors = load_file(tmp_path / "m.safetensors")
    bits, values = [], []
    for name, conv in maskable_convs(model).items():
        row = conv.pattern.blocks().flatten().int().tolist()
        bits += row + [0] * (-len(row) % 8)
        values.append(conv.weight_oik().detach()[conv.pattern.mask()])
        assert f"{name}.weight" not in tensors
    assert np.unpackbits(tensors["sparse.live"].numpy()).tolist() == bits
    assert torch.equal(tensors["sparse.values"], torch.cat(values))


def test_networks_of_several_blocks_and_stages(tmp_path: Path) -> None:
    model = tiny.model()
    convs = maskable_convs(model)
    for i, conv in enumerate(convs.values()):
        if i % 4:
            block = (4, 1) if i % 2 else (2, 3)
            grid = (-(-conv.shape_oik[0] // block[0]), -(-conv.shape_oik[1] // block[1]), conv.shape_oik[2])
            conv.attach(BlockPattern.from_blocks(torch.rand(grid) < 0.5, conv.shape_oik, block))
        if i % 4 == 1:
            conv.compact()
    for i, module in enumerate(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        module.num_batches_tracked += i % 3
    checkpoint.save(model, tmp_path / "m.safetensors")
    back = checkpoint.load(tmp_path / "m.safetensors")
    assert [conv.stage for conv in maskable_convs(back).values()] == [conv.stage for conv in convs.values()]
    assert {conv.stage for conv in convs.values()} == {"dense", "warmup", "compact"}
    ours, theirs = model.state_dict(), back.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_file_holds_live_weights_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparsify(create_model("stgcn", 60), 0.95)
    dense_bytes = checkpoint.dense_bytes(model)
    assert checkpoint.save(create_model("stgcn", 60), tmp_path
                           / "dense.safetensors") == pytest.approx(dense_bytes, rel=0.02)
    counts = summary(compact(model))
    size = checkpoint.save(model, tmp_path / "sparse.safetensors")
    # Kept parameters, one bit per block of 8, running statistics and one graph, and a header of about 20 kB.
    assert 4 * counts.kept_parameters < size < 4 * counts.kept_parameters + counts.maskable / 64 + 60_000
    assert checkpoint.dense_bytes(model) == dense_bytes
    assert size < dense_bytes / 12


def test_double_is_stored_as_float32(tmp_path: Path) -> None:
    model = compact(tiny.model(0.8)).double()
    checkpoint.save(model, tmp_path / "m.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "m.safetensors").values()} <= {torch.float32, torch.uint8,
                                                                                 torch.int64, torch.bool}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.save(tiny.model(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tiny.model(seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_the_file_appears_whole_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "m.safetensors", []
    replace = os.replace

    def watch(source: str, target: Path) -> None:
        seen.append((Path(source).parent == tmp_path, os.path.getsize(source), Path(target).exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    size = checkpoint.save(tiny.model(), path)
    assert seen == [(True, size, False)]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.save(tiny.model(), tmp_path / "nowhere" / "m.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x00" * 64], ids=["empty", "text", "zeros"])
def test_refuses_foreign_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="to be a checkpoint written by"):
        checkpoint.load(path)


def test_a_file_names_no_layout_elsewhere(tmp_path: Path) -> None:
    layout = tmp_path / "layout.yaml"
    layout.write_text(yaml.safe_dump(tiny.SKELETON.to_dict()))
    model = tiny.model()
    model.config["layout"] = str(layout)
    checkpoint.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="layout in the network's configuration to be a mapping or one of"):
        checkpoint.load(tmp_path / "m.safetensors")


def test_refuses_safetensors_of_others_and_missing_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="without this project's metadata"):
        checkpoint.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        checkpoint.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", ["cut", "drop", "bits", "format"])
def test_refuses_damaged_files(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.save(compact(tiny.model(0.8)), path, coding="bitmask")
    tensors, description = checkpoint.read_tensors(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "drop":
        del tensors["sparse.values"]
        checkpoint.write_tensors(path, tensors, description)
    elif damage == "bits":
        tensors["sparse.live"][0] ^= 255
        checkpoint.write_tensors(path, tensors, description)
    else:
        checkpoint.write_tensors(path, tensors, {**description, "format": 99})
    expected = {"cut": "checkpoint", "drop": "sparse.values of shape", "bits": "digest",
                "format": "format 99; update"}
    with pytest.raises(ValueError, match=expected[damage]):
        checkpoint.load(path)
