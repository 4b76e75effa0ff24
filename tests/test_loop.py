"""The epoch loop: schedule, history, files, evaluation, learning, and what stops it."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console

from sparse_stgcn import train
from sparse_stgcn.errors import TrainingError, UserError
from sparse_stgcn.scores import accuracy, predict
from sparse_stgcn.sparsity import masked, stage
from sparse_stgcn.training.loop import Trainer, cosine
from sparse_stgcn.training.report import Report, describe_epoch
from sparse_stgcn.training.run import prepare


def trainer(work_dir: Path | None = None, sequences: int = 30, **changed: object) -> Trainer:
    config = tiny.config(**changed)
    train_set, test_set = tiny.datasets(sequences=sequences)
    return Trainer(config, tiny.model(config.sparsity), train_set, test_set, work_dir, quiet(config.epochs))


def quiet(epochs: int) -> Report:
    return Report(epochs, Console(file=io.StringIO(), width=200))


def test_cosine() -> None:
    rates = [cosine(0.1, step, 8) for step in range(9)]
    assert (rates[0], rates[4], rates[8]) == (0.1, pytest.approx(0.05), 0.0)
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_history_and_log(tmp_path: Path) -> None:
    job = trainer(tmp_path)
    history = job.fit()
    assert [r["stage"] for r in history] == ["warm-up", "warm-up", "fine-tune", "fine-tune"]
    assert [r["epoch"] for r in history] == [0, 1, 2, 3]
    assert [len(r["masked_norms"]) for r in history] == [10, 10, 0, 0]
    assert [r["lasso"] > 0 for r in history] == [True, True, False, False]
    assert ["test_accuracy" in r for r in history] == [False, True, False, True]
    assert ["test_accuracy_unmasked" in r for r in history] == [False, True, False, False]
    for record in history:
        assert math.isfinite(record["loss"])
        assert 0 <= record["train_accuracy"] <= 1
        assert record["samples_per_second"] == pytest.approx(len(job.train_set) / record["seconds"])
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history


def test_learning_rate_follows_the_cosine_over_all_steps() -> None:
    job = trainer()
    seen: list[float] = []
    job.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    job.fit()
    assert len(seen) == 4 * 3  # 20 sequences in batches of 8
    assert seen == [cosine(0.1, i, 12) for i in range(12)]


def test_lambda_grows_from_0_over_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    job = trainer()
    seen: list[float] = []
    coefficient = job.method.coefficient
    monkeypatch.setattr(job.method, "coefficient", lambda p: seen.append(coefficient(p)) or seen[-1])
    job.fit()
    assert seen == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6] + 6 * [0])


def test_proximal_steps_bring_the_masked_weights_to_0_and_the_others_learn() -> None:
    job = trainer(sequences=90, epochs=10, warmup_epochs=8, lr=0.02, lasso=20.0, lasso_step="proximal")
    assert sum(job.method.masked_norms()) > 40
    history = job.fit()
    assert sum(history[7]["masked_norms"]) == 0
    assert history[7]["lasso"] >= 0
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.parametrize(("flags", "stages", "penalised", "drained"), [
    ([], ["warm-up", "warm-up", "fine-tune"], [True, True], False),
    (["--lasso", "0"], ["warm-up", "warm-up", "fine-tune"], [False, False], False),
    (["--warmup-epochs", "0"], ["fine-tune"] * 3, [], False),
    (["--lasso-schedule", "constant"], ["warm-up", "warm-up", "fine-tune"], [True, True], False),
    (["--lasso-group", "tensor"], ["warm-up", "warm-up", "fine-tune"], [True, True], False),
    (["--lasso-group", "global"], ["warm-up", "warm-up", "fine-tune"], [True, True], False),
    (["--lasso-step", "proximal", "--lasso", "50"], ["warm-up", "warm-up", "fine-tune"], [True, True], True),
], ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "")
def test_ablations_are_flags_of_train_and_keys_of_its_result(
    tmp_path: Path, flags: list[str], stages: list[str], penalised: list[bool], drained: bool
) -> None:
    file = tiny.write_npz(tmp_path / "tiny.npz")
    basis = ["--data", str(file), "--work-dir", str(tmp_path / "run"), "--base-channels", "8", "--block", "4x1", "--epochs",
             "3", "--warmup-epochs", "2", "--batch-size", "8", "--clip-len", "8", "--eval-clips", "1", "--threads", "1"]
    assert train.main([*basis, *flags]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    history = result["history"]
    assert [record["stage"] for record in history] == stages
    assert [record["lasso"] > 0 for record in history if record["stage"] == "warm-up"] == penalised
    if penalised:
        assert (sum(history[1]["masked_norms"]) == 0) == drained  # the proximal step reaches 0 exactly
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        recorded = result["config"][flag[2:].replace("-", "_")]
        assert recorded == type(recorded)(value)


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_learns(sparsity: float) -> None:
    job = trainer(sequences=90, sparsity=sparsity, epochs=12, warmup_epochs=6 if sparsity else 0, lr=0.02)
    before = accuracy(job.model, job.test_set)
    history = job.fit()
    assert {r["stage"] for r in history} == ({"warm-up", "fine-tune"} if sparsity else {"dense"})
    assert history[-1]["test_accuracy"] > max(0.85, before)
    assert stage(job.model) == ("compact" if sparsity else "dense")


def test_evaluation_in_the_warm_up_masks_and_restores() -> None:
    job = trainer()
    weights = [p.detach().clone() for p in job.model.parameters()]
    result = job._evaluate()
    assert all(torch.equal(a, b) for a, b in zip(weights, job.model.parameters(), strict=True))
    with masked(job.model):
        assert result["test_accuracy"] == accuracy(job.model, job.test_set)
    assert result["test_accuracy_unmasked"] == accuracy(job.model, job.test_set)


def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    file = tiny.write_npz(tmp_path / "tiny.npz")

    def weights(name: str, **changed: int) -> list[torch.Tensor]:
        job = prepare(tiny.config(data=str(file), work_dir=str(tmp_path / name), **changed), quiet(4))
        job.fit()
        return [p.detach() for p in job.model.parameters()]

    first, second, other, worker = weights("a"), weights("b"), weights("c", seed=1), weights("d", workers=1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, worker, strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    job = trainer(tmp_path)
    with torch.no_grad():
        job.model.cls_head.fc_cls.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"finite loss. Got loss nan .* epoch 1, step 1, .* lower --lr"):
        job.fit()
    assert not (tmp_path / "resume.safetensors").exists()


def test_an_unresolved_configuration_is_refused() -> None:
    train_set, test_set = tiny.datasets()
    with pytest.raises(ValueError, match="eval_every=None"):
        Trainer(replace(tiny.config(), eval_every=None), tiny.model(), train_set, test_set)


def test_plain_report_has_one_line_per_epoch() -> None:
    out = io.StringIO()
    train_set, test_set = tiny.datasets()
    Trainer(tiny.config(), tiny.model(0.8), train_set, test_set, None, Report(4, Console(file=out, width=60,
            soft_wrap=True))).fit()
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch")] == [f"epoch {i}/4"
                                                                                   for i in (1, 2, 3, 4)]
    assert len(lines) == 5
    assert "\x1b" not in out.getvalue()
    assert "lasso" in lines[0]
    assert "test" in lines[1]
    assert "5 of" not in lines[0]
    assert lines[2].startswith("fine-tuning:")


def test_terminal_report_shows_a_bar() -> None:
    out = io.StringIO()
    with Report(2, Console(file=out, force_terminal=True, width=140)) as report:
        report.begin(0, "warm-up", 2)
        report.step(loss=1.25, lasso=3.0, accuracy=0.5, speed=40.0)
        report._bar.refresh()
    shown = out.getvalue()
    assert all(text in shown for text in ("epoch 1/2 warm-up", "1/2", "loss 1.250", "lasso 3.00", "acc 50.0%",
                                          "40 seq/s"))


def test_line_of_an_epoch() -> None:
    record = {"epoch": 4, "stage": "warm-up", "loss": 1.5, "lasso": 2.0, "masked_norms": [1.0, 2.0],
              "train_accuracy": 0.25, "test_accuracy": 0.5, "test_accuracy_unmasked": 0.75,
              "samples_per_second": 10.0, "seconds": 2.0}
    assert describe_epoch(record, 10) == (
        "epoch  5/10  warm-up    loss 1.500  lasso 2.00  masked norm 3.00  train 25.0%  test 50.0%  "
        "(all weights 75.0%)  10 seq/s  2.0 s")


def test_scores_average_the_clips_and_do_not_depend_on_the_batch() -> None:
    model, (_, test_set) = tiny.model(), tiny.datasets()
    test_set.num_clips = 3
    model.train()
    scores = predict(model, test_set, test_set.sample_ids, batch_size=7)
    assert model.training
    model.eval()
    for i in (0, 4):
        keypoint, label, _ = test_set[i]
        with torch.no_grad():
            logit = model(keypoint)
        np.testing.assert_allclose(scores.logit[i], logit.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scores.probability[i], logit.softmax(1).mean(0), rtol=1e-5)
        assert scores.label[i] == label
    assert scores.sample.tolist() == test_set.sample_ids.tolist()
    np.testing.assert_allclose(scores.probability, predict(model, test_set, batch_size=1).probability,
                               rtol=1e-5)


def test_finish_writes_everything_and_evaluate_agrees(tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_stgcn import evaluate, load
    from sparse_stgcn.scores import Scores

    file = tiny.write_npz(tmp_path / "tiny.npz")
    job = prepare(tiny.config(data=str(file), work_dir=str(tmp_path / "run")), quiet(4))
    job.fit()
    result = job.finish()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.yaml", "lock.train", "log.jsonl", "model.safetensors", "result.json", "resume.1.safetensors",
        "resume.safetensors", "scores.npz"]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    weights = result["weights"]
    assert weights["maskable_kept"] / weights["maskable"] == pytest.approx(0.2, abs=0.02)
    assert weights["all"] - weights["all_kept"] == weights["maskable"] - weights["maskable_kept"]
    assert set(result["seconds"]) == {"warm-up", "fine-tune", "evaluation", "test"}
    assert result["file"]["bytes"] == (tmp_path / "run" / "model.safetensors").stat().st_size
    assert stage(load(tmp_path / "run" / "model.safetensors")) == "compact"
    trained = Scores.load(tmp_path / "run" / "scores.npz")
    assert trained.metrics() == {k: result["test"][k] for k in ("top1", "top5", "mean_class")}

    assert evaluate.main([str(tmp_path / "run"), "--out", str(tmp_path / "again.npz")]) == 0
    again = Scores.load(tmp_path / "again.npz")
    np.testing.assert_array_equal(again.logit, trained.logit)
    assert again.sample.tolist() == trained.sample.tolist()
    assert again.protocol == trained.protocol
    assert f"top-1 {result['test']['top1']:.2%}" in capsys.readouterr().out


def test_the_command_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_stgcn import train

    argv = ["--base-channels", "8", "--sequences", "34", "--clip-len", "8", "--eval-clips", "2", "--epochs",
            "2",
            "--warmup-epochs", "1", "--lr", "0.02", "--threads", "1", "--work-dir", str(tmp_path / "run")]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    for text in ("the embedded synthetic set (no --data)", "sparsity 0.95, block 8x1",
                 "rate      0.01 = 0.02 x 16 / 32",
                 "1 of them dense warm-up", "epoch 1/2  warm-up", "epoch 2/2  fine-tune", "test      top-1",
                 "(2 clips", "maskable weights", "times smaller", "warm-up ", "fine-tune ", "evaluate"):
        assert text in out
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_evaluate_refuses_other_data(tmp_path: Path) -> None:
    from sparse_stgcn import evaluate

    job = prepare(tiny.config(data=str(tiny.write_npz(tmp_path / "tiny.npz")),
                              work_dir=str(tmp_path / "run")), quiet(4))
    with pytest.raises(UserError, match=r"without model\.safetensors; finish the run with"):
        evaluate.main([str(tmp_path / "run")])
    job.fit()
    job.finish()
    other = tiny.write_npz(tmp_path / "other.npz", label_names=np.array(["a", "b", "c", "d"]))
    with pytest.raises(UserError, match=r"5 joints and 3 classes.* Got 5 joints and 4"):
        evaluate.main([str(tmp_path / "run"), "--data", str(other)])
