"""checkpoint_pyskl: PYSKL's checkpoints in and out, the paper's sparse checkpoints in."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_stgcn import Recognizer, compact, create_model, densify, sparsify
from sparse_stgcn.checkpoint_pyskl import PAPER_ARGUMENTS, from_paper, from_pyskl, to_pyskl
from sparse_stgcn.sparsity import block_of, maskable_convs, masked, stage, summary

NAMES = ("stgcn", "aagcn", "ctrgcn", "dgstgcn")


def network(name: str, num_classes: int = 5, seed: int = 0, **kwargs: Any) -> Recognizer:
    torch.manual_seed(seed)
    model = create_model(name, num_classes, **{"layout": "coco", "base_channels": 16, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def clip() -> Tensor:
    return torch.randn(2, 2, 12, 17, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_pyskls(shared: Path, name: str) -> None:
    keys = json.loads((shared / "golden" / f"keys_{name.upper()}_ntu.json").read_text())
    state = to_pyskl(create_model(name, 60))["state_dict"]
    assert {key: list(value.shape) for key, value in state.items()} == {
        k: v["shape"] for k, v in keys.items()
    }


@pytest.mark.parametrize(("name", "prefix"), [*((name, "") for name in NAMES), ("stgcn", "module.")])
def test_round_trip_through_a_file(tmp_path: Path, name: str, prefix: str) -> None:
    model, path = network(name), tmp_path / "epoch_1.pth"
    content = to_pyskl(model)
    content["state_dict"] = {prefix + key: value for key, value in content["state_dict"].items()}
    content["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.1}]}
    torch.save(content, path)
    again = from_pyskl(network(name, seed=1), path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(again(clip()), model(clip()))


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_state_dict_without_counters(name: str) -> None:
    model = network(name)
    state = {
        key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    assert torch.equal(from_pyskl(network(name, seed=1), state)(clip()), model(clip()))


@pytest.mark.parametrize("name", NAMES)
def test_sparse_models(name: str) -> None:
    sparse = compact(sparsify(network(name), 0.7))
    logits = sparse(clip())
    dense = from_pyskl(network(name, seed=1), to_pyskl(sparse))
    torch.testing.assert_close(dense(clip()), logits, atol=1e-11, rtol=1e-11)
    assert stage(sparse) == "compact"
    other = network(name, seed=2)
    with torch.no_grad():
        with masked(sparsify(other, 0.7, seed=5)):
            want = other(clip())
        target = compact(sparsify(network(name, seed=3), 0.7, seed=5))
        got = from_pyskl(target, to_pyskl(other))(clip())
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_another_number_of_classes_needs_a_new_head() -> None:
    given, model = to_pyskl(network("stgcn", 7)), network("stgcn", 5, seed=1)
    head = model.cls_head.fc_cls.weight.detach().clone()
    with pytest.raises(ValueError, match=r"num_classes=7, or pass new_head=True"):
        from_pyskl(model, given)
    from_pyskl(model, given, new_head=True)
    assert torch.equal(model.cls_head.fc_cls.weight, head)
    assert torch.equal(
        model.backbone.gcn[3].tcn.conv.weight, given["state_dict"]["backbone.gcn.3.tcn.conv.weight"]
    )


def test_add_coeff_has_25_entries_and_fits_longer_skeletons() -> None:
    chain = {"joints": [f"j{i}" for i in range(30)], "edges": [[i, i - 1] for i in range(1, 30)], "root": 0}
    state = to_pyskl(network("dgstgcn", layout=chain))["state_dict"]
    assert to_pyskl(network("dgstgcn"))["state_dict"]["backbone.gcn.0.tcn.add_coeff"].shape == (25,)
    key = "backbone.gcn.0.tcn.add_coeff"
    assert state[key].shape == (30,)
    model = network("dgstgcn", layout=chain, seed=1)
    last = model.state_dict()[key][25:].clone()
    from_pyskl(model, {**state, key: state[key][:25]})
    assert torch.equal(model.state_dict()[key], torch.cat([state[key][:25], last]))


@pytest.mark.parametrize(("model", "given", "message"), [
    (("stgcn", {}), ("dgstgcn", {}), "its keys look like create_model('dgstgcn', ...)"),
    (("dgstgcn", {}), ("stgcn", {}), "its keys look like create_model('stgcn', ...)"),
    (("aagcn", {}), ("aagcn", {"attention": False}), "create_model('aagcn', attention=False, ...)"),
    (("ctrgcn", {}), ("ctrgcn", {"temporal": "mixed"}), "create_model('ctrgcn', temporal='mixed', ...)"),
    (("stgcn", {}), ("stgcn", {"adaptive": "init"}), "create_model('stgcn', adaptive='init', ...)"),
    (("stgcn", {}), ("stgcn", {"layout": "nturgb+d"}), "build the model with the layout"),
    (("aagcn", {}), ("aagcn", {"num_person": 1}), "num_person of the checkpoint"),
    (("dgstgcn", {}), ("dgstgcn", {"num_subsets": 4}), "a graph of 4 subsets"),
    (("stgcn", {}), ("stgcn", {"base_channels": 32}), "with the arguments of the checkpoint"),
])
def test_other_architectures_are_refused_and_nothing_changes(
    model: tuple, given: tuple, message: str
) -> None:
    target = network(model[0], **model[1])
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError) as error:
        from_pyskl(target, to_pyskl(network(given[0], seed=1, **given[1])))
    assert message in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_the_keys_of_a_network_that_is_none_of_the_four() -> None:
    """ST-GCN++ has ST-GCN's graph convolutions, and branches in time."""
    target = network("stgcn", adaptive="init")
    state = {key.replace(".tcn.conv.", ".tcn.branches.0."): value for key, value in to_pyskl(target)["state_dict"].items()}
    with pytest.raises(ValueError, match="it is of another network"):
        from_pyskl(target, state)


