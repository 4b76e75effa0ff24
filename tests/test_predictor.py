"""Predictor and the predict command: what evaluate says about a sequence, from an array alone."""
from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import sparse_stgcn
from sparse_stgcn import Archive, Predictor, checkpoint, ensemble, evaluate, predict
from sparse_stgcn.data import SkeletonDataset
from sparse_stgcn.data.joints import joint_order
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.inputs import InputFormat
from sparse_stgcn.kernels.dispatch import gpu_at
from sparse_stgcn.predictor import Prediction
from sparse_stgcn.scores import Scores
from sparse_stgcn.skeleton import Skeleton
from sparse_stgcn.streaming.predictor import StreamPredictor
from sparse_stgcn.streaming.rolling import RollingPredictor
from sparse_stgcn.training.run import prepare

# float32 sums of the fused runtime and of the kernels that evaluate uses, in different orders, behind a softmax.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two finished runs on bones of two persons, and their scores by evaluate."""
    folder = tmp_path_factory.mktemp("predict")
    content = tiny.arrays(persons=2)
    content["keypoint"][::5, 1] = 0
    content["keypoint"][3::7, 0, 2] = 0
    data = tiny.write_npz(folder / "tiny.npz", **content, fps=np.array(25.0))
    for name, sparsity in (("low", 0.5), ("high", 0.8)):
        job = prepare(tiny.config(data=str(data), work_dir=str(folder / name), epochs=2, warmup_epochs=1, stream="b",
                                  eval_clips=3, sparsity=sparsity))
        job.fit()
        job.finish()
    assert run(evaluate.main, [str(folder / "low")]) == 0
    return folder


@pytest.fixture(scope="module")
def archive(trained) -> Archive:
    return Archive.open(trained / "tiny.npz").with_split()


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    return Predictor.load(trained / "low")


def sequences(archive: Archive) -> list[np.ndarray]:
    return [archive.read(int(i))[0] for i in archive.members("test")]


def test_the_input_of_the_network_is_that_of_evaluate_to_the_bit(archive, predictor):
    preparation = predictor.inputs.preparation
    dataset = SkeletonDataset(archive, "test", "b", clip_len=8, num_clips=3, train=False)
    for index, keypoint in enumerate(sequences(archive)):
        features = predictor.inputs.features(keypoint)
        made = preparation.clips(features, preparation.test_frames(features.shape[1]))
        assert np.array_equal(made, dataset[index][0].numpy())


def test_the_answers_are_those_of_evaluate(trained, archive, predictor):
    scores = Scores.load(trained / "low" / "scores.npz")
    arrays = sequences(archive)
    one_by_one = np.stack([predictor(x).probability for x in arrays])
    np.testing.assert_allclose(one_by_one, scores.probability, rtol=0, atol=TOLERANCE)
    together = np.stack([p.probability for p in predictor.batch(arrays)])
    assert np.array_equal(together, one_by_one)
    assert predictor(arrays[0]).name == ("one", "two", "three")[scores.probability[0].argmax()]


def test_an_ensemble_answers_as_the_ensemble_command(trained, archive):
    assert run(ensemble.main, [str(trained / "low"), str(trained / "high"), "--out", str(trained / "both")]) == 0
    predictor, scores = Predictor.load(trained / "both"), Scores.load(trained / "both" / "scores.npz")
    answers = np.stack([p.probability for p in predictor.batch(sequences(archive))])
    np.testing.assert_allclose(answers, scores.probability, rtol=0, atol=TOLERANCE)


def test_a_clip_of_its_own_length_runs_once(archive, predictor, monkeypatch):
    x, passes = np.concatenate(sequences(archive)[:2], axis=1)[:, :8], []
    network = predictor._network
    monkeypatch.setattr(predictor, "_network", lambda clips: passes.append(len(clips)) or network(clips))
    answer = predictor(x)
    assert passes == [1] and answer.probability.sum() == pytest.approx(1)


# ---- arrays -----------------------------------------------------------------------------------------------------

