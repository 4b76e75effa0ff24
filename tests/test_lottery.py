"""Learned masks on frozen weights, pruning by magnitude, and the command that compares them."""
from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_cli_errors import refused
from test_resume import Stopping
from torch import nn
from torch.nn import functional as F

from sparse_stgcn import create_model, lottery, masks, save
from sparse_stgcn.checkpoint import load
from sparse_stgcn.config import TrainConfig
from sparse_stgcn.errors import UserError
from sparse_stgcn.scores import accuracy
from sparse_stgcn.sparsity import mask_layers, maskable_convs, stage, summary
from sparse_stgcn.training.lottery import SCORE_INITS, ScoredNetwork
from sparse_stgcn.training.run import prepare
from sparse_stgcn.training.tickets import Lottery, Recipe, rounds

pytestmark = pytest.mark.filterwarnings("ignore:magnitude leaves .* block rows without a weight")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 2, 8, 5, 3, generator=generator), torch.arange(6) % tiny.CLASSES


def network(name: str = "stgcn") -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, tiny.CLASSES, layout=tiny.SKELETON, base_channels=8)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def weights_as_masked(scored: ScoredNetwork) -> nn.Module:
    """The same network with W * M as its weights, trainable."""
    model = copy.deepcopy(scored.model).requires_grad_(True)
    for conv, layer, live in zip(maskable_convs(model).values(), mask_layers(model, "3x2"), scored.live(), strict=True):
        (o, i, _), (bo, bi) = layer.shape, layer.block
        mask = live.repeat_interleave(bo, 0).repeat_interleave(bi, 1)[:o, :i]
        conv.as_oik(conv.weight.data).mul_(mask)
    return model


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
def test_forward_is_that_of_the_masked_weights_and_scores_get_the_gradient_of_the_mask(name: str, absolute: bool) -> None:
    scored = ScoredNetwork(network(name), 0.7, "3x2", absolute=absolute)
    reference, (keypoint, label) = weights_as_masked(scored), batch()
    got, want = scored(keypoint), reference(keypoint)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    F.cross_entropy(got, label).backward()
    F.cross_entropy(want, label).backward()
    cut = 0.0
    for conv, other, layer, score, live in zip(maskable_convs(scored.model).values(), maskable_convs(reference).values(),
                                               mask_layers(network(name), "3x2"), scored.scores, scored.live(), strict=True):
        product = conv.weight_oik() * other.as_oik(other.weight.grad)
        expected = torch.from_numpy(layer.block_sums(product.numpy().astype(float))).float()
        expected = expected * score.detach().sign() if absolute else expected
        scale = layer.block_sums(product.abs().numpy().astype(float)).max()
        assert (score.grad - expected).abs().max() <= 1e-3 * scale + 1e-7
        cut += float(score.grad[~live].abs().sum())
        assert conv.weight.grad is None
    assert cut > 0  # what is cut can come back


@pytest.mark.parametrize(("scope", "density"), [("global", "uniform"), ("block", "uniform"), ("layer", "uniform"),
                                               ("layer", "erk")])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_number_of_ones_is_exact_and_they_have_the_highest_scores(scope: str, density: str, absolute: bool) -> None:
    scored = ScoredNetwork(network(), 0.9, (1, 1), density, scope, absolute)
    layers = mask_layers(scored.model, (1, 1))
    pools = [[i] for i in range(len(layers))] if scope == "layer" else masks.pools(layers, scope)
    counts = masks.budgets(layers, 0.9, density, scope, floor=False)
    rank = [score.detach().abs() if absolute else score.detach() for score in scored.scores]
    for pool in pools:
        live = torch.cat([scored.live()[i].flatten() for i in pool])
        value = torch.cat([rank[i].flatten() for i in pool])
        assert int(live.sum()) == sum(counts[i] for i in pool) > 0
        assert bool(live.all()) or value[live].min() >= value[~live].max()
    for score in scored.scores:
        score.data.fill_(0.5)
    assert sum(int(live.sum()) for live in scored.live()) == counts.sum()


def test_first_scores() -> None:
    scored = {init: ScoredNetwork(network(), 0.9, "3x2", init=init) for init in SCORE_INITS}
    largest = lambda init: np.array([float(score.detach().abs().max()) for score in scored[init].scores])
    fan_in = np.array([layer.fan_in for layer in mask_layers(network(), "3x2")])
    assert (largest("fan_in") <= np.sqrt(6 / fan_in) * 1.0001).all()
    assert (largest("fan_in") > 0.8 * np.sqrt(6 / fan_in)).all()
    assert np.ptp(largest("uniform")) < 0.2 * largest("uniform").max()
    drawn = masks.draw(mask_layers(network(), "3x2"), 0.9, "magnitude")
    alone = ScoredNetwork(network(), 0.9, "3x2", scope="layer", init="magnitude")
    ragged = lambda pattern: pattern.shape[0] % 3 or pattern.shape[1] % 2
    for pattern, live in zip(drawn.values(), alone.live(), strict=True):
        assert ragged(pattern) or torch.equal(pattern.blocks(), live)
    with pytest.raises(ValueError, match="init to be one of uniform, fan_in, magnitude. Got 'kaiming'"):
        ScoredNetwork(network(), 0.9, init="kaiming")
    with pytest.raises(ValueError, match="Got one in stage 'warmup'"):
        ScoredNetwork(tiny.model(0.8), 0.9)


