"""sparsify, compact, densify on whole networks; layers.SparseConv2d."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_stgcn import BlockPattern, Recognizer, compact, create_model, densify, sparsify
from sparse_stgcn.layers import SparseConv2d
from sparse_stgcn.sparsity import (
    block_of,
    compact_parameters,
    groups_of,
    maskable_convs,
    masked,
    parse_block,
    stage,
    summary,
)
from sparse_stgcn.training.generator import TwoStage

NAMES = ("stgcn", "aagcn", "ctrgcn", "dgstgcn")
CUSTOM = {"joints": ["hip", "spine", "head", "left_hand", "right_hand", "tail"],
          "edges": [[1, 0], [2, 1], [3, 1], [4, 1], [5, 0]], "root": 0}


def network(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs) -> Recognizer:
    """A narrow network in which every parameter matters: none is 0 or 1e-6."""
    torch.manual_seed(seed)
    model = create_model(name, 5, layout=CUSTOM, base_channels=16, **kwargs).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip(dtype: torch.dtype = torch.float64, batch: int = 3, persons: int = 2) -> Tensor:
    return torch.randn(batch, persons, 13, 6, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", [(1, 1), (8, 1), (4, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compact_equals_dense_with_zeros(name: str, block: tuple[int, int]) -> None:
    model = sparsify(network(name), 0.6, block).eval()
    with torch.no_grad(), masked(model):
        want = model(clip())
    got = compact(model)(clip())
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_compact_equals_dense_with_zeros_in_float32(name: str) -> None:
    model = sparsify(network(name, torch.float32), 0.8).eval()
    with torch.no_grad():
        with masked(model):
            want = model(clip(torch.float32))
        got = compact(model)(clip(torch.float32))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_equals_that_of_the_masked_network(name: str) -> None:
    """Two SGD steps before the switch, two after it; the reference masks weights, gradients and momentum
    instead."""
    sparse = sparsify(network(name), 0.7, (4, 1)).train()
    twin = copy.deepcopy(sparse)
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimisers = {id(model): torch.optim.SGD(model.parameters(), **options) for model in (sparse, twin)}

    def step(model: nn.Module, seed: int, masks: dict[str, Tensor] | None = None) -> None:
        optimiser = optimisers[id(model)]
        optimiser.zero_grad()
        F.cross_entropy(model(clip() + seed), torch.tensor([0, 1, 2])).backward()
        for conv_name, mask in (masks or {}).items():
            maskable_convs(model)[conv_name].weight.grad.mul_(mask)
        optimiser.step()

    for seed in (1, 2):
        step(sparse, seed)
        step(twin, seed)
    old = optimisers[id(sparse)]
    replaced = compact_parameters(sparse)
    optimisers[id(sparse)] = torch.optim.SGD(sparse.parameters(), **options)
    carried = {id(p): old.state[p]["momentum_buffer"] for p in old.state if p not in replaced}
    carried.update(
        {id(new): take(old.state[was]["momentum_buffer"]) for was, (new, take) in replaced.items()}
    )
    for parameter in sparse.parameters():
        if id(parameter) in carried:
            optimisers[id(sparse)].state[parameter]["momentum_buffer"] = carried[id(parameter)]

    masks = {n: conv.from_oik(conv.pattern.mask().double()) for n, conv in maskable_convs(twin).items()}
    with torch.no_grad():
        for conv_name, conv in maskable_convs(twin).items():
            conv.weight.mul_(masks[conv_name])
            optimisers[id(twin)].state[conv.weight]["momentum_buffer"].mul_(masks[conv_name])
    for seed in (3, 4):
        step(sparse, seed)
        step(twin, seed, masks)
    for (key, got), want in zip(
        densify(sparse).state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            got, want, atol=1e-9, rtol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_densify_is_the_way_back(name: str) -> None:
    model = sparsify(network(name), 0.8).eval()
    values = {n: p.clone() for n, p in compact(model).named_parameters()}
    logits = model(clip())
    densify(model)
    assert stage(model) == "warmup"
    torch.testing.assert_close(model(clip()), logits, atol=1e-11, rtol=1e-11)
    for conv in maskable_convs(model).values():
        assert torch.equal(conv.weight_oik() != 0, conv.pattern.mask())
    again = dict(compact(model).named_parameters())
    assert values.keys() == again.keys()
    assert all(torch.equal(values[n], again[n]) for n in values)
    assert stage(densify(model, forget=True)) == "dense"
    assert dict(model.named_parameters()).keys() == dict(network(name).named_parameters()).keys()


@pytest.mark.parametrize(("name", "total", "maskable"), [
    ("stgcn", 3_098_832, 3_052_096), ("aagcn", 3_781_668, 3_419_168), ("ctrgcn", 1_446_672, 1_390_480),
    ("dgstgcn", 1_701_172, 1_609_676)])
def test_counts_of_the_networks(name: str, total: int, maskable: int) -> None:
    model = create_model(name, 60)
    dense = summary(model)
    assert (dense.parameters, dense.maskable, dense.kept) == (total, maskable, maskable)
    sparse = summary(sparsify(model, 0.95))
    assert abs(sparse.kept - 0.05 * maskable) < 500
    assert sparse.kept_parameters == total - maskable + sparse.kept
    stored = sum(p.numel() for p in compact(model).parameters())
    ragged = sum(c.values.numel() - c.pattern.num_live for c in maskable_convs(model).values())
    assert stored == sparse.kept_parameters + ragged
    assert summary(model) == sparse
    assert f"{sparse.kept:,} of {maskable:,}" in str(sparse)


def test_attention_is_optional() -> None:
    assert summary(create_model("aagcn", 60, attention=False)).parameters == 3_469_520


def test_dead_weights_are_gone() -> None:
    model = compact(sparsify(network("stgcn"), 0.9))
    assert not [n for n, _ in model.named_parameters() if n.endswith("conv.weight")]
    assert all(conv.weight is None and conv.values.requires_grad for conv in maskable_convs(model).values())


def test_warmup_is_dense_unless_masked() -> None:
    model = network("stgcn").eval()
    dense = model(clip())
    sparsify(model, 0.9)
    assert stage(model) == "warmup"
    assert torch.equal(model(clip()), dense)
    with masked(model):
        assert not torch.allclose(model(clip()), dense)
    assert torch.equal(model(clip()), dense)


def test_zeros_of_the_fixed_graph_follow_a_loaded_graph() -> None:
    model = compact(sparsify(network("stgcn"), 0.5)).eval()
    unit = model.backbone.blocks[0].gcn
    assert torch.equal(unit.support(), unit.A != 0)
    assert unit.support() is unit.support()
    other = {key: torch.rand_like(value) if key.endswith("gcn.A") else value for key, value in
             model.state_dict().items()}
    with torch.inference_mode():
        model(clip())
    model.load_state_dict(other)
    assert unit.support().all()
    got = model(clip())
    torch.testing.assert_close(got, densify(model)(clip()), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("adaptive", ["importance", "init", "offset", "fixed"])
def test_ways_to_learn_the_graph(adaptive: str) -> None:
    model = sparsify(network("stgcn", adaptive=adaptive), 0.6).eval()
    with torch.no_grad(), masked(model):
        want = model(clip())
    torch.testing.assert_close(compact(model)(clip()).detach(), want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("persons", [1, 3])
def test_any_number_of_persons(name: str, persons: int) -> None:
    kwargs = {"num_person": persons} if name in ("aagcn", "ctrgcn") else {}
    model = network(name, **kwargs).eval()
    assert model(clip(persons=persons)).shape == (3, 5)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_single_frames(name: str) -> None:
    model = network(name, torch.float32).eval()
    for _ in ("dense", "compact"):
        assert model(torch.zeros(0, 2, 9, 6, 3)).shape == (0, 5)
        assert model(clip(torch.float32)[:, :, :1]).isfinite().all()
        if stage(model) == "dense":
            compact(sparsify(model, 0.8))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_trains(name: str) -> None:
    model = network(name, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(clip(torch.float32))
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_the_network_again(name: str) -> None:
    model = network(name)
    again = Recognizer.from_config(model.config).double().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(clip()), model.eval()(clip()))


def test_every_convolution_is_in_a_block() -> None:
    for name in NAMES:
        blocks = [block_of(conv) for conv in maskable_convs(network(name))]
        assert sorted(set(blocks)) == list(range(10))
        assert blocks == sorted(blocks)
    with pytest.raises(ValueError, match=r"Got 'cls_head\.fc_cls'"):
        block_of("cls_head.fc_cls")


class OwnNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.net = SparseConv2d(3, 16, 9), torch.nn.ModuleList([SparseConv2d(16, 32, 3, stride=2)])
        self.head = torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net[0](self.stem(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("scope", ["layer", "block", "global"])
def test_a_network_of_ones_own(scope: str) -> None:
    model, x = OwnNetwork(), torch.randn(2, 3, 8, 5)
    sparsify(model, 0.75, block=(4, 1), scope=scope)
    penalty = TwoStage(model, 1).penalty()
    assert penalty > 0
    with masked(model):
        wanted = model(x)
    assert torch.allclose(compact(model)(x), wanted, atol=1e-6)
    assert summary(model).kept_fraction == pytest.approx(0.25, abs=0.01)
    assert groups_of(["stem", "net.0", "backbone.gcn.3.tcn.conv"]) == [4, 5, 3]


def test_a_network_without_sparse_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="layers.SparseConv2d. Got none"):
        sparsify(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3)), 0.9)


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "gcn"}, "name to be one of stgcn, aagcn, ctrgcn, dgstgcn. Got 'gcn'"),
    ({"num_classes": 0}, "num_classes to be a whole number of at least 1. Got 0"),
    ({"in_channels": 2.5}, "in_channels to be a whole number"),
    ({"dropout": 1}, "dropout to be at least 0 and below 1"),
    ({"attention": True}, "arguments of stgcn among"),
    ({"graph": "tree"}, "mode to be one of"),
    ({"base_channels": 0}, "base_channels to be a whole number of at least 1. Got 0"),
    ({"base_channels": 8.0}, "base_channels to be a whole number"),
    ({"num_subsets": 0}, "num_subsets to be a whole number of at least 1"),
    ({"name": "aagcn", "num_person": -1}, "num_person to be a whole number of at least 1"),
    ({"name": "dgstgcn", "ratio": 0}, "ratio above 0. Got 0"),
    ({"name": "dgstgcn", "base_channels": 5}, "base_channels that the branches of dgstgcn can share. Got 5"),
    ({"name": "ctrgcn", "base_channels": 3}, "base_channels that the branches of ctrgcn can share. Got 3"),
    ({"name": "dgstgcn", "ratio": 0.01}, "dgstgcn can share. Got 16 (and ratio 0.01, by which it is multiplied)"),
    ({"adaptive": "no"}, "adaptive to be one of importance, init, offset, fixed. Got 'no'"),
])
def test_bad_models_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "stgcn", "num_classes": 5, "base_channels": 16, **change})
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("stgcn", (2, 2, 8, 6), "keypoint of shape (N, M, T, V, C). Got (2, 2, 8, 6)"),
    ("stgcn", (2, 2, 8, 7, 3), "6 joints (custom) and 3 channels. Got 7 and 3"),
    ("stgcn", (2, 2, 8, 6, 2), "Got 6 and 2"),
    ("aagcn", (2, 1, 8, 6, 3), "Got 1; pad the persons with zeros or build the model with num_person=1"),
])
def test_bad_input_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        network(name, torch.float32)(torch.zeros(shape))
    assert message in str(error.value)


def test_stages_are_checked() -> None:
    model = network("stgcn")
    with pytest.raises(ValueError, match="call sparsify first"):
        compact(model)
    sparsify(model, 0.5)
    with pytest.raises(ValueError, match="Got one in stage 'warmup'"):
        sparsify(model, 0.5)
    with pytest.raises(ValueError, match="Expected block to fit a layer"):
        sparsify(network("stgcn"), 0.5, (65, 1))
    with pytest.warns(UserWarning, match=r"block 16x16 keeps .* every block row keeps at least one"):
        sparsify(network("stgcn"), 0.99, (16, 16))


@pytest.mark.parametrize(
    ("block", "want"), [("8x1", (8, 1)), ("16X16", (16, 16)), ((4, 4), (4, 4)), ([8, 1], (8, 1))]
)
def test_block_argument(block: object, want: tuple[int, int]) -> None:
    assert parse_block(block) == want


@pytest.mark.parametrize(
    "block", ["8", "8x", "8x0", "axb", (8,), (8, 1, 1), (0, 1), (8.5, 1), (-8, 1), None, 8]
)
def test_bad_block_argument(block: object) -> None:
    with pytest.raises(ValueError, match="Expected block to be two positive sizes"):
        parse_block(block)


class TestSparseConv2d:
    def test_initialisation_is_that_of_conv2d(self) -> None:
        torch.manual_seed(3)
        ours = SparseConv2d(7, 5, 9, 2)
        torch.manual_seed(3)
        theirs = nn.Conv2d(7, 5, (9, 1), (2, 1), (4, 0))
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in
                                                                      theirs.state_dict().items()}
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))

    @pytest.mark.parametrize(
        ("kernel", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (9, 2, 1), (5, 1, 2), (3, 2, 4)]
    )
    def test_stages_agree_with_conv2d(self, kernel: int, stride: int, dilation: int) -> None:
        conv = SparseConv2d(6, 10, kernel, stride, dilation).double()
        x = torch.randn(2, 6, 11, 4, dtype=torch.float64)
        live = torch.from_numpy(np.random.default_rng(0).random((3, 6, kernel)) < 0.4)
        pattern = BlockPattern.from_blocks(live, conv.shape_oik, (4, 1))
        weight = (conv.weight_oik() * pattern.mask())[..., None]
        want = F.conv2d(x, weight, conv.bias, (stride, 1), ((kernel - 1) // 2 * dilation, 0), (dilation, 1))
        conv.attach(pattern)
        conv.masked = True
        assert torch.equal(conv(x), want)
        conv.compact()
        torch.testing.assert_close(conv(x), want, atol=1e-12, rtol=1e-12)

    def test_aggregate_follows_its_formula(self) -> None:
        conv = SparseConv2d(3, 4, subsets=2).double()
        x, graph = torch.randn(2, 3, 5, 6).double(), torch.rand(2, 6, 6).double()
        weight, bias = conv.weight.view(2, 4, 3), conv.bias.view(2, 4)
        hidden = torch.einsum("koi,nitv->nkotv", weight, x) + bias[None, :, :, None, None]
        want = torch.einsum("nkotv,kvw->notw", hidden, graph)
        torch.testing.assert_close(conv.aggregate(x, graph), want)
        assert torch.equal(conv.from_oik(conv.weight_oik()), conv.weight)
        conv.attach(BlockPattern.full(conv.shape_oik, (4, 1)))
        conv.compact()
        torch.testing.assert_close(conv.aggregate(x, graph), want)

    def test_a_copy_is_independent_and_says_what_it_is(self) -> None:
        conv = SparseConv2d(4, 8, 3)
        conv.attach(BlockPattern.full((8, 4, 3), (8, 1)))
        other = copy.deepcopy(conv)
        other.compact()
        assert conv.stage == "warmup"
        assert "4, 8, kernel_size=3, compact, BlockPattern" in repr(other)

    def test_wrong_use_is_refused(self) -> None:
        conv = SparseConv2d(4, 8)
        with pytest.raises(ValueError, match="Expected pattern of shape"):
            conv.attach(BlockPattern.full((8, 4, 3), (8, 1)))
        with pytest.raises(ValueError, match="Got stage 'dense'"):
            conv.compact()
        for size in (4, 0, -1, (9, 1), 3.0):
            with pytest.raises(ValueError, match="kernel_size to be an odd whole number"):
                SparseConv2d(4, 8, size)
        with pytest.raises(ValueError, match="call aggregate"):
            SparseConv2d(4, 8, subsets=3)(torch.zeros(1, 4, 2, 2))