class Hostile:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("hostile"),))


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network("stgcn").state_dict(), "meta": Hostile()}, "bad.pth")
    with pytest.raises(
        ValueError, match=r"Expected checkpoint 'bad.pth' to be a file of torch.save with tensors"
    ):
        from_pyskl(network("stgcn"), "bad.pth")
    assert not Path("hostile").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "to be a file of torch.save"),
        (b"PK\x03\x04 cut", "to be a file of torch.save"),
        (None, "existing file"),
        ([1, 2], "Got a list"),
        ({"model": {}}, "Got a dict with keys model"),
        ({}, "Got an empty dict"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        from_pyskl(network("stgcn"), path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def paper_checkpoint(name: str, seed: int = 0) -> dict[str, Tensor]:
    model = network(name, seed=seed, **PAPER_ARGUMENTS[name])
    rng = np.random.default_rng(seed)
    scores = {f"{key}.weight_score": torch.from_numpy(rng.normal(size=conv.weight.shape))
              for key, conv in maskable_convs(model).items()}
    return {**model.state_dict(), **scores}


def paper_masks(
    name: str, state: dict[str, Tensor], sparsity: float, residual_at_zero: bool
) -> dict[str, Tensor]:
    """The rule spelled out: pool, k-th smallest, keep what is at least that."""
    scores = {
        key.removesuffix(".weight_score"): value for key, value in state.items() if key.endswith("_score")
    }
    pool_of = lambda key: 0 if name == "stgcn" else block_of(key)
    masks = {}
    for key, score in scores.items():
        pool = np.sort(np.concatenate([s.flatten() for k, s in scores.items() if pool_of(k) == pool_of(key)]))
        threshold = pool[round(sparsity * (len(pool) - 1))]
        masks[key] = score >= (0 if residual_at_zero and ".residual." in key else threshold)
    return masks


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_checkpoint_of_the_paper(name: str, repair: bool) -> None:
    state = paper_checkpoint(name)
    model = from_paper(network(name, seed=1, **PAPER_ARGUMENTS[name]), state, 0.8, repair_residual=repair)
    masks = paper_masks(name, state, 0.8, residual_at_zero=name in ("stgcn", "aagcn") and not repair)
    assert stage(model) == "compact"
    assert summary(model).kept == sum(int(mask.sum()) for mask in masks.values())
    want = network(name, seed=1, **PAPER_ARGUMENTS[name])
    want.load_state_dict(
        {
            key: value * masks[key.removesuffix(".weight")] if key.removesuffix(".weight") in masks else value
            for key, value in state.items()
            if not key.endswith("_score")
        }
    )
    if name == "ctrgcn":
        for block in want.backbone.blocks:
            block.gcn1.bn = torch.nn.Identity()
    torch.testing.assert_close(model(clip()), want(clip()), atol=1e-10, rtol=1e-10)
    for key, conv in maskable_convs(densify(model)).items():
        assert torch.equal(conv.from_oik(conv.pattern.mask()), masks[key])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("stgcn", 3_098_832), ("aagcn", 3_781_668), ("ctrgcn", 1_638_984), ("dgstgcn", 1_700_922)],
)
def test_paper_architectures_have_the_released_sizes(name: str, parameters: int) -> None:
    assert summary(create_model(name, 60, **PAPER_ARGUMENTS[name])).parameters == parameters


def test_paper_checkpoints_are_checked() -> None:
    state = paper_checkpoint("ctrgcn")
    model = lambda **kwargs: network("ctrgcn", seed=1, **{**PAPER_ARGUMENTS["ctrgcn"], **kwargs})
    with pytest.raises(ValueError, match="use from_paper"):
        from_pyskl(model(), state)
    with pytest.raises(ValueError, match="sparsity to be at least 0 and below 1"):
        from_paper(model(), state, 1.0)
    with pytest.raises(ValueError, match="Expected model to be dense"):
        from_paper(sparsify(model(), 0.5), state, 0.8)
    with pytest.raises(ValueError, match=r"to have scores .*temporal='mixed'"):
        from_paper(model(temporal="branched"), state, 0.8)
    key = "backbone.net.0.gcn1.convs.0.conv1.weight_score"
    with pytest.raises(ValueError, match="Got none"):
        from_paper(model(), {k: v for k, v in state.items() if k != key}, 0.8)


def test_imported_weights_train_on() -> None:
    model = from_paper(
        network("dgstgcn", **PAPER_ARGUMENTS["dgstgcn"]), paper_checkpoint("dgstgcn"), 0.8
    ).train()
    F.cross_entropy(model(clip()), torch.tensor([0, 1])).backward()
    assert all(conv.values.grad is not None for conv in maskable_convs(model).values())
