"""Predictor: what evaluate says about a sequence, from an array alone."""
from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from predicted import TOLERANCE, sequences

import sparse_stgcn
from sparse_stgcn import Predictor, checkpoint, ensemble
from sparse_stgcn.data import SkeletonDataset
from sparse_stgcn.data.joints import joint_order
from sparse_stgcn.errors import UserError, run
from sparse_stgcn.inputs import InputFormat
from sparse_stgcn.kernels.dispatch import gpu_at
from sparse_stgcn.predictor import Prediction
from sparse_stgcn.scores import Scores
from sparse_stgcn.skeleton import Skeleton


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


def test_joints_that_only_their_case_tells_apart():
    body = Skeleton.load({"joints": ["hip", "chest", "Chest", "hand"], "edges": [[1, 0], [2, 1], [3, 2]], "root": 0})
    assert joint_order(body, body) is None
    turned = Skeleton.load({"joints": ["hip", "Chest", "chest", "HAND"], "edges": [[1, 0], [2, 1], [3, 2]], "root": 0})
    assert joint_order(turned, body).tolist() == [0, 2, 1, 3]


def test_a_network_in_float64_answers(archive, predictor):
    model = tiny.model()
    keypoint = sequences(archive)[0]
    single, double = (Predictor(network, predictor.inputs, predictor.label_names)(keypoint)
                      for network in (model, copy.deepcopy(model).double()))
    np.testing.assert_allclose(double.probability, single.probability, atol=TOLERANCE)
