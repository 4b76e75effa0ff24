"""Nested levels of one network: their storage, their gradients, their training, their files, and the command."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import STEPS, Stopping, assert_equal
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sparse_stgcn import BlockPattern, Ensemble, checkpoint, compact, create_model, masks, multilevel
from sparse_stgcn.config import TrainConfig, parse_as
from sparse_stgcn.errors import TrainingError, UserError, run
from sparse_stgcn.evaluate import main as evaluate
from sparse_stgcn.multilevel import MultiLevelConfig
from sparse_stgcn.scores import Scores
from sparse_stgcn.sparsity import densify, mask_layers, maskable_convs, summary
from sparse_stgcn.training.batches import Part
from sparse_stgcn.training.levels import Levels
from sparse_stgcn.training.multilevel import MultiLevelTrainer
from sparse_stgcn.training.multilevel_run import MultiLevelRun, prepare

LEVELS = (0.5, 0.7, 0.8, 0.9)


def nested(name: str = "stgcn", own_classifier: bool = True, dtype: torch.dtype = torch.float32, levels=LEVELS) -> Levels:
    """Levels of which every parameter has been moved, so that nothing is equal by initialisation."""
    torch.manual_seed(0)
    widest = create_model(name, tiny.CLASSES, layout=tiny.SKELETON, base_channels=8).to(dtype)
    widest_masks, *sparser = masks.draw_levels(mask_layers(widest, "4x1"), levels).values()
    for conv_name, conv in maskable_convs(widest).items():
        conv.attach(widest_masks[conv_name])
    together = Levels.of(compact(widest), sparser, own_classifier)
    for parameter in together.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    together.update()
    return together


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 2, 8, 5, 3, generator=generator, dtype=dtype), torch.arange(6) % tiny.CLASSES


# ---- storage and gradients -------------------------------------------------------------------------------------------

def test_positions_of_blocks_among_those_of_a_wider_pattern() -> None:
    wide = BlockPattern.from_blocks(torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0)) < 0.7, (18, 13, 3), (4, 2))
    live = wide.blocks() & (torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(1)) < 0.4)
    narrow = BlockPattern.from_blocks(live, wide.shape, wide.block)
    dense = torch.randn(wide.shape)
    assert torch.equal(wide.gather(dense)[narrow.within(wide)], narrow.gather(dense))
    with pytest.raises(ValueError, match=r"to have all blocks of this pattern. Got \d+ of \d+"):
        wide.within(narrow)
    with pytest.raises(ValueError, match="outer of shape"):
        narrow.within(BlockPattern.full(wide.shape, (4, 1)))


@pytest.mark.parametrize("name", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
def test_a_level_is_the_widest_network_with_more_masked(name: str) -> None:
    together, (keypoint, _) = nested(name, levels=LEVELS if name == "stgcn" else LEVELS[1:3]), batch()
    with torch.no_grad():
        for member in together.members:
            reference = densify(copy.deepcopy(together.widest), forget=True)
            patterns = {key: conv.pattern for key, conv in maskable_convs(member).items()}
            for key, conv in maskable_convs(reference).items():
                conv.attach(patterns[key])
            compact(reference)
            state = reference.state_dict()
            own = {k: v for k, v in member.state_dict().items() if "bn" in k or "norm" in k or "cls_head" in k
                   or k.rpartition(".")[0] in {n for n, m in member.named_modules() if isinstance(m, nn.BatchNorm2d)}}
            reference.load_state_dict({**state, **own})
            assert torch.equal(reference.eval()(keypoint), member.eval()(keypoint))
        expected = torch.stack([member(keypoint).softmax(1) for member in together.members]).mean(0)
        assert torch.equal(together.eval()(keypoint), expected)


def dense_losses(together: Levels, distillation: float, active: list[int]) -> dict[str, torch.Tensor]:
    """Gradients of the step's loss, from W * M_l in dense networks: independent of Levels and of the sparse kernels."""
    keypoint, label = batch(torch.float64)
    dense = densify(copy.deepcopy(together.widest), forget=True).train()
    widest = {key: p.detach().clone().requires_grad_() for key, p in dense.named_parameters()}
    total, answer = torch.zeros((), dtype=torch.float64), torch.zeros(0)
    for index in [0, *active]:
        member, parameters = together.members[index], dict(widest)
        for key, conv in maskable_convs(member).items():
            parameters[f"{key}.weight"] = conv.from_oik(conv.as_oik(widest[f"{key}.weight"]) * conv.pattern.mask())
        for key, parameter in member.named_parameters():
            if index and key in widest and parameter is not dict(together.widest.named_parameters())[key]:
                parameters[key] = parameter.detach()
        logits = functional_call(dense, parameters, (keypoint,))
        if index == 0:
            answer, loss = logits.detach().softmax(1), F.cross_entropy(logits, label)
        else:
            loss = (1 - distillation) * F.cross_entropy(logits, label) + distillation * F.cross_entropy(logits, answer)
        total = total + loss
    total.backward()
    return {key: p.grad for key, p in widest.items()}


