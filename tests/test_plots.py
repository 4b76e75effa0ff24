"""Figures show the numbers that they were given, clips what was measured, and the command says what it cannot draw."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
from PIL import Image

from sparse_stgcn import checkpoint, plot, plots
from sparse_stgcn.data.clip import Clip, turn
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.plots import Point
from sparse_stgcn.plots.clips import sides
from sparse_stgcn.scores import Scores
from sparse_stgcn.skeleton import Skeleton
from sparse_stgcn.sparsity import maskable_convs, summary
from sparse_stgcn.sweeps import tradeoff

NTU = Skeleton.load("nturgb+d")


def standing(frames: int = 6, turned: float = 0.0) -> np.ndarray:
    """(T, 1, V, 3), y up: an NTU body that faces +z, its right at -x, moving 1 cm a frame to +x, turned about y."""
    pose = np.zeros((25, 3), np.float32)
    pose[:, 1] = np.linspace(0.2, 1.7, 25)
    pose[0, 1], pose[1, 1], pose[20, 1], pose[3, 1] = 1.0, 1.2, 1.4, 1.7
    for left, right in NTU.pairs:
        pose[left, 0], pose[right, 0] = 0.2, -0.2
        pose[right, 1] = pose[left, 1]
    clip = np.repeat(pose[None, None], frames, 0)
    clip[..., 0] += 0.01 * np.arange(frames)[:, None, None]
    return turn(clip, turned, 0.0).astype(np.float32)


# ---- clips ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("up", ["y", "-y", "z", "-z"])
def test_every_clip_stands_upright(up):
    clip = standing()
    to = {"y": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "-y": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
          "z": [[1, 0, 0], [0, 0, -1], [0, 1, 0]], "-z": [[1, 0, 0], [0, 0, 1], [0, -1, 0]]}[up]
    assert np.linalg.det(to) == 1
    given = clip @ np.array(to, np.float32).T
    np.testing.assert_allclose(Clip.of(given, NTU, up=up).keypoint, clip, atol=1e-6)
    np.testing.assert_allclose(Clip.of(given, NTU).keypoint, clip, atol=1e-6)  # found from the spine


@pytest.mark.parametrize("turned", [-2.5, 0.0, 0.7, math.pi])
def test_facing_turns_the_first_person_to_the_viewer(turned):
    clip = Clip.of(standing(turned=turned), NTU)
    np.testing.assert_allclose(turn(clip.keypoint, clip.facing, 0), standing(), atol=1e-5)


def test_turning_about_the_vertical_then_tilting():
    np.testing.assert_allclose(turn(np.array([0.0, 0, 1]), math.pi / 2, 0), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(turn(np.array([0.0, 0, -1]), 0, math.pi / 6), [0, 0.5, -math.sqrt(3) / 2], atol=1e-12)


def test_what_was_not_measured_is_lost():
    keypoint = np.ones((4, 2, 5, 3), np.float32)
    keypoint[:, :, 0] = 0       # the root: the data are centred on it
    keypoint[1, 0, 3] = 0       # a lost joint
    keypoint[2, 0, 4, 1] = np.nan
    keypoint[3, 1] = 0          # an absent person
    lost = np.isnan(Clip.of(keypoint, tiny.SKELETON).keypoint).all(-1)
    wanted = np.zeros((4, 2, 5), bool)
    wanted[1, 0, 3] = wanted[2, 0, 4] = wanted[3, 1] = True
    np.testing.assert_array_equal(lost, wanted)
    score = np.ones((4, 2, 5))
    score[0, 0, 2] = 0
    assert np.isnan(Clip.of(keypoint[..., :2], tiny.SKELETON, score=score).keypoint[0, 0, 2]).all()
    with pytest.raises(UserError, match="a joint was seen"):
        Clip.of(np.zeros((2, 1, 5, 3)), tiny.SKELETON)
    with pytest.raises(UserError, match="V = 5 joints"):
        Clip.of(np.ones((2, 1, 4, 3)), tiny.SKELETON)


def test_a_strip_shows_the_bones_of_equally_spaced_frames():
    keypoint = standing(frames=9)
    keypoint[4, 0, 5] = np.nan  # the left elbow: the bones on both of its sides are gone
    clip = Clip.of(keypoint, NTU, fps=2.0)
    figure = plots.strip(clip, panels=3, yaw=0, pitch=0)
    assert [axes.get_xlabel() for axes in figure.axes] == ["0.00 s", "2.00 s", "4.00 s"]
    for axes, frame in zip(figure.axes, (0, 4, 8), strict=True):
        bones = axes.lines[:24]
        for line, (child, parent) in zip(bones, NTU.edges, strict=True):
            np.testing.assert_allclose(line.get_xydata(), keypoint[frame, 0, [child, parent], :2], atol=1e-6)
        drawn = [np.isfinite(line.get_xydata()).all() for line in bones]
        assert drawn.count(False) == (2 if frame == 4 else 0)
    colours = {line.get_color() for line in figure.axes[0].lines[:24]}
    assert len(colours) == 3 and sides(NTU)[4] == "left" and sides(NTU)[8] == "right" and sides(NTU)[3] == "middle"


def test_a_gif_has_the_frames_and_the_speed_of_the_clip(tmp_path):
    clip = Clip.of(standing(frames=11), NTU, fps=30.0)
    assert plots.animate(clip, tmp_path / "a.gif", fps=10) == 4
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 4 and image.info["duration"] == 100 and image.info["loop"] == 0
    with pytest.raises(ValueError, match="fps > 0"):
        plots.animate(clip, tmp_path / "b.gif", fps=0)


# ---- figures ------------------------------------------------------------------------------------------------------

def test_confusion_shows_percent_of_the_true_class():
    figure = plots.confusion(np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]]), ("a", "b", "c"))
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown[:2], [[75, 25, 0], [0, 50, 50]])
    assert np.ma.getmaskarray(shown)[2].all() or np.isnan(shown[2]).all()
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "50", "50"]


def test_of_many_classes_those_with_the_most_errors_are_shown():
    counts = np.diag([9, 8, 7, 6])
    counts[2, 0], counts[1, 3] = 3, 2
    figure = plots.confusion(counts, tuple("abcd"), limit=2)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[80, 0, 20], [0, 70, 30]])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["b", "c"]
    with pytest.raises(ValueError, match="a row and a column per name"):
        plots.confusion(counts, tuple("abc"))


def test_densities_and_maps_are_those_of_the_patterns():
    model = tiny.model(0.8)
    layers = summary(model).layers
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in plots.densities(model).axes[0].collections])
    drawn = drawn[np.argsort(drawn[:, 0])]
    np.testing.assert_allclose(drawn, [(i, 100 * layer.kept / layer.total) for i, layer in enumerate(layers)])

    figure = plots.maps(model, "*gcn.4.*")
    chosen = {name: conv for name, conv in maskable_convs(model).items() if ".gcn.4." in name}
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title().split("\n")[0] for axes in shown] == [name.removeprefix("backbone.") for name in chosen]
    for axes, conv in zip(shown, chosen.values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), conv.pattern.mask().sum(2))
    assert len([axes for axes in plots.maps(model, limit=3).axes if axes.images]) == 3
    with pytest.raises(ValueError, match="a dense network"):
        plots.maps(tiny.model())


def test_the_front_is_what_no_other_beats_in_both():
    points = [Point("g", name, cost, accuracy) for name, cost, accuracy in
              [("a", 1, 0.5), ("b", 2, 0.4), ("c", 3, 0.7), ("d", 3, 0.6), ("e", 4, 0.7), ("f", 5, 0.9)]]
    assert [point.name for point in plots.front(points)] == ["a", "c", "f"]
    axes = plots.pareto(points, "bytes").axes[0]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [(p.cost, 100 * p.accuracy) for p in points])
    step = next(line for line in axes.lines if line.get_label() == "no other is better in both")
    np.testing.assert_allclose(step.get_xydata(), [(1, 50), (3, 70), (5, 90)])
    with pytest.raises(ValueError, match="cost above 0"):
        plots.pareto([Point("g", "a", 0, 0.5)], "bytes")


def test_names_are_text_and_not_formulas(tmp_path):
    plots.save(plots.confusion(np.eye(2, dtype=int), ("$5 & <b>", r"$\frac{$")), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "$5 &amp; &lt;b&gt;" in text and r"$\frac{$" in text
    first = (tmp_path / "a.svg").read_bytes()
    plots.save(plots.confusion(np.eye(2, dtype=int), ("$5 & <b>", r"$\frac{$")), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == first  # depends on what is drawn alone


def test_names_may_have_characters_that_no_file_can_hold(tmp_path):
    """A control character, half of a surrogate pair and a noncharacter: an SVG with one of them is no XML."""
    odd = "a\x08b\x1b\ud800\uffff\x85é"
    history = {"stage": ["warm-up"], "loss": [1], "test_accuracy": [0.5], "masked_norm": [2]}
    clip = Clip.of(standing(), NTU, name=odd, label=odd)
    for figure in (plots.confusion(np.eye(2, dtype=int), (odd, "two")), plots.strip(clip, panels=1),
                   plots.curves({odd: [history]}), plots.lines({odd: {0.6: [0.5]}}, "sparsity", title=odd),
                   plots.violins({odd: [0.1, 0.4]}), plots.pareto([Point(odd, odd, 1, 0.5)], odd)):
        plots.save(figure, tmp_path / "a.svg")
        drawn = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
        assert "a\N{REPLACEMENT CHARACTER}b" + 4 * "\N{REPLACEMENT CHARACTER}" + "é" in drawn


# ---- what accuracy costs --------------------------------------------------------------------------------------------

def entry(sparsity, top1, size, **config):
    return {"config": {"backbone": "stgcn", "sparsity": sparsity, "block": "8x1", "density": "uniform", "seed": 0, **config},
            "test": {"top1": top1}, "bytes": size}


def row(name, sparsity, seconds, batch=1, **changed):
    return {"what": "inference", "subject": "stgcn", "name": name, "batch": batch, "threads": 2, "sparsity": sparsity,
            "block": "8x1", "density": "uniform", "seconds": seconds, **changed}


ENTRIES = [entry(0.95, 0.8, 4000), entry(0.95, 0.9, 4000, seed=1), entry(0.0, 0.86, 40000), entry("ensemble", 0.95, 9000)]
BENCH = {"config": {"persons": 2, "frames": 100}, "environment": {"processor": "P"}, "scaling": [],
         "rows": [row("ONNX Runtime", None, 0.06), row("torch", None, 0.08), row("sparse_stgcn", 0.95, 0.01),
                  row("sparse_stgcn", 0.95, 0.02, block="1x1"), row("sparse_stgcn", 0.95, 0.04, batch=8)]}


def test_points_are_means_over_the_seeds():
    points = tradeoff.points(ENTRIES, tradeoff.size)
    assert {p.group for p in points} == {"stgcn"}
    assert [(p.name, p.cost) for p in points] == [("0.95", 4), ("dense", 40), ("ensemble", 9)]
    assert points[0].accuracy == pytest.approx(0.85) and points[0].deviation == pytest.approx(math.sqrt(0.005))
    mixed = tradeoff.points([*ENTRIES, entry(0.95, 0.7, 3000, block="1x1")], tradeoff.size)
    assert [p.group for p in mixed] == ["stgcn, 8x1", "stgcn", "stgcn, 8x1", "stgcn, 1x1"]


def test_runs_without_warm_up_are_networks_of_their_own(tmp_path):
    """Warm-up epochs as the entries of a sweep have them: 0 of a dense run, None of an ensemble whose members differ in it."""
    plain = [entry(0.95, 0.9, 4000, warmup_epochs=6), entry(0.95, 0.8, 4000, warmup_epochs=6, seed=1),
             entry(0.0, 0.86, 40000, warmup_epochs=0),
             {**entry("ensemble", 0.95, 9000, warmup_epochs=None), "members": ["a", "b"]}]
    assert tradeoff.names(plain) == [("stgcn", "0.95"), ("stgcn", "0.95"), ("stgcn", "dense"), ("stgcn", "ensemble")]
    former = {**entry(0.95, 0.1, 4000, warmup_epochs=6), "former": True}
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "grid": "g", "entries": [
        *plain, entry(0.95, 0.5, 4000, warmup_epochs=0), former]}))
    points = tradeoff.points(tradeoff.read_results([tmp_path / "sweep.json"]).entries, tradeoff.size)
    assert [(p.group, p.name, round(p.accuracy, 4)) for p in points] == [
        ("stgcn, 6", "0.95", 0.85), ("stgcn", "dense", 0.86), ("stgcn", "ensemble", 0.95), ("stgcn, 0", "0.95", 0.5)]


@pytest.mark.parametrize(("part", "change", "said"), [
    ("config", {"frames": 64}, "frames 100 in .* and 64 in"), ("config", {"persons": 1}, "persons 2 in .* and 1 in"),
    ("environment", {"processor": "Q"}, "processor P in .* and Q in")])
def test_latencies_of_two_machines_or_inputs_are_not_mixed(tmp_path, part, change, said):
    (tmp_path / "a.json").write_text(json.dumps(BENCH))
    (tmp_path / "b.json").write_text(json.dumps(BENCH))
    (tmp_path / "other.json").write_text(json.dumps({**BENCH, part: {**BENCH[part], **change}}))
    both = tradeoff.read_results([tmp_path / "a.json", tmp_path / "b.json"])
    assert len(both.rows) == 2 * len(BENCH["rows"])
    with pytest.raises(UserError, match=said):
        tradeoff.read_results([tmp_path / "a.json", tmp_path / "other.json"])


def test_a_combination_of_seeds_or_streams_is_a_network_of_its_own(tmp_path):
    fused = {**entry(0.95, 1.0, 8000, seed="all"), "members": ["a", "b"]}
    found = tradeoff.points([*ENTRIES[:2], fused], tradeoff.size)
    assert [(point.accuracy, point.cost) for point in found] == [(pytest.approx(0.85), 4.0), (1.0, 8.0)]
    (tmp_path / "b.json").write_text(json.dumps(BENCH))
    cost, _ = tradeoff.latency(tradeoff.read_results([tmp_path / "b.json"]))
    assert cost(ENTRIES[0]) == 10 and cost(fused) is None, "the time of one network is not that of two"


def test_latency_is_that_of_the_same_network(tmp_path):
    for name, content in (("sweep.json", {"format": 1, "grid": "g", "entries": ENTRIES}), ("bench.json", BENCH)):
        (tmp_path / name).write_text(json.dumps(content))
    results = tradeoff.read_results([tmp_path / "sweep.json", tmp_path / "bench.json"])
    cost, label = tradeoff.latency(results)
    assert [cost(e) for e in results.entries] == [10, 10, 60, None]
    assert tradeoff.latency(results, 8)[0](ENTRIES[0]) == 5
    assert "2 x 100 frames; batch 1, 2 threads, P" in label
    with pytest.raises(UserError, match="batch sizes, 1, 8"):
        tradeoff.latency(results, 2)


# ---- the command -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive, arrays, a work directory and results, as the other commands leave them."""
    path = tmp_path_factory.mktemp("plot")
    tiny.write_npz(path / "a.npz", sample=np.array([f"s{i}" for i in range(30)]))
    np.save(path / "a.npy", standing())
    (path / "a.json").write_text(json.dumps(standing()[:, 0].tolist()))
    (path / "several.npy").write_bytes((path / "a.npz").read_bytes())
    (path / "run").mkdir()
    checkpoint.save(tiny.model(0.8), path / "run" / "model.safetensors", label_names=["one", "two", "three"])
    probability = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    Scores(np.array(list("abcd")), np.array([0, 1, 2, 2]), probability, probability).save(path / "run" / "scores.npz")
    records = [{"epoch": i, "stage": "warm-up", "loss": 2.0 - i, "lasso": 0.0, "masked_norms": [1.0], "train_accuracy": 0.5,
                "test_accuracy": 0.5} for i in range(2)]
    (path / "run" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "sweep.json").write_text(json.dumps({"format": 1, "grid": "g", "entries": ENTRIES}))
    (path / "bench.json").write_text(json.dumps(BENCH))
    return path


