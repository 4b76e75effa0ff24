"""The ensemble command, the file of an ensemble, calibration, and the figures."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from sparse_stgcn import Ensemble, checkpoint, compact, ensemble, plots
from sparse_stgcn.errors import run
from sparse_stgcn.metrics import expected_calibration_error
from sparse_stgcn.scores import Scores
from sparse_stgcn.training.run import prepare


def members(*sparsities: float) -> list[torch.nn.Module]:
    return [compact(tiny.model(s, seed)) if s else tiny.model(s, seed) for seed, s in enumerate(sparsities)]


def test_an_ensemble_is_one_file_and_shared_buffers_are_in_it_once(tmp_path):
    networks = members(0.5, 0.9, 0.0)
    together = Ensemble(networks).eval()
    checkpoint.save(together, tmp_path / "e.safetensors", members=["a", "b", "c"])
    assert checkpoint.read_metadata(tmp_path / "e.safetensors")["meta"] == {"members": ["a", "b", "c"]}
    back = checkpoint.load(tmp_path / "e.safetensors")
    x = torch.randn(2, 1, 8, 5, 3)
    with torch.inference_mode():
        assert torch.equal(back(x), together(x))
    tensors, description = checkpoint.read_tensors(tmp_path / "e.safetensors")
    assert len(description["same_as"]) > 0 and not set(description["same_as"]) & set(tensors)
    for member, network in zip(back.members, networks, strict=True):
        assert {k: v.shape for k, v in member.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    apart = [tensor for network in networks for tensor in checkpoint.pack(network)[0].values()]
    assert sum(t.nbytes for t in tensors.values()) < sum(t.nbytes for t in apart)


def test_calibration_error_is_the_gap_of_each_bin_weighted_with_its_samples():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(4, 0.4), 300)
    label = rng.integers(0, 4, 300)
    confidence, right = p.max(1), p.argmax(1) == label
    expected = 0.0
    for low in range(10):
        inside = (confidence > low / 10) & (confidence <= (low + 1) / 10)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(p, label, bins=10) == pytest.approx(expected, abs=1e-12)
    sure = np.eye(4)[label]
    assert expected_calibration_error(sure, label) == 0
    assert expected_calibration_error(sure, (label + 1) % 4) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    data = tiny.write_npz(folder / "tiny.npz")
    for name, changed in {"low": {"sparsity": 0.5}, "high": {"sparsity": 0.8, "seed": 1}, "bones": {"stream": "b"}}.items():
        job = prepare(tiny.config(data=str(data), work_dir=str(folder / name), epochs=2, warmup_epochs=1, **changed))
        job.fit()
        job.finish()
    return folder


def test_the_command_tests_the_members_as_one(trained, capsys):
    out = trained / "both"
    assert run(ensemble.main, [str(trained / "low"), str(trained / "high"), "--out", str(out), "--figure"]) == 0
    scores = Scores.load(out / "scores.npz")
    own = [Scores.load(trained / name / "scores.npz") for name in ("low", "high")]
    np.testing.assert_allclose(scores.probability, (own[0].probability + own[1].probability) / 2, atol=1e-6)
    result = json.loads((out / "result.json").read_text())
    kept = [json.loads((trained / name / "result.json").read_text())["weights"] for name in ("low", "high")]
    for key in ("maskable", "all"):
        assert result["weights"][f"{key}_kept_fraction"] == pytest.approx(sum(k[f"{key}_kept_fraction"] for k in kept))
    assert [m["name"] for m in result["members"]] == ["0.5", "0.8"]
    back = checkpoint.load(out / "ensemble.safetensors")
    assert isinstance(back, Ensemble) and len(back.members) == 2
    assert (out / "confidence.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"{result['weights']['maskable_kept_fraction']:.2f} of one network's" in said


def test_results_of_a_run_are_not_replaced(trained, capsys):
    low, high = str(trained / "low"), str(trained / "high")
    before = (trained / "high" / "result.json").read_bytes()
    assert run(ensemble.main, [low, high, "--out", high]) == 2
    assert "which holds a run whose results it would replace" in capsys.readouterr().err
    assert (trained / "high" / "result.json").read_bytes() == before


def test_members_of_other_input_are_refused(trained, capsys):
    assert run(ensemble.main, [str(trained / "low"), str(trained / "bones")]) == 2
    assert "Got stream j in" in capsys.readouterr().err
    assert run(ensemble.main, [str(trained / "low")]) == 2
    assert not (trained / "low-ensemble").exists()


# ---- figures ---------------------------------------------------------------------------------------------------

def test_lines_show_mean_and_deviation():
    figure = plots.lines({"a": {0.6: [0.5, 0.7], 0.99: [0.4]}}, "sparsity", dense=[0.8])
    line = figure.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([60, 40])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0.6", "0.99"]
    bars = figure.axes[0].collections[0].get_segments()
    assert bars[0][:, 1] == pytest.approx([60 - 200 ** 0.5, 60 + 200 ** 0.5])


def test_curves_are_means_of_the_epochs_that_were_tested():
    history = {"stage": ["warm-up", "warm-up", "fine-tune"], "loss": [3, 2, 1], "test_accuracy": [None, 0.5, 0.7],
               "masked_norm": [2, 1, 0]}
    figure = plots.curves({"a": [history, {**history, "test_accuracy": [None, 0.7, 0.9]}]})
    assert [axes.lines[0].get_xdata().tolist() for axes in figure.axes] == [[1, 2, 3], [2, 3], [1, 2]]
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx([60, 80])


def test_violins_show_all_samples_and_those_under_a_half():
    figure = plots.violins({"a": [0.1, 0.4, 0.9, 0.95], "b": [0.9, 0.8]})
    whole, under = figure.axes
    medians = [c.get_segments() for c in whole.collections if hasattr(c, "get_segments") and len(c.get_segments()) == 1]
    assert any(np.isclose(s[0][0, 1], 0.65) for s in medians)
    assert under.get_ylim() == (0, 0.5) and [t.get_text() for t in under.get_xticklabels()] == ["a", "b"]
    assert all(c.get_paths()[0].vertices[:, 1].max() < 0.5 for c in under.collections)