def trainer(together: Levels, **options: object) -> MultiLevelTrainer:
    patterns = {level: {} for level in LEVELS}
    return MultiLevelTrainer(tiny.config(), together, patterns, *tiny.datasets(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("own_classifier", "distillation"), [(True, 1.0), (False, 0.3)])
def test_gradients_of_shared_parameters_are_the_sums_over_levels(own_classifier: bool, distillation: float) -> None:
    together = nested(own_classifier=own_classifier, dtype=torch.float64)
    expected = dense_losses(together, distillation, [1, 2, 3])
    step = trainer(together, between=2, distillation=distillation, own_classifier=own_classifier).step
    step.optimizer.param_groups[0]["lr"] = 0.05
    before = {key: p.detach().clone() for key, p in together.widest.named_parameters()}
    together.train()
    step([(Part(list(range(6)), 1.0, True), *batch(torch.float64))], 0.0)
    convs, checked = maskable_convs(together.widest), 0
    for key, parameter in together.widest.named_parameters():
        want = expected.get(key)
        if key.endswith(".values"):
            conv = convs[key.removesuffix(".values")]
            want = conv.gather(expected[key.replace(".values", ".weight")])
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-11)
        assert not torch.equal(parameter.detach(), before[key]) or not parameter.grad.any()
        checked += 1
    assert checked == len(expected)
    for member in list(together.members)[1:]:
        for key, conv in maskable_convs(member).items():
            outer = convs[key]
            assert torch.equal(conv.values, outer.values[conv.pattern.within(outer.pattern)])
            assert conv.values.grad is None and conv.bias is outer.bias
        assert (member.cls_head.fc_cls.weight is together.widest.cls_head.fc_cls.weight) != own_classifier
        assert member.backbone.gcn[0].gcn.PA is together.widest.backbone.gcn[0].gcn.PA


def test_a_step_trains_the_widest_the_sparsest_and_some_between() -> None:
    step = trainer(nested(), between=1).step
    torch.manual_seed(0)
    drawn = [step._active() for _ in range(60)]
    assert all(len(active) == 2 and active[1] == 3 for active in drawn)
    assert {active[0] for active in drawn} == {1, 2}
    torch.manual_seed(0)
    idle = step.levels.members[3 - step._active()[0]].backbone.gcn[0].tcn.bn
    before = copy.deepcopy(idle.state_dict())
    step.levels.train()
    torch.manual_seed(0)
    step([(Part(list(range(6)), 1.0, True), *batch())], 0.0)
    assert all(torch.equal(before[key], value) for key, value in idle.state_dict().items())


def test_levels_are_refused_that_do_not_lie_inside_each_other() -> None:
    members = list(nested().members)
    with pytest.raises(ValueError, match="Expected outer to have all blocks"):
        Levels(members[::-1])
    with pytest.raises(ValueError, match="of one architecture, all compact"):
        Levels([members[0], tiny.model(0.8)])


def test_a_loss_that_is_not_finite_in_any_level_stops_the_run() -> None:
    together = nested()
    together.members[-1].cls_head.fc_cls.bias.data.fill_(float("nan"))
    step = trainer(together)
    with pytest.raises(TrainingError, match="Expected a finite loss"):
        step.fit()


# ---- the file --------------------------------------------------------------------------------------------------------

def test_the_file_has_the_common_weights_once(tmp_path: Path) -> None:
    together, (keypoint, _) = nested(own_classifier=False), batch()
    checkpoint.save(together, tmp_path / "all.safetensors")
    tensors, description = checkpoint.read_tensors(tmp_path / "all.safetensors")
    assert description["format"] == 2
    assert [member.get("values_of") for member in description["members"]] == [None, 0, 0, 0]
    assert [key for key in tensors if key.endswith("sparse.values")] == ["members.0.sparse.values"]
    assert tensors["members.0.sparse.values"].numel() == summary(together.widest).kept
    names = {f"members.{index}.{name}" for index, member in enumerate(together.members)
             for name, _ in member.named_parameters()}
    stored = sum(t.numel() for key, t in tensors.items() if key in names or key.endswith("sparse.values"))
    assert stored == together.stored_parameters()
    back = checkpoint.load(tmp_path / "all.safetensors")
    assert type(back) is Ensemble
    with torch.no_grad():
        assert torch.equal(back(keypoint), together.eval()(keypoint))
        for ours, theirs in zip(together.members, back.members, strict=True):
            assert torch.equal(ours.eval()(keypoint), theirs(keypoint))