def test_persons_frames_and_types(archive, predictor):
    x = sequences(archive)[1]
    one = x[:1]
    assert np.array_equal(predictor(one[0]).probability, predictor(one).probability)
    padded = np.concatenate([one, np.zeros_like(one), np.full_like(one, np.nan)])
    assert np.array_equal(predictor(padded).probability, predictor(one).probability)
    assert np.array_equal(predictor(padded[[2, 1, 0]]).probability, predictor(one).probability)
    assert np.array_equal(predictor(x.tolist()).probability, predictor(x.astype(float)).probability)
    assert predictor(x[:, :1]).probability.shape == (3,)


def test_of_more_persons_than_the_training_had_those_seen_most_stay(archive, predictor):
    x = sequences(archive)[1].copy()
    ghosts = np.ones_like(x)
    ghosts[:, 2:] = 0
    crowd = np.concatenate([ghosts[:1], x[:1], ghosts[1:], x[1:]])
    assert np.array_equal(predictor(crowd).probability, predictor(x).probability)


def test_nan_is_a_lost_joint_and_the_policy_of_the_training_can_be_changed(trained, archive, predictor):
    x = sequences(archive)[1].copy()
    hurt, zero = x.copy(), x.copy()
    hurt[0, 2, 3], hurt[0, 3, 4, 1], zero[0, 2, 3], zero[0, 3, 4] = np.nan, np.inf, 0, 0
    assert np.array_equal(predictor(hurt).probability, predictor(zero).probability)
    lined = x.copy()
    lined[0, 2, 3], lined[0, 3, 4] = (x[0, 1, 3] + x[0, 3, 3]) / 2, (x[0, 2, 4] + x[0, 4, 4]) / 2
    line = Predictor.load(trained / "low", missing="interpolate")
    np.testing.assert_allclose(line(hurt).probability, line(lined).probability, rtol=0, atol=TOLERANCE)


def test_joints_are_matched_by_name(archive, predictor):
    x, order = sequences(archive)[0], [3, 0, 4, 1, 2]
    own = tiny.SKELETON
    names = [own.joints[j].upper().replace("_", " ") for j in order] + ["tail"]
    other = {"name": "other", "joints": names, "edges": [[i, 0] for i in range(1, 6)], "root": 0}
    mixed = np.concatenate([x[:, :, order], np.full_like(x[:, :, :1], 9)], axis=2)
    assert np.array_equal(predictor(mixed, layout=other).probability, predictor(x).probability)
    assert joint_order(Skeleton.load("coco"), Skeleton.load("coco")) is None
    with pytest.raises(UserError, match="layout 'coco' without hip, chest, head, left_hand, right_hand"):
        predictor(np.zeros((1, 9, 17, 3)), layout="coco")
    with pytest.raises(UserError, match="one of coco"):
        predictor(x, layout="nowhere")


def test_frames_come_to_the_rate_of_the_training(archive, predictor):
    x = sequences(archive)[1][:1]
    x[0, :, 2] += 0.5  # nobody lost
    slow = np.repeat(x, 2, axis=1)
    slow[:, 1:-1:2] = (slow[:, :-2:2] + slow[:, 2::2]) / 2
    np.testing.assert_allclose(predictor(slow, fps=50).probability, predictor(x).probability, rtol=0, atol=TOLERANCE)
    assert np.array_equal(predictor(x, fps=25).probability, predictor(x).probability)
    with pytest.raises(UserError, match="fps"):
        predictor(x, fps=0)


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((2, 9, 5, 3)), "a person in at least one frame"), (np.full((2, 9, 5, 3), 1e-9), "a person in at least one frame"),
    (np.full((2, 9, 5, 3), np.nan), "a person in at least one frame"), (np.zeros((9, 5)), "shape"),
    (np.zeros((2, 0, 5, 3)), "shape"),
    (np.ones((2, 9, 4, 3)), "V = 5"), (np.ones((2, 9, 5, 2)), "C = 3"), (np.ones((2, 9, 5, 3), bool), "numbers"),
    (np.full((2, 9, 5, 3), "x"), "numbers")])