@pytest.mark.parametrize(("options", "also"), [
    ({}, ""), ({"train_head": True}, r"cls_head\.fc_cls"), ({"train_norm": True}, r"bn\.(weight|bias)$")])
def test_what_trains(options: dict, also: str) -> None:
    scored = ScoredNetwork(network(), 0.7, **options)
    trained = {name for name, parameter in scored.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in scored.named_parameters() if also and re.search(also, name)}
    assert bool(expected) == bool(also)
    assert trained == expected | {f"scores.{i}" for i in range(22)}


def test_the_ticket_is_the_network_with_its_mask_on_live_blocks() -> None:
    scored, (keypoint, _) = ScoredNetwork(network(), 0.7, "3x2").eval(), batch()
    with torch.no_grad():
        want, live = scored(keypoint), scored.live()
        ticket = scored.ticket()
        torch.testing.assert_close(ticket(keypoint), want, rtol=1e-4, atol=1e-5)
    assert stage(ticket) == "compact"
    assert all(parameter.requires_grad for parameter in ticket.parameters())
    for conv, blocks in zip(maskable_convs(ticket).values(), live, strict=True):
        assert torch.equal(conv.pattern.blocks(), blocks)


@pytest.mark.parametrize(("sparsities", "rate"), [((0.6, 0.8, 0.95, 0.99), 0.5), ((0.9,), 0.2), ((0.3, 0.31), 0.9)])
def test_rounds_cut_no_more_than_the_rate(sparsities: tuple[float, ...], rate: float) -> None:
    steps = rounds(sparsities, rate)
    assert set(sparsities) <= set(steps)
    assert len(steps) == len(set(steps))
    for before, after in itertools.pairwise([0.0, *steps]):
        assert 0 < (after - before) / (1 - before) <= rate + 1e-4
    assert rounds([0.5, 0.9], 0.5) == pytest.approx([0.5, 0.7076, 0.829, 0.9], abs=1e-4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a dense run on 90 sequences."""
    folder = tmp_path_factory.mktemp("lottery")
    file = folder / "tiny.npz"
    np.savez(file, **tiny.arrays(90), label_names=np.array(["one", "two", "three"]),
             joint_names=np.array(tiny.SKELETON.joints), edges=np.array(tiny.SKELETON.edges), root=np.array(0))
    config = tiny.config(data=str(file), work_dir=str(folder / "dense"), sparsity=0.0, warmup_epochs=0, epochs=6, lr=0.02)
    job = prepare(config, Stopping(None))
    job.fit()
    job.finish()
    return folder / "dense"


def experiment(dense: Path, out: Path, after: int | None = None, recipe: Recipe | None = None, **changed) -> Lottery:
    base = lottery.check(lottery.LotteryConfig(str(dense), **changed))
    from sparse_stgcn.training.run import open_archive, resolve

    archive, report = open_archive(base), Stopping(after)  # one for all trainings: it counts their steps
    return Lottery(resolve(base, archive), archive, dense / "model.safetensors", recipe or Recipe(), out,
                   lambda epochs: report)


def test_scores_find_a_ticket_that_beats_where_they_began(dense: Path, tmp_path: Path) -> None:
    job = experiment(dense, tmp_path, recipe=Recipe(block="2x1"))
    point, = job.run(["scores"], ["pretrained"], [0.8], [0])
    assert point["top1"] > max(0.6, point["one_clip_before"] + 0.1)
    ticket, before = load(tmp_path / point["file"]), load(dense / "model.safetensors")
    for conv, other in zip(maskable_convs(ticket).values(), maskable_convs(before).values(), strict=True):
        kept = conv.pattern.mask()
        assert torch.equal(conv.weight_oik()[kept], other.weight_oik()[kept])  # the weights never moved
    assert torch.equal(ticket.cls_head.fc_cls.weight, before.cls_head.fc_cls.weight)
    assert summary(ticket).kept == point["maskable_kept"] == pytest.approx(0.2 * point["maskable"], abs=22)


def test_the_command_skips_what_is_done_and_adds_what_is_new(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    argv = [str(dense), "--out", str(tmp_path / "out"), "--methods", "scores", "magnitude", "--epochs", "1",
            "--inits", "pretrained", "random", "--sparsities", "0.5"]
    assert lottery.main(argv) == 0
    text = capsys.readouterr().out
    assert re.search(r"magnitude, random +\d+\.\d\d%\n +scores, pretrained +\d+\.\d\d%", text)
    first = json.loads((tmp_path / "out" / "lottery.json").read_text())
    assert {(p["method"], p["init"], p["sparsity"], p["seed"]) for p in first["points"]} == \
        set(itertools.product(("scores", "magnitude"), ("pretrained", "random"), (0.5,), (0,)))
    assert first["pretrained"]["test"]["top1"] > 0.8
    assert first["recipe"]["scope"] == "global"
    assert not list((tmp_path / "out").rglob("resume.safetensors"))
    assert lottery.main([*argv[:-1], "0.9", "0.5", "--figure"]) == 0
    assert (tmp_path / "out" / "lottery.png").read_bytes().startswith(b"\x89PNG")
    both = json.loads((tmp_path / "out" / "lottery.json").read_text())
    assert [p for p in both["points"] if p["sparsity"] == 0.5] == first["points"]
    assert len(both["points"]) == 8
    monkeypatch.setattr("sparse_stgcn.training.tickets.Trainer", None)  # nothing is left to train
    assert lottery.main(argv) == 0
    assert json.loads((tmp_path / "out" / "lottery.json").read_text()) == both


@pytest.mark.parametrize("method", ["scores", pytest.param("magnitude", marks=pytest.mark.slow),
                                    pytest.param("iterative", marks=pytest.mark.slow)])
def test_an_interrupted_point_goes_on_and_gives_the_same(dense: Path, tmp_path: Path, method: str) -> None:
    asked = ([method], ["random"], [0.5, 0.8], [1])
    options = {"epochs": 2, "recipe": Recipe(rewind_epoch=1)}
    whole = experiment(dense, tmp_path / "a", **options).run(*asked)
    for after in (4, 11, 20, 6):  # at 8 steps an epoch: in the first epoch, in the second, twice in later trainings
        with pytest.raises(KeyboardInterrupt):
            experiment(dense, tmp_path / "b", after, **options).run(*asked)
    again = experiment(dense, tmp_path / "b", **options).run(*asked)
    clean = lambda points: [{k: v for k, v in point.items() if k != "seconds"} for point in points]
    assert clean(again) == clean(whole)
    for point in whole:
        a, b = (load(tmp_path / name / point["file"]).state_dict() for name in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_points_that_another_process_adds_meanwhile_are_kept(dense: Path, tmp_path: Path) -> None:
    one, other = experiment(dense, tmp_path, epochs=1), experiment(dense, tmp_path, epochs=1)
    one.run(["magnitude"], ["random"], [0.5], [0])
    other.run(["magnitude"], ["random"], [0.5], [1])
    assert [point["seed"] for point in json.loads((tmp_path / "lottery.json").read_text())["points"]] == [0, 1]


def test_an_interrupted_point_goes_on_with_its_own_data_only(dense: Path, tmp_path: Path) -> None:
    asked = (["magnitude"], ["random"], [0.5], [1])
    with pytest.raises(KeyboardInterrupt):
        experiment(dense, tmp_path, 11, epochs=2).run(*asked)
    job = experiment(dense, tmp_path, epochs=2)
    job.archive = replace(job.archive, label=job.archive.label[::-1].copy())
    with pytest.raises(UserError, match="Expected --data to be what the run .* other labels"):
        job.run(*asked)


def test_rounds_whose_points_are_recorded_are_not_trained_again(dense: Path, tmp_path: Path, monkeypatch) -> None:
    experiment(dense, tmp_path, epochs=1).run(["iterative"], ["random"], [0.9], [1])
    job, trained = experiment(dense, tmp_path, epochs=1), []
    make = job._trainer
    monkeypatch.setattr(job, "_trainer", lambda config, *rest: trained.append(config.sparsity) or make(config, *rest))
    job.run(["iterative"], ["random"], [0.3, 0.9], [1])
    assert trained == [0.3]


def iterative(dense: Path, out: Path, after: int | None = None) -> Lottery:
    """Two epochs of 8 steps, the second of which is gone back to, with a state after every step."""
    job = experiment(dense, out, after, recipe=Recipe(rewind_epoch=1), epochs=2)
    job.base = replace(job.base, save_every_steps=1)
    return job


def test_the_early_weights_outlast_an_interruption_inside_their_epoch(dense: Path, tmp_path: Path) -> None:
    asked = (["iterative"], ["random"], [0.5], [1])
    with pytest.raises(KeyboardInterrupt):
        iterative(dense, tmp_path, 11).run(*asked)
    early, aside = tmp_path / "iterative-random-seed1" / "rewind.safetensors", tmp_path / "aside"
    before = early.read_bytes()
    early.rename(aside)  # later weights never stand in for them
    with pytest.raises(UserError, match=r"Expected .*rewind.safetensors beside .* past epoch 1. Got none; remove .*seed1, so"):
        iterative(dense, tmp_path).run(*asked)
    assert not early.exists()
    aside.rename(early)
    with pytest.raises(KeyboardInterrupt):
        iterative(dense, tmp_path, 2).run(*asked)
    assert early.read_bytes() == before


def test_the_states_of_another_experiment_are_refused_before_the_first_point(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        iterative(dense, tmp_path, 3).run(["iterative"], ["random"], [0.5], [1])
    with pytest.raises(UserError, match="same experiment. Got other rewind_epoch"):
        experiment(dense, tmp_path, recipe=Recipe(), epochs=2)


def test_what_is_reported_is_of_the_weights_that_are_saved(dense: Path, tmp_path: Path) -> None:
    averaged = tmp_path / "averaged"
    shutil.copytree(dense, averaged)
    replace(TrainConfig.read(dense / "config.yaml"), ema=0.99).write(averaged / "config.yaml")
    job = experiment(averaged, tmp_path / "out", recipe=Recipe(block="2x1"), epochs=1)
    point, = job.run(["magnitude"], ["random"], [0.5], [0])
    assert job.base.ema is None
    assert accuracy(load(tmp_path / "out" / point["file"]), job.quick_test) == point["one_clip"]


def test_iterative_rounds_cut_the_smallest_and_rewind(dense: Path, tmp_path: Path) -> None:
    """With hardly any learning rate, the weights stay where they are rewound to."""
    job = experiment(dense, tmp_path, epochs=1, lr=1e-9, recipe=Recipe(block="2x1", rate=0.5))
    points = job.run(["iterative"], ["pretrained"], [0.5, 0.8], [0])
    assert [(p["sparsity"], p["rounds"]) for p in points] == [(0.5, 1), (0.8, 3)]
    first = maskable_convs(load(dense / "model.safetensors"))
    norm = {n: c.pattern for n, c in maskable_convs(load(tmp_path / points[0]["file"])).items()}
    kept, cut = [], []
    for name, conv in maskable_convs(load(tmp_path / points[1]["file"])).items():
        weight, mask = first[name].weight_oik(), conv.pattern.mask()
        torch.testing.assert_close(conv.weight_oik()[mask], weight[mask], rtol=1e-4, atol=1e-6)
        assert not bool((conv.pattern.blocks() & ~norm[name].blocks()).any())
        size = weight.unflatten(0, (-1, 2)).square().sum(1)
        kept.append(size[conv.pattern.blocks()])
        cut.append(size[~conv.pattern.blocks()])
    assert torch.cat(kept).min() >= 0.999 * torch.cat(cut).max()


BAD = {
    "no run": (["nowhere"], "D to be the work directory of a finished run. Got nowhere without config.yaml"),
    "unknown method": (["D", "--methods", "magic"], "--methods to be one of scores, magnitude, iterative"),
    "unknown init": (["D", "--inits", "half"], "--inits to be one of pretrained, random"),
    "sparsity 1": (["D", "--sparsities", "0.5", "1"], r"--sparsities in \(0, 1\). Got 0.5 1"),
    "seed": (["D", "--seeds=-1"], "--seeds to be whole numbers >= 0"),
    "rate": (["D", "--rate", "1"], r"--rate in \(0, 1\)"),
    "rewind": (["D", "--rewind-epoch", "6"], r"--rewind-epoch from 0 to below --epochs \(6\). Got 6"),
    "block": (["D", "--block", "eight"], "--block"),
    "block too tall": (["D", "--block", "64x1"], "at most 32 outputs"),
    "scores": (["D", "--score-init", "zero"], "--score-init to be one of uniform"),
    "rate of scores": (["D", "--score-lr", "0"], "--score-lr > 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BAD[name]
    refused(lottery.main, [str(dense) if part == "D" else part for part in argv], message, capsys)
    assert not (dense / "lottery").exists()


def test_other_experiments_and_sparse_networks_are_refused(dense: Path, tmp_path: Path, capsys) -> None:
    argv = [str(dense), "--out", str(tmp_path / "out"), "--epochs", "1", "--inits", "random", "--sparsities", "0.5"]
    assert lottery.main(argv) == 0
    for extra, message in ((["--absolute"], "same experiment. Got other absolute"), (["--lr", "0.5"], "Got other lr")):
        refused(lottery.main, [*argv, *extra], message, capsys)
    folder = tmp_path / "sparse"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((dense / "config.yaml").read_bytes())
    save(tiny.model(0.8), folder / "model.safetensors")
    refused(lottery.main, [str(folder)], "checkpoint of a dense network.*train one with --sparsity 0", capsys)