def test_members_with_values_of_their_own_keep_them(tmp_path: Path) -> None:
    members = [copy.deepcopy(member) for member in nested().members]
    next(iter(maskable_convs(members[2]).values())).values.data[0] += 1
    together, (keypoint, _) = Ensemble(members).eval(), batch()
    checkpoint.save(together, tmp_path / "e.safetensors")
    description = checkpoint.read_metadata(tmp_path / "e.safetensors")
    assert [member.get("values_of") for member in description["members"]] == [None, 0, None, 0]
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "e.safetensors")(keypoint), together(keypoint))
    checkpoint.save(Ensemble(members[1:3]), tmp_path / "apart.safetensors")
    apart = checkpoint.read_metadata(tmp_path / "apart.safetensors")["members"]
    assert [member.get("values_of") for member in apart] == [None, None]


@pytest.mark.parametrize("source", [1, -1, 7, "0"])
def test_values_of_a_member_that_is_not_earlier_are_refused(source: object, tmp_path: Path) -> None:
    tensors, description = checkpoint.pack(nested(levels=(0.5, 0.9)))
    description["members"][1]["values_of"] = source
    checkpoint.write_tensors(tmp_path / "e.safetensors", tensors, description)
    with pytest.raises(ValueError, match="Expected values_of of member 1 to be an earlier one"):
        checkpoint.load(tmp_path / "e.safetensors")


# ---- runs ------------------------------------------------------------------------------------------------------------

def config(folder: Path, **changed: object) -> MultiLevelConfig:
    data = folder / "tiny.npz"
    if not data.exists():
        tiny.write_npz(data)
    values = {**vars(tiny.config(data=str(data), method="nested", rotate=0.2, scale=0.1)), "levels": LEVELS,
              "schedule": "together", **changed}
    return MultiLevelConfig(**values)


def start(folder: Path, name: str, after: int | None = None, **changed: object) -> MultiLevelRun:
    return prepare(config(folder, work_dir=str(folder / name), **changed), Stopping(after))


def interrupted(after: int, folder: Path, **changed: object) -> MultiLevelRun:
    """A run that was stopped after so many steps and went on."""
    job = start(folder, "cut", after, **changed)
    with pytest.raises(KeyboardInterrupt):
        job.fit()
    torch.rand(7)
    job = prepare(parse_as(MultiLevelConfig, ["--resume", str(folder / "cut")]), Stopping(None))
    job.fit()
    return job