def test_bad_arrays_are_refused(predictor, array, message):
    with pytest.raises(UserError, match=message):
        predictor(array)


def test_what_does_not_fit_the_network_is_refused_before_it_runs(archive, predictor):
    model = tiny.model()
    with pytest.raises(UserError, match=r"label_names for \d+ classes. Got 1"):
        Predictor(model, predictor.inputs, ["one"])
    x = sequences(archive)[:2]
    with pytest.raises(UserError, match="scores for 2 sequences. Got 1"):
        predictor.batch(x, scores=[None])


def test_an_answer_is_made_of_numbers(trained, archive):
    x = sequences(archive)[0]
    predictor = Predictor.load(trained / "low")
    with pytest.raises(UserError, match="to answer with numbers. Got NaN"):
        predictor(x.astype(np.float64) * 1e300)
    model = checkpoint.load(trained / "low" / "model.safetensors")
    model.backbone.gcn[3].tcn.bn.running_mean[:] = float("nan")
    with pytest.raises(UserError, match="weights are not finite"):
        Predictor(model, predictor.inputs, predictor.label_names)(x)


def test_copies_and_pickles_answer_alike(archive, predictor):
    x = sequences(archive)[0]
    wanted = predictor(x).probability
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert np.array_equal(other(x).probability, wanted)


def test_persons_are_those_of_the_member_that_fixes_them(predictor):
    fixed = sparse_stgcn.create_model("aagcn", tiny.CLASSES, layout=tiny.SKELETON, base_channels=8, num_person=1)
    inputs = InputFormat.of(sparse_stgcn.Ensemble([tiny.model(), fixed]), {})
    assert inputs.preparation.num_person == 1


def test_image_coordinates_take_scores_or_a_third_channel(tmp_path):
    network = tiny.create_model("stgcn", 4, layout="coco", base_channels=8)
    checkpoint.save(network, tmp_path / "m.safetensors", protocol={"clip_len": 8, "num_person": 1})
    predictor, rng = Predictor.load(tmp_path / "m.safetensors"), np.random.default_rng(0)
    x, score = rng.uniform(0, 900, (1, 12, 17, 2)), rng.uniform(size=(1, 12, 17))
    both = np.concatenate([x, score[..., None]], axis=-1)
    assert np.array_equal(predictor(x, score=score).probability, predictor(both).probability)
    assert not np.array_equal(predictor(x).probability, predictor(both).probability)
    assert not np.array_equal(predictor(x, image=(540, 960)).probability, predictor(x).probability)
    seen = np.where(score > 0.3, 1.0, 0.0)
    assert predictor(x[0], score=seen[0]).label_names == ("0", "1", "2", "3")


def test_the_best_come_first():
    prediction = Prediction(np.array([0.2, 0.4, 0.4], np.float32), ("a", "b", "c"))
    assert (prediction.label, prediction.name) == (1, "b")
    assert [name for name, _ in prediction.top(9)] == ["b", "c", "a"]
    with pytest.raises(ValueError, match="k >= 1"):
        prediction.top(0)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="work directory with model.safetensors"):
        Predictor.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="model.safetensors"):
        Predictor.load(tmp_path)
    checkpoint.save(tiny.model(in_channels=6), tmp_path / "six.safetensors")
    with pytest.raises(UserError, match="protocol="):
        Predictor.load(tmp_path / "six.safetensors")
    checkpoint.save(tiny.model(), tmp_path / "named.safetensors", label_names=["one"])
    with pytest.raises(UserError, match="label_names"):
        Predictor.load(tmp_path / "named.safetensors")


def test_the_start_does_not_load_the_compiler_of_torch():
    code = "import sys; from sparse_stgcn import Predictor; sys.exit('torch._dynamo' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    # What is set in place of the decorator is what the decorator sets.
    assert vars(torch.compiler.assume_constant_result(lambda: None)) == vars(gpu_at)


