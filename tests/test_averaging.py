"""The mean of several networks' weights, and levels trained together against levels trained apart."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from sparse_stgcn import checkpoint, compact, comparison, ensemble
from sparse_stgcn.averaging import average
from sparse_stgcn.config import TrainConfig
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.multilevel import MultiLevelConfig
from sparse_stgcn.scores import predict
from sparse_stgcn.sparsity import maskable_convs, stage
from sparse_stgcn.training import multilevel_run
from sparse_stgcn.training import run as training

LEVELS = (0.5, 0.8)


def test_weights_are_the_mean_over_the_union_of_the_masks() -> None:
    models = [compact(tiny.model(sparsity, seed)) for seed, sparsity in enumerate((0.5, 0.8, 0.9))]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    mean = average(models)
    convs = [maskable_convs(model) for model in models]
    for name, conv in maskable_convs(mean).items():
        own = [c[name] for c in convs]
        assert torch.equal(conv.pattern.mask(), torch.stack([c.pattern.mask() for c in own]).any(0))
        torch.testing.assert_close(conv.weight_oik(), sum(c.weight_oik() for c in own) / 3, rtol=1e-6, atol=1e-8)
    head = torch.stack([model.cls_head.fc_cls.weight for model in models]).mean(0)
    torch.testing.assert_close(mean.cls_head.fc_cls.weight, head)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert stage(average([models[0], tiny.model()])) == "dense"


def test_masked_weights_of_a_warm_up_count_as_zero() -> None:
    warm, finished = tiny.model(0.5, 0), compact(tiny.model(0.5, 1))
    want = average([compact(copy.deepcopy(warm)), finished])
    found = average([warm, finished])
    assert stage(warm) == "warmup"
    assert all(torch.equal(value, want.state_dict()[key]) for key, value in found.state_dict().items())


def test_the_mean_of_equal_networks_is_that_network() -> None:
    model, x = compact(tiny.model(0.8)).eval(), torch.randn(2, 1, 8, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(average([model, copy.deepcopy(model)])(x), model(x))


def test_networks_that_do_not_correspond_are_refused() -> None:
    with pytest.raises(ValueError, match="of one architecture"):
        average([tiny.model(), tiny.model(graph="random")])
    with pytest.raises(ValueError, match=r"the same block. Got 4x1, 2x2 in backbone"):
        average([compact(tiny.model(0.8)), compact(tiny.model(0.8, block=(2, 2)))])
    with pytest.raises(ValueError, match="at least one model"):
        average([])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    data = str(tiny.write_npz(folder / "tiny.npz"))
    shared = {"data": data, "method": "nested", "epochs": 2, "warmup_epochs": 1}
    for level in LEVELS:
        job = training.prepare(tiny.config(**shared, sparsity=level, work_dir=str(folder / f"{level:g}")))
        job.fit()
        job.finish()
    config = {**vars(tiny.config(**shared)), "levels": LEVELS, "between": 0, "work_dir": str(folder / "nested")}
    together = multilevel_run.prepare(MultiLevelConfig(**config))
    together.fit()
    together.finish()
    return folder


def test_the_command_compares_the_three_ways(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folders = trained / "compared", [str(trained / f"{level:g}") for level in LEVELS]
    assert run(ensemble.main, [*folders, "--average", "--nested", str(trained / "nested"), "--out", str(out)]) == 0
    result, nested = json.loads((out / "result.json").read_text()), json.loads((trained / "nested/result.json").read_text())
    single = [json.loads((Path(folder) / "result.json").read_text()) for folder in folders]
    together, apart, mean = result["comparison"]
    assert together["top1"] == nested["test"]["top1"] and apart["top1"] == result["test"]["top1"]
    assert apart["levels"] == {f"{level:g}": run["test"]["top1"] for level, run in zip(LEVELS, single, strict=True)}
    assert apart["seconds"] == pytest.approx(sum(run["seconds"][s] for run in single for s in ("warm-up", "fine-tune")))
    kept = single[0]["weights"]["maskable_kept_fraction"]
    assert together["maskable_kept_fraction"] == mean["maskable_kept_fraction"] == kept < apart["maskable_kept_fraction"]
    assert together["bytes"] == (trained / "nested/ensemble.safetensors").stat().st_size < apart["bytes"]
    text = (out / "comparison.md").read_text()
    assert text.count("\n|") == 4 and f"{100 * (together['top1'] - apart['top1']):+.2f}" in text
    assert "points: ensemble" in capsys.readouterr().out

    network = average([checkpoint.load(Path(folder) / "model.safetensors") for folder in folders])
    config = tiny.config(data=str(trained / "tiny.npz"))
    archive = training.open_archive(config)
    config = training.resolve(config, archive)
    train_set = training.dataset(config, archive, "train", train=True)
    update_bn(DataLoader(train_set, 8, sampler=train_set.order().tolist()), network)
    expected = predict(network, training.test_set(config, archive)).metrics()
    assert mean["top1"] == result["average"]["test"]["top1"] == expected["top1"]
    saved, x = checkpoint.load(out / "average.safetensors"), torch.randn(2, 1, 8, 5, 3)
    with torch.no_grad():
        assert torch.equal(saved(x), network.eval()(x))


def test_what_cannot_be_compared_is_refused_before_any_work(trained: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    folders, out = [str(trained / f"{level:g}") for level in LEVELS], tmp_path / "out"
    for nested, change, said in (("nowhere", None, "without result.json"),
                                 (tmp_path, {"levels": [0.5, 0.9]}, "with 0.5 0.9."),
                                 (tmp_path, {"clip_len": 16}, "Got clip_len 16")):
        if change is not None:
            result = json.loads((trained / "nested/result.json").read_text())
            (tmp_path / "result.json").write_text(json.dumps({**result, "config": {**result["config"], **change}}))
        assert run(ensemble.main, [*folders, "--nested", str(nested), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()


def test_members_without_a_mean_are_refused_before_any_work(trained: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    wide = training.prepare(tiny.config(data=str(trained / "tiny.npz"), base_channels=16, epochs=2, warmup_epochs=1,
                                        work_dir=str(tmp_path / "wide")))
    wide.fit()
    wide.finish()
    folders = [str(trained / "0.5"), str(tmp_path / "wide")]
    assert run(ensemble.main, [*folders, "--average", "--out", str(tmp_path / "out")]) == 2
    assert "Expected models of one architecture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_automatic_level_is_no_level_of_a_nested_run(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"config": {"levels": [0.5, 0.8]}}))
    configs = [TrainConfig(sparsity=0.8), TrainConfig(sparsity="auto", budget="5%")]
    with pytest.raises(UserError, match=r"of the work directories, 0\.8 auto\. Got .* with 0\.5 0\.8\."):
        comparison.read_nested(str(tmp_path), configs)


def test_points_and_the_winner() -> None:
    row = lambda way, top1, level, seconds: {"way": way, "top1": top1, "levels": {"0.6": level}, "seconds": seconds}
    found = [row("a", 0.9, 0.8, 6.0), row("b", 0.91, 0.78, 10.0), row("c", 0.92, 0.1, 10.0)]
    said = "\n".join(comparison.lines(found))
    assert "ensemble -1.00, 0.6 +2.00" in said and "training time 0.60" in said and "best      c, 92.00%" in said
    assert comparison.lines([]) == []
