"""TrainConfig: flags, YAML, presets and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_stgcn.config import PRESETS, SMALL, WARMUP, TrainConfig, parse
from sparse_stgcn.errors import UserError


def test_defaults_are_the_papers() -> None:
    config = parse([])
    assert (config.backbone, config.sparsity, config.lasso, config.lasso_group) == ("stgcn", 0.95, 1.0,
                                                                                    "block")
    assert (config.lr, config.momentum, config.weight_decay, config.eval_clips) == (0.1, 0.9, 5e-4, 10)


def test_flags() -> None:
    config = parse(["--backbone", "ctrgcn", "--sparsity", "0.8", "--warmup-epochs", "3", "--no-align",
                    "--block", "1x1"])
    assert (config.backbone, config.sparsity, config.warmup_epochs, config.align, config.block) == \
        ("ctrgcn", 0.8, 3, False, "1x1")


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    # 5e-5 is text in YAML 1.1 and 1 an integer: both are meant as numbers. Hyphens are what the flags have.
    file.write_text("weight-decay: 5e-5\nlasso: 1\nepochs: 7\nstream: b\n")
    config = parse(["--config", str(file), "--epochs", "9"])
    assert (config.weight_decay, config.lasso, config.epochs, config.stream) == (5e-5, 1.0, 9, "b")
    assert isinstance(config.lasso, float)
    assert parse([f"--config={file}"]).epochs == 7


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_what_is_open_and_nothing_else(preset: str) -> None:
    full = TrainConfig(clip_len=17).resolved(preset)
    assert full.clip_len == 17
    assert full.epochs == PRESETS[preset]["epochs"]
    assert full.warmup_epochs == round(WARMUP[preset] * full.epochs)
    assert TrainConfig(epochs=1).resolved(preset).warmup_epochs == 0
    assert TrainConfig(epochs=2).resolved(preset).warmup_epochs == 1  # a method of two stages has two
    assert full.learning_rate == pytest.approx(0.1 * full.batch_size / full.lr_reference_batch)
    assert TrainConfig(sparsity=0.0).resolved(preset).warmup_epochs == 0


def test_the_large_preset_is_pyskls_recipe() -> None:
    large = TrainConfig().resolved("large")
    assert (large.epochs, large.batch_size, large.clip_len, large.learning_rate) == (80, 128, 100, 0.1)


def test_written_configuration_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig(sparsity=0.8, seed=3, align=False).resolved("synthetic")
    config.write(tmp_path / "config.yaml")
    assert TrainConfig.read(tmp_path / "config.yaml") == config
    keys = set(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert keys == {f.name for f in fields(TrainConfig)} - {"config", "resume"}


def test_resume_reads_the_run_and_refuses_what_changes_it(tmp_path: Path) -> None:
    TrainConfig(seed=5, work_dir="elsewhere").resolved("synthetic").write(tmp_path / "config.yaml")
    config = parse(["--resume", str(tmp_path), "--threads", "2"])
    assert (config.seed, config.threads, config.work_dir, config.resume) == (5, 2, str(tmp_path),
                                                                             str(tmp_path))
    with pytest.raises(UserError, match=r"other values for --lr, --seed; leave them out"):
        parse(["--resume", str(tmp_path), "--lr", "0.2", "--seed", "1"])
    with pytest.raises(UserError, match="without --config"):
        parse(["--resume", str(tmp_path), "--config", "x.yaml"])
    with pytest.raises(UserError, match=r"no config.yaml"):
        parse(["--resume", str(tmp_path / "none")])


def test_the_command_line_of_an_automatic_run_goes_on_with_it(tmp_path: Path) -> None:
    """As torchrun --max-restarts gives it again: without the density that the run has recorded."""
    argv = ["--sparsity", "auto", "--budget", "20%"]
    recorded = parse(argv).resolved("synthetic")
    recorded.write(tmp_path / "config.yaml")
    again = parse(argv).resuming(tmp_path)
    assert (again.sparsity, again.density, again.trial_epochs) == ("auto", "auto", recorded.trial_epochs)
    for other in (["--sparsity", "0.8"], [*argv, "--density", "erk"], [*argv[:-1], "30%"]):
        with pytest.raises(UserError, match="other values for"):
            parse(other).resuming(tmp_path)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"backbone": "stgnn"}, r"--backbone to be one of .* did you mean stgcn\?"),
    ({"sparsity": 1.0}, r"--sparsity in \[0, 1\).* Got 1\."), ({"sparsity": -0.1}, "--sparsity"),
    ({"sparsity": float("nan")}, "--sparsity"),
    ({"stream": "x"}, "stream"), ({"density": "even"}, "--density"), ({"scope": "net"}, "--scope"),
    ({"method": "best"}, "--method"), ({"missing": "guess"}, "--missing"),
    ({"block": "8by1"}, "--block"), ({"block": "0x1"}, "--block"), ({"block": "8"}, "--block"),
    ({"lasso_schedule": "cubic"}, "--lasso-schedule"), ({"lasso_group": "row"}, "--lasso-group"),
    ({"lasso_step": "leap"}, "--lasso-step"),
    ({"epochs": 0}, "--epochs >= 1"), ({"clip_len": 0}, "--clip-len >= 1"),
    ({"batch_size": 0}, "--batch-size >= 1"),
    ({"num_person": 0}, "--num-person"), ({"eval_clips": 0}, "--eval-clips"), ({"threads": 0}, "--threads"),
    ({"eval_every": 0}, "--eval-every"), ({"sequences": 0}, "--sequences"),
    ({"lr_reference_batch": 0}, "--lr-ref"),
    ({"warmup_epochs": -1}, "--warmup-epochs >= 0"), ({"workers": -1}, "--workers"), ({"seed": -1}, "--seed"),
    ({"epochs": 5, "warmup_epochs": 5}, r"--warmup-epochs below --epochs \(5\)"),
    ({"lr": 0.0}, "--lr"), ({"lr": float("inf")}, "--lr"), ({"momentum": 1.0}, "--momentum"),
    ({"weight_decay": -1.0}, "--weight-decay"), ({"lasso": float("nan")}, "--lasso"),
    ({"rotate": -0.1}, "--rotate"),
    ({"scale": -0.1}, "--scale"), ({"device": "tpu9"}, "--device"), ({"device": "cuda:99"}, "--device cpu"),
    ({"data": "nowhere.npz"}, "--data to be an archive that exists"), ({"fold": 1}, "--fold together with "
                                                                                    "--data"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[f"{k}={v}" for row, _ in BAD for k,
                                                           v in [[*row.items()][-1]]])
def test_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**changed).validate()


def test_sequences_belong_to_the_synthetic_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sequences without --data"):
        TrainConfig(data=str(tmp_path), sequences=100).validate()


def test_a_split_and_a_fold_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--split or --fold.* Got --split train and --fold 0"):
        TrainConfig(data=str(tmp_path), split="train", fold=0).validate()
    TrainConfig(data=str(tmp_path), fold=0).validate()


def test_help_says_what_the_defaults_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{WARMUP['large']} of the epochs; {WARMUP['small']} of them with fewer than {SMALL:,} training sequences" in text
    assert WARMUP["synthetic"] == 1 / 6 and "a sixth on the synthetic set" in text
    assert "or the only one; of several name one" in text


@pytest.mark.parametrize(("text", "message"), [
    ("epoch: 3", "did you mean epochs"), ("epochs: many", "epochs in .* to be int. Got 'many'"),
    ("epochs: 2.5", "to be int"), ("epochs: true", "to be int"), ("align: 1", "to be bool"),
    ("lr: fast", "to be float"),
    ("backbone: null", "to be str"), ("resume: x", "resume"), ("- 1", "'key: value' lines"),
    ("a: [", "to be YAML"),
], ids=["unknown key", "text", "fraction", "truth", "number", "word", "null", "resume", "list", "broken"])
def test_refuses_yaml(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        TrainConfig.read(file)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert TrainConfig.read(tmp_path / "c.yaml") == TrainConfig()


@pytest.mark.parametrize("argv", [["--epochs", "ten"], ["--lrr", "1"], ["--align", "maybe"]],
                         ids=["value", "name", "word"])
def test_a_flag_that_does_not_parse_ends_with_code_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