# ---- the command ------------------------------------------------------------------------------------------------

def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_reads_an_archive(trained, archive, capsys):
    assert run(predict.main, [str(trained / "low"), str(trained / "tiny.npz"), "--top", "1"]) == 0
    said, scores = lines(capsys), Scores.load(trained / "low" / "scores.npz")
    assert [line["sample"] for line in said] == archive.sample_ids.tolist()
    test = {said[i]["sample"]: said[i]["probability"] for i in archive.members("test")}
    for sample, probability in zip(scores.sample, scores.probability, strict=True):
        assert test[sample] == pytest.approx(probability.max(), abs=TOLERANCE)


def test_a_file_has_the_axes_that_convert_reads(trained, archive, predictor, tmp_path, capsys):
    x = sequences(archive)[0]
    np.save(tmp_path / "frames.npy", x.swapaxes(0, 1))
    np.save(tmp_path / "persons.npy", x)
    np.save(tmp_path / "one.npy", x[0])
    want = [predictor(value).probability.max() for value in (x, x, x[0])]
    model = str(trained / "low")
    assert run(predict.main, [model, str(tmp_path / "frames.npy")]) == 0
    assert run(predict.main, [model, str(tmp_path / "persons.npy"), "--order", "MTVC"]) == 0
    assert run(predict.main, [model, str(tmp_path / "one.npy")]) == 0
    assert [line["probability"] for line in lines(capsys)] == pytest.approx(want, abs=TOLERANCE)
    assert run(predict.main, [model, str(tmp_path / "persons.npy"), "--order", "MTVQ"]) == 2
    assert "order to name the axes" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "warned"), [((38, 2), True), ((7, 1), True), ((2, 38), False), ((6, 2), False),
                                               ((8, 8), False)])