@pytest.mark.parametrize(("arguments", "said"), [
    ("skeleton a.npz --sample s7 --out a.png", r"[678] of \d+ frames of s7 \(two\)"),
    ("skeleton a.npy --out a.gif", "3 of 6 frames of a"),
    ("skeleton a.json --layout nturgb+d --out a.svg", "6 of 6 frames of a"),
    ("confusion run --out c.svg", "4 samples of 3 classes, 75.00% of them right"),
    ("densities run --out d.pdf", "maskable weights kept"),
    ("masks run --layers *gcn.0* --out m.png", "sparse layers of run"),
    ("curves run --out u.png", "run: 2 epochs"),
    ("pareto sweep.json --out p.png", "3 networks from 4 runs, 2 on the front"),
    ("pareto sweep.json bench.json --out p.png", "2 networks from 3 runs, 2 on the front; left out for want of a timing: 1"),
])
def test_each_kind_writes_its_figure(folder, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(folder)
    *rest, out = arguments.split()
    assert run(plot.main, [*rest, str(tmp_path / out)]) == 0
    assert re.search(said, capsys.readouterr().out)
    begin = {".png": b"\x89PNG", ".gif": b"GIF89a", ".svg": b"<?xml", ".pdf": b"%PDF"}[(tmp_path / out).suffix]
    assert (tmp_path / out).read_bytes().startswith(begin)
    if out == "c.svg":
        assert ">three<" in (tmp_path / out).read_text()


@pytest.mark.parametrize(("arguments", "said"), [
    ("skeleton a.npz --out a.mp4", "--out to end in .gif"),
    ("skeleton a.npz --out none/a.gif", "create none"),
    ("skeleton a.npz --sample s99", "--sample to be the id of a sequence of a.npz or a number below 30. Got 's99'"),
    ("skeleton a.npy --layout coco", "17 joints, as layout 'coco' has. Got 25"),
    ("skeleton a.npy --order TVC", "axes T V C"),
    ("skeleton a.npy --order TVQ", "order to name the axes"),
    ("skeleton several.npy", "to be one array"),
    ("skeleton a.npy --up x", "up to be one of y, -y, z, -z"),
    ("skeleton run/log.jsonl", "formats"),
    ("confusion run --limit 1", "limit >= 2"),
    ("confusion a.npz", "a score file"),
    ("confusion nope", r"or a score file\. Got nope, which does not exist\.\n"),
    ("confusion bench.json", r"[^.]\.\n$"),
    ("confusion run --label-names bench.json", "3 label names"),
    ("masks run --layers fc", "to match sparse layers, such as backbone.gcn.0"),
    ("densities none", "Expected a checkpoint, or a work directory"),
    ("curves none", "none/?.* to hold the history"),
    ("curves run run", "each run once"),
    ("curves", "at least one SOURCE"),
    ("pareto bench.json", "hold the accuracy"),
    ("pareto run/log.jsonl", "to hold results"),
    ("pareto sweep.json --cost money", "--cost to be one of"),
    ("pareto sweep.json bench.json --batch 3", "batch sizes, 1, 8"),
])
def test_what_cannot_be_drawn_is_said_and_nothing_written(folder, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert run(plot.main, arguments.split()) == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before