def everything(job: MultiLevelRun) -> dict[str, object]:
    levels, timed = job.trainer.levels, ("seconds", "samples_per_second", "test_seconds")
    names = {p: n for n, p in levels.named_parameters()}
    momentum = {names[p]: state["momentum_buffer"] for p, state in job.trainer.optimizer.state.items()}
    history = [{k: v for k, v in record.items() if k not in timed} for record in job.trainer.history]
    return {"state": levels.state_dict(), "momentum": momentum, "history": history, "random": torch.get_rng_state()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    job = start(tmp_path_factory.mktemp("whole"), "whole", distillation=0.5)
    job.fit()
    return everything(job)


# Interrupted in the warm-up, at the switch, in the first epoch of the levels, and in the last.
@pytest.mark.parametrize("after", [STEPS + 1, 2 * STEPS + 1, 3 * STEPS + 1])
def test_interrupted_and_resumed_equals_whole(after: int, whole: dict[str, object], tmp_path: Path) -> None:
    assert_equal(everything(interrupted(after, tmp_path, distillation=0.5)), whole)


def test_a_new_network_is_moved_to_the_device_before_the_patterns_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, move = [], nn.Module.to

    def recorded(module: nn.Module, *to: object) -> nn.Module:
        moved.append((module, to, all(conv.stage == "dense" for conv in maskable_convs(module).values())))
        return move(module, *to)

    monkeypatch.setattr(nn.Module, "to", recorded)
    job = start(tmp_path, "new")
    assert [(to, dense) for module, to, dense in moved if module is job.trainer.model] == [((job.config.device,), True)]


def test_other_data_are_refused(tmp_path: Path) -> None:
    start(tmp_path, "cut").trainer.fit(until=1)
    tiny.write_npz(tmp_path / "tiny.npz", **tiny.arrays(33))
    with pytest.raises(UserError, match="Got .*tiny.npz with 33 sequences instead of 30"):
        prepare(parse_as(MultiLevelConfig, ["--resume", str(tmp_path / "cut")]))


def test_a_run_leaves_an_ensemble_and_ordinary_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_npz(tmp_path / "tiny.npz")
    out = tmp_path / "levels"
    flags = tiny.flags(epochs=3, warmup_epochs=1, eval_every=1)
    assert run(multilevel.main, [*flags, "--data", str(data), "--work-dir", str(out), "--levels", "0.8", "0.5", "0.9",
                                 "--schedule", "together"]) == 0
    assert "0.50 of one network's" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    scores = [Scores.load(out / name / "scores.npz") for name in ("0.5", "0.8", "0.9")]
    mean = sum(s.probability for s in scores) / 3
    assert abs(Scores.load(out / "scores.npz").probability - mean).max() < 1e-6
    together = checkpoint.load(out / "ensemble.safetensors")
    assert result["file"]["bytes"] == (out / "ensemble.safetensors").stat().st_size
    assert result["weights"]["maskable_kept"] == summary(together.members[0]).kept
    for index, (name, member) in enumerate(zip(("0.5", "0.8", "0.9"), together.members, strict=True)):
        alone, own = checkpoint.load(out / name / "model.safetensors"), json.loads((out / name / "result.json").read_text())
        with torch.no_grad():
            assert torch.equal(alone(batch()[0][:, :1]), member(batch()[0][:, :1]))
        assert own["config"]["sparsity"] == float(name) and own["config"]["method"] == "nested"
        assert own["weights"]["maskable_kept"] == summary(alone).kept
        tested = [record.get("test_accuracy") for record in own["history"]]
        assert tested[1:] == [record["test_accuracy_levels"][index] for record in result["history"][1:]]
        assert (tested[0] is None) == (index > 0)
        assert TrainConfig.read(out / name / "config.yaml").sparsity == float(name)
    before = (out / "0.9" / "scores.npz").read_bytes()
    assert run(evaluate, [str(out / "0.9")]) == 0
    assert (out / "0.9" / "scores.npz").read_bytes() == before


@pytest.mark.parametrize(("flags", "said"), [
    (["--levels", "0.6"], "Expected --levels to be at least two different numbers in (0, 1). Got 0.6."),
    (["--levels", "0.6", "1.0"], "Got 0.6 1."),
    (["--between", "3"], "Expected --between from 0 to 2"),
    (["--distillation", "1.5"], "Expected --distillation in [0, 1]. Got 1.5."),
    (["--classifier", "none"], "Expected --classifier to be one of own, shared."),
    (["--method", "magnitude"], "Expected --method to be one of nested"),
    (["--block", "512x1"], "Expected block to fit a layer"),
    (["--resume", "nowhere"], "Expected --resume to be the work directory of a run"),
])
def test_errors_before_any_work(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    where = [] if "--resume" in flags else ["--work-dir", str(out), "--sequences", "26", "--base-channels", "8"]
    assert run(multilevel.main, [*flags, *where]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_the_state_of_other_levels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = start(tmp_path, "cut")
    job.trainer.fit(until=3)
    text = (tmp_path / "cut" / "config.yaml").read_text()
    (tmp_path / "cut" / "config.yaml").write_text(text.replace("levels:\n- 0.5\n", "levels:\n"))
    assert run(multilevel.main, ["--resume", str(tmp_path / "cut")]) == 2
    assert "Got another network, or other levels" in capsys.readouterr().err


def test_epochs_and_the_level_of_the_warm_up_follow_the_schedule() -> None:
    assert MultiLevelConfig(schedule="together").resolved("small").epochs == 63
    assert MultiLevelConfig(schedule="together", epochs=70).resolved("small").epochs == 70
    assert MultiLevelConfig(schedule="together", levels=(0.95, 0.7)).sparsity == 0.7
    growing = MultiLevelConfig(levels=(0.95, 0.7)).resolved("small")
    assert (growing.epochs, growing.growth_epochs, growing.sparsity) == (70, 35, 0.95)