def test_frames_that_look_like_persons_are_warned_of(predictor, shape, warned):
    x = np.random.default_rng(0).standard_normal((*shape, 5, 3)).astype(np.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        predictor(x)
    assert len(said) == warned and all("swap the first two axes" in str(own.message) for own in said)


@pytest.mark.parametrize("rolling", [False, True])
def test_a_crowd_in_a_stream_is_no_mistake(predictor, trained, rolling):
    frame = np.random.default_rng(0).standard_normal((8, 5, 3)).astype(np.float32)
    stream = RollingPredictor(predictor, 4) if rolling else StreamPredictor.load(trained / "low", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            stream.push(frame)


def test_a_frame_rate_that_the_network_does_not_know_is_warned_of(predictor):
    unknown = dataclasses.replace(predictor.inputs, fps=None)
    with pytest.warns(UserWarning, match="fps=50, which is without effect; give convert --fps"):
        assert unknown.ratio(50) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predictor.inputs.ratio(50) == 2 and unknown.ratio(None) == 1


def test_the_image_of_a_file_of_2d_joints(tmp_path, capsys):
    network = tiny.create_model("stgcn", 4, layout="coco", base_channels=8)
    network.cls_head.fc_cls.weight.data *= 1000  # an untrained one hardly tells images apart
    checkpoint.save(network, tmp_path / "m.safetensors", protocol={"clip_len": 8, "num_person": 1})
    x = np.random.default_rng(0).random((9, 17, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", x)
    model = Predictor.load(tmp_path / "m.safetensors")
    want = [model(x, image=image).probability.max() for image in ((1080, 1920), (1, 1))]
    assert abs(want[0] - want[1]) > 10 * TOLERANCE
    argv = [str(tmp_path / "m.safetensors"), str(tmp_path / "a.npy")]
    assert run(predict.main, argv) == run(predict.main, [*argv, "--image", "1x1"]) == 0
    assert [line["probability"] for line in lines(capsys)] == pytest.approx(want, abs=TOLERANCE)
    assert run(predict.main, [*argv, "--image", "1x"]) == 2
    assert "--image to be HEIGHTxWIDTH" in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_others(trained, archive, tmp_path, capsys):
    good, bad, short = (tmp_path / f"{name}.npy" for name in ("a_good", "b_bad", "c_short"))
    np.save(good, sequences(archive)[0])
    bad.write_bytes(b"\x93NUMPY rubbish")
    np.save(short, np.ones((4, 5)))
    out = tmp_path / "answers.csv"
    assert run(predict.main, [str(trained / "low"), str(tmp_path), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "b_bad.npy" in said.err and "c_short.npy" in said.err and "2 of 3" in said.err
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 3 and {row["file"] for row in rows} == {str(good)} and rows[0]["rank"] == "1"
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)


def test_the_command_reads_a_pickle_and_skeleton_files(tmp_path, capsys):
    import pickle

    network = tiny.create_model("stgcn", 3, base_channels=8)
    checkpoint.save(network, tmp_path / "m.safetensors", protocol={"clip_len": 8, "num_person": 2})
    x = np.random.default_rng(0).standard_normal((1, 9, 25, 3)).astype(np.float32)
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({"annotations": [{"frame_dir": "s", "label": 0, "keypoint": x, "total_frames": 9}], "split": {}}, file)
    text = ["9"]
    for frame in x[0]:
        text += ["1", "7 0 0 0 0 0 0 0 0 0", "25", *(" ".join([*map(repr, map(float, joint)), *["0"] * 9]) for joint in frame)]
    (tmp_path / "S001C001P001R001A001.skeleton").write_text("\n".join(text))
    assert run(predict.main, [str(tmp_path / "m.safetensors"), str(tmp_path / "a.pkl"),
                              str(tmp_path / "S001C001P001R001A001.skeleton"), "--top", "3"]) == 0
    first, second = lines(capsys)
    assert first["sample"] == "s" and second["sample"] == "S001C001P001R001A001"
    assert [t["probability"] for t in first["top"]] == pytest.approx([t["probability"] for t in second["top"]], abs=TOLERANCE)


def test_the_command_streams_a_file(trained, archive, tmp_path, capsys):
    x = np.concatenate([sequences(archive)[0]] * 12, axis=1)
    np.save(tmp_path / "long.npy", x.swapaxes(0, 1))
    assert run(predict.main, [str(trained / "low"), "--stream", str(tmp_path / "long.npy"), "--chunk", "4", "--window", "8",
                              "--compare"]) == 0
    said = capsys.readouterr()
    frames = [json.loads(line)["frame"] for line in said.out.splitlines()]
    assert frames == sorted(frames) and frames[-1] == x.shape[1] and "frames per second" in said.err
    assert run(predict.main, [str(trained / "low"), "--stream", str(tmp_path / "long.npy"), "--chunk", "8", "--rolling"]) == 0
    assert [json.loads(line)["frame"] for line in capsys.readouterr().out.splitlines()][:3] == [8, 16, 24]
    largest = float(said.err.split("over the whole sequence ")[1].split(",")[0])
    assert largest <= TOLERANCE
    np.save(tmp_path / "short.npy", x[:, :5].swapaxes(0, 1))
    assert run(predict.main, [str(trained / "low"), "--stream", str(tmp_path / "short.npy"), "--window", "0", "--compare"]) == 0
    assert "no window whose frames were all answered for" in capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_do(trained, tmp_path, capsys):
    for arguments, message in (([], "at least one file"), ([str(tmp_path / "no.npy")], "no.npy"),
                               (["--stream", "x.npy", "--rolling", "--compare"], "--rolling"),
                               (["x.npy", "--top", "0"], "--top"), (["x.npy", "--format", "xml"], "json, csv")):
        assert run(predict.main, [str(trained / "low"), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


def test_no_file_that_is_read_is_written(trained, archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("in.npy", sequences(archive)[0])
    Path("folder").mkdir()
    np.save("folder/one.npy", sequences(archive)[0])
    archive.save(tmp_path / "archive")
    Path("own.yaml").write_text(json.dumps(tiny.SKELETON.to_dict()))
    Path("model").mkdir()
    Path("model/model.safetensors").write_bytes((trained / "low" / "model.safetensors").read_bytes())
    Path("link.csv").symlink_to("in.npy")
    Path("hard.csv").hardlink_to("in.npy")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(Predictor, "load", lambda *args: pytest.fail("work has begun"))
    for arguments, out in ((["in.npy"], "in.npy"), (["in.npy"], "folder/../in.npy"), (["in.npy"], "link.csv"),
                           (["in.npy"], "hard.csv"), (["in.npy", "folder"], "folder/one.npy"),
                           (["--stream", "in.npy"], str(tmp_path / "in.npy")), (["--stream", "in.npy", "--rolling"], "in.npy"),
                           (["archive"], "archive/keypoint.npy"), (["archive"], "archive/meta.json"),
                           (["in.npy"], "model/model.safetensors"), (["in.npy", "--layout", "own.yaml"], "own.yaml")):
        assert run(predict.main, ["model", *arguments, "--out", out]) == 2, out
        assert f"--out to be none of the files that are read. Got {out}" in capsys.readouterr().err
    assert run(predict.main, ["model/model.safetensors", "in.npy", "--out", "model/model.safetensors"]) == 2
    assert "--out to be none of" in capsys.readouterr().err
    for out, message in (("folder", "--out to be a file"), ("nowhere/a.json", "directory that exists")):
        assert run(predict.main, ["model", "in.npy", "--out", out]) == 2, out
        assert message in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(predict.main, ["model", "in.npy", "--out", "a.json"]) == 2
    assert "may be written to" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("extra", [[], ["--stream"], ["--stream", "--rolling"]])
def test_an_earlier_result_stays_until_the_new_one_is_whole(trained, archive, tmp_path, monkeypatch, capsys, extra):
    good, out, link = tmp_path / "good.npy", tmp_path / "a.json", tmp_path / "link.json"
    np.save(good, np.concatenate([sequences(archive)[0]] * 2, axis=1))
    out.write_text("earlier")
    link.symlink_to(out)
    arguments = [str(trained / "low"), *extra[:1], str(good), *extra[1:], "--window", "8"]
    write = predict._Writer.__call__

    def fail(self, *args, **values):
        write(self, *args, **values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict._Writer, "__call__", fail)
        assert run(predict.main, [*arguments, "--out", str(link)]) == 130
    assert out.read_text() == "earlier"
    assert run(predict.main, [*arguments, "--out", str(link)]) == 0 and link.is_symlink()
    capsys.readouterr()
    assert run(predict.main, arguments) == 0
    assert out.read_text() == capsys.readouterr().out != ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "good.npy", "link.json"]


def test_nothing_is_written_if_nothing_can_be_predicted(trained, tmp_path, capsys):
    np.save(tmp_path / "bad.npy", np.ones((4, 5)))
    (tmp_path / "a.csv").write_text("earlier")
    for name in ("a.csv", "b.csv"):
        assert run(predict.main, [str(trained / "low"), str(tmp_path / "bad.npy"), "--out", str(tmp_path / name)]) == 1
    assert "1 of 1" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_text() == "earlier" and not (tmp_path / "b.csv").exists()


def test_a_pipe_is_written_to_and_not_replaced(trained, archive, tmp_path):
    np.save(tmp_path / "a.npy", sequences(archive)[0])
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run(predict.main, [str(trained / "low"), str(tmp_path / "a.npy"), "--out", str(tmp_path / "pipe")]) == 0
        assert json.loads(os.read(reader, 1 << 16))["sample"] == "a"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_the_size_of_the_batches_does_not_matter(trained, predictor, archive):
    arrays = sequences(archive)
    small = Predictor.load(trained / "low", batch_size=1)
    assert all(np.array_equal(a.probability, b.probability)
               for a, b in zip(small.batch(arrays), predictor.batch(arrays), strict=True))
