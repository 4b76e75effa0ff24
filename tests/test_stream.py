"""Streams of frames against the offline network and the offline preparation."""
from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from fused_networks import keypoint, mixed_blocks, network

from sparse_stgcn import Ensemble, Predictor, RollingPredictor, StreamPredictor, checkpoint
from sparse_stgcn.data import transforms as tf
from sparse_stgcn.data.causal import CausalPreparation
from sparse_stgcn.data.preparation import Preparation
from sparse_stgcn.data.resample import Resampler, resample
from sparse_stgcn.errors import UserError
from sparse_stgcn.inputs import InputFormat
from sparse_stgcn.skeleton import Skeleton
from sparse_stgcn.streaming.frames import SlidingMean
from sparse_stgcn.streaming.network import StreamNetwork

# Sums of float32 in another order than the offline kernels', through ten blocks: as in test_runtime.py.
TOLERANCE = 2e-6


def offline(model, x):
    """(T', features) of the network on the whole sequence x (M, T, V, C), in float64."""
    with torch.inference_mode():
        return model.double().eval().backbone(x[None].double()).mean((0, 1, 4)).T


def streamed(model, x, chunk, first=0):
    """The features (T', features), and with which input frame each came; the ``first`` frames go in together."""
    stream, made, when = StreamNetwork(model), [], []
    for t in [*([0] if first else []), *range(first, x.shape[1], chunk)]:
        end = first if t < first else min(t + chunk, x.shape[1])
        made.append(stream.push(x[:, t:end]))
        when += [end - 1] * len(made[-1])
    made.append(stream.push(x[:, :0], end=True))
    return torch.cat(made), when, stream


def assert_exact(model, x, chunk, first=0):
    made, when, stream = streamed(model, x, chunk, first)
    want = offline(model, x)
    assert made.shape == want.shape
    assert ((made - want).abs().max() / want.abs().max()).item() <= TOLERANCE
    return when, stream


@pytest.mark.parametrize("frames", [1, 2, 7, 90])
@pytest.mark.parametrize("chunk", [1, 3, 90])
def test_stgcn_is_the_offline_network(frames, chunk):
    assert_exact(network("stgcn", 0.8), keypoint(1, frames)[0], chunk)


@pytest.mark.parametrize(("sparsity", "block"), [(0.0, "8x1"), (0.95, "1x1"), (0.8, "3x5"), (0.8, "16x16")])
def test_any_pattern(sparsity, block):
    assert_exact(network("stgcn", sparsity, block), keypoint(1, 21)[0], 4)


def test_blocks_of_every_shape_in_one_network():
    assert_exact(mixed_blocks(network("stgcn", 0.0, graph="random", adaptive="init")), keypoint(1, 21)[0], 2)


def without_means(name, **kwargs):
    """A network whose graphs and gates do not follow means over time, everything else at work."""
    model = network(name, 0.6, **kwargs)
    for key, parameter in model.named_parameters():
        part = key.split(".")[-2:]
        if part[-1] in ("alpha", "beta") or part[0] in ("conv_sa", "fc1c", "fc2c"):
            parameter.data.zero_()
    return model


@pytest.mark.parametrize(("name", "kwargs", "delay"), [
    ("ctrgcn", {}, 76), ("ctrgcn", {"temporal": "mixed"}, 76), ("dgstgcn", {}, 76), ("dgstgcn", {"joint_mean": False}, 76),
    ("aagcn", {}, 152), ("aagcn", {"attention": False}, 76), ("stgcn", {}, 76)])
def test_branches_pooling_and_attention_over_frames_are_exact_after_the_delay(name, kwargs, delay):
    when, stream = assert_exact(without_means(name, **kwargs), keypoint(1, delay + 10)[0], 1, first=delay)
    assert (stream.delay, stream.stride) == (delay, 4)
    assert when == [4 * t + delay for t in range(len(when))] and len(when) == 3


@pytest.mark.parametrize("name", ["aagcn", "ctrgcn", "dgstgcn"])
def test_one_chunk_of_one_frame_has_the_offline_means(name):
    assert_exact(network(name, 0.8), keypoint(1, 1)[0], 1)


def test_chunks_do_not_change_an_exact_network():
    model, x = network("stgcn", 0.9), keypoint(1, 30)[0]
    one, many = (streamed(model, x, chunk)[0] for chunk in (1, 8))
    torch.testing.assert_close(one, many, rtol=0, atol=TOLERANCE * one.abs().max().item())


@pytest.mark.parametrize("window", [1, 5, 40, None])
@pytest.mark.parametrize("piece", [1, 3, 13])
def test_a_sliding_mean_is_the_mean_of_the_last_frames(window, piece):
    x, mean = torch.randn(2, 26, 3, generator=torch.Generator().manual_seed(0)), SlidingMean(window)
    for t in range(0, 26, piece):
        got = mean.push(x[:, t:t + piece])
        end = min(26, t + piece)
        want = x[:, 0 if window is None else max(0, end - window):end].double().mean(1).float()
        torch.testing.assert_close(got, want)


def test_a_frame_that_is_not_finite_is_forgotten():
    x, mean = torch.ones(1, 40, 2), SlidingMean(8)
    x[0, 11] = torch.inf
    answers = torch.cat([mean.push(x[:, t:t + 1]) for t in range(40)])
    assert not answers[11:19].isfinite().any() and (answers[24:] == 1).all()


def test_memory_does_not_grow():
    model = tiny.model(0.8)
    stream = stream_of(model, window=20)
    rng, sizes = np.random.default_rng(0), []
    for t in range(400):
        stream.push(rng.standard_normal((5, 3)))
        if t >= 199:
            sizes.append(stream.nbytes)
    assert len(set(sizes)) == 1


# ---- StreamPredictor --------------------------------------------------------------------------------------------

def inputs_of(model, **protocol):
    return InputFormat.of(model, {"protocol": {"clip_len": 40, "num_person": 1, **protocol}})


def stream_of(model, window=0, chunk=1, protocol=None, **options):
    return StreamPredictor(model, inputs_of(model, **(protocol or {})), ("one", "two", "three"), window, chunk, **options)


def sequence(frames=30, persons=1, joints=5, seed=3):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((persons, 1, joints, 3)) + 0.1 * rng.standard_normal((persons, frames, joints, 3))).astype("f4")


@pytest.mark.parametrize("stream", ["j", "b", "jm", "b+bm"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_after_the_end_the_answer_is_the_offline_network_on_the_whole_sequence(stream, chunk):
    model = tiny.model(0.5, in_channels=3 * len(stream.split("+"))).eval()
    predictor = stream_of(model, chunk=chunk, protocol={"stream": stream})
    x = sequence()
    *_, last = predictor.run(x)
    features = predictor.inputs.features(x)
    with torch.inference_mode():
        want = model(torch.from_numpy(features)[None]).softmax(1)[0]
    np.testing.assert_allclose(last.probability, want, rtol=0, atol=1e-6)


def test_the_window_is_the_mean_of_the_last_features():
    model = tiny.model(0.5).eval()
    x = sequence(120)
    predictor = stream_of(model, window=12)
    answers = list(predictor.run(x))
    delay = predictor.delay
    assert answers[delay - 1] is None and answers[delay] is not None
    features = offline(tiny.model(0.5), torch.from_numpy(predictor.inputs.features(x))[0][None])
    head = model.double().cls_head.fc_cls
    with torch.inference_mode():
        for t in range(delay, 120):
            last = (t - delay) // 4
            want = head(features[max(0, last - 2):last + 1].mean(0)).softmax(0)
            np.testing.assert_allclose(answers[t].probability, want, rtol=0, atol=1e-6)


def test_an_ensemble_streams_as_the_mean_of_its_members(tmp_path):
    members = [tiny.model(s, seed) for seed, s in enumerate((0.5, 0.8))]
    checkpoint.save(Ensemble(members), tmp_path / "e.safetensors", protocol={"clip_len": 40, "num_person": 1})
    x = sequence()
    *_, together = StreamPredictor.load(tmp_path / "e.safetensors", window=0).run(x)
    own = [list(stream_of(member).run(x))[-1].probability for member in members]
    np.testing.assert_allclose(together.probability, np.mean(own, 0), rtol=0, atol=1e-6)
    assert together.label_names == ("0", "1", "2")


@pytest.mark.parametrize(("window", "chunk", "fps"), [(None, 1, None), (16, 5, None), (16, 4, 60)])
def test_a_rolling_prediction_is_that_of_the_last_frames(window, chunk, fps):
    model, x = tiny.model(0.5), sequence(90, persons=1)
    predictor = Predictor(model, inputs_of(model, clips=1, fps=30), ("one", "two", "three"))
    rolling = RollingPredictor(predictor, window, chunk, fps=fps)
    answers, held = list(rolling.run(x)), (window or 40) * (1 if fps is None else 2)
    for t in (chunk - 1, 44, 89):
        last = t - (t + 1) % chunk + 1  # frames of the last prediction
        want = predictor(x[:, max(0, last - held):last], fps=fps).probability
        assert np.array_equal(answers[t].probability, want)
    assert np.array_equal(answers[-1].probability, predictor(x[:, -held:], fps=fps).probability)
    rolling.reset()
    assert rolling.push(np.zeros((1, 5, 3))) is None
    with pytest.raises(UserError, match="the same for all"):
        rolling.push(np.zeros((1, 5, 2)))


def rolling_of(model, window=8, chunk=1, protocol=None, **options):
    predictor = Predictor(model, inputs_of(model, clips=1, **(protocol or {})), ("one", "two", "three"))
    return RollingPredictor(predictor, window, chunk, **options)


def crowd(frames=40):
    """Frames of one to three persons, and the same with everybody in all of them; joints are lost, the first person leaves."""
    x = sequence(frames, persons=3)
    x[1, 5:8] = x[2, :9] = x[2, 12:] = x[0, 30:33] = 0
    x[0, 3:6, 2] = x[1, 15, 1] = np.nan
    some = [x[:1 if 5 <= t < 8 else 3 if 9 <= t < 12 else 2, t] for t in range(frames)]
    return [frame[0] if len(frame) == 1 else frame for frame in some], x


@pytest.mark.parametrize("make", [stream_of, rolling_of])
@pytest.mark.parametrize(("fps", "missing"), [(None, "interpolate"), (60, "interpolate"), (60, "keep"), (20, "drop")])
def test_persons_come_and_go(make, fps, missing):
    options = {"protocol": {"num_person": 2, "persons": 3, "fps": 30, "missing": missing}, "window": 40, "fps": fps, "chunk": 5}
    (frames, together), stream = crowd(), make(tiny.model(0.5), **options)
    answers = [*(stream.push(frame) for frame in frames), stream.finish()]
    wants = list(make(tiny.model(0.5), **options).run(together))
    assert answers[-1] is not None
    assert all(a is b is None or np.array_equal(a.probability, b.probability) for a, b in zip(answers, wants, strict=True))


@pytest.mark.parametrize("make", [stream_of, rolling_of])
@pytest.mark.parametrize("fps", [None, 50])
def test_a_bad_frame_leaves_the_stream_as_it_was(make, fps):
    x, good, hurt = sequence(20), *(make(tiny.model(0.5), window=8, fps=fps, protocol={"fps": 25}) for _ in range(2))
    bad = [(np.zeros((1, 4, 3)), None), (np.zeros((1, 5, 2)), None), (np.zeros(3), None), (np.full((1, 5, 3), "x"), None),
           (np.zeros((0, 5, 3)), None), (x[:, 0], np.ones((1, 5))), (x[:, 0], 1.0)]
    for t in range(20):
        for frame, score in bad if t in (0, 9) else []:
            with pytest.raises(UserError, match="Expected"):
                hurt.push(frame, score)
        a, b = good.push(x[:, t]), hurt.push(x[:, t])
        assert a is b is None or np.array_equal(a.probability, b.probability)
    assert np.array_equal(good.finish().probability, hurt.finish().probability)


@pytest.mark.parametrize("make", [StreamPredictor, RollingPredictor])
@pytest.mark.parametrize("fps", [None, 50])
def test_a_frame_without_scores_has_them_where_a_joint_is_seen(make, fps):
    model = tiny.create_model("stgcn", 3, layout="coco", base_channels=8)
    x = 500 + 100 * sequence(20, joints=17)[..., :2]
    x[0, 4:6, 3] = 0
    score = np.random.default_rng(0).uniform(0.1, 1, size=x.shape[:3]).astype("f4")
    score[0, 1::2] = (x[0, 1::2] != 0).any(-1)
    inputs, names = inputs_of(model, fps=25, clips=1), ("one", "two", "three")
    one, other = (make(model, inputs, names, 8, fps=fps) if make is StreamPredictor else
                  make(Predictor(model, inputs, names), 8, fps=fps) for _ in range(2))
    for t in range(20):
        one.push(x[:, t], score[:, t])
        other.push(x[:, t], None if t % 2 else score[:, t])
    assert np.array_equal(one.finish().probability, other.finish().probability)


@pytest.mark.parametrize("make", [stream_of, rolling_of])
def test_a_frame_may_be_pushed_in_the_array_of_the_one_before(make):
    x, one, other = sequence(20), *(make(tiny.model(0.5), window=8, protocol={"stream": "j"}) for _ in range(2))
    frame = np.empty_like(x[:, 0])
    for t in range(20):
        frame[:] = x[:, t]
        one.push(x[:, t])
        other.push(frame)
    assert np.array_equal(one.finish().probability, other.finish().probability)


@pytest.mark.parametrize("make", [stream_of, rolling_of])
@pytest.mark.parametrize("value", [0, 1e-9, np.nan, np.inf])
def test_there_is_no_answer_while_nobody_is_seen(make, value):
    stream = make(tiny.model(0.5), window=8)
    assert [*stream.run(np.full((1, 9, 5, 3), value))] == [None] * 10


def test_a_stream_begins_anew_after_reset():
    predictor, x = stream_of(tiny.model(0.5), window=8), sequence(12)
    first = [p.probability if p else None for p in predictor.run(x)]
    predictor.reset()
    second = [p.probability if p else None for p in predictor.run(x)]
    assert all(a is b is None or np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="chunk of at least 1"):
        stream_of(tiny.model(), chunk=0)
    with pytest.raises(UserError, match="V = 5"):
        stream_of(tiny.model()).push(np.zeros((4, 3)))
    with pytest.raises(UserError, match="frame of shape"):
        stream_of(tiny.model()).push(np.zeros((1, 1, 5, 3)))


# ---- preparation ------------------------------------------------------------------------------------------------

NTU = Skeleton.load("nturgb+d")


def pieces(causal, x, size, score=None):
    made = [causal.push(x[:, t:t + size], None if score is None else score[:, t:t + size]) for t in range(0, x.shape[1], size)]
    return np.concatenate([*made, causal.finish()], axis=1)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_causal_features_are_the_offline_ones_to_the_bit(dtype, align, size):
    x = sequence(20, persons=2, joints=25).astype(dtype)
    x[0, :3] = x[1, :3] = 0  # nobody is there yet
    x[0, 11:13] = 0  # the main person is lost for two frames
    x[1, 6:15] = 0
    x[0, 8, 5] = 0
    preparation = Preparation(NTU, "j+b+jm+bm", align=align)
    assert np.array_equal(pieces(CausalPreparation(preparation, False), x, size), preparation.features(x, None, False))


def test_the_main_person_comes_first():
    x = sequence(9, persons=2, joints=25)
    x[0, :4] = 0
    preparation = Preparation(NTU)
    assert np.array_equal(pieces(CausalPreparation(preparation, False), x, 2), preparation.features(x, None, False))


@pytest.mark.parametrize("given", [True, False])
def test_image_coordinates_with_and_without_scores(given):
    coco = Skeleton.load("coco")
    x = 500 + 100 * sequence(9, persons=2, joints=17)[..., :2]
    x[1, 2, 3] = 0
    score = np.random.default_rng(0).uniform(size=x.shape[:3]).astype("f4") if given else None
    preparation = Preparation(coco, "j+bm")
    assert np.array_equal(pieces(CausalPreparation(preparation, True), x, 1, score), preparation.features(x, score, True))


def test_lost_joints_are_held_or_their_frames_dropped():
    x = sequence(6, joints=25)
    hurt = x.copy()
    hurt[0, 2:4, 7] = np.nan
    held = pieces(CausalPreparation(Preparation(NTU, num_person=1, missing="interpolate"), False), hurt, 1)
    x[0, 2:4, 7] = x[0, 1, 7]
    assert np.array_equal(held, Preparation(NTU, num_person=1).features(x, None, False))
    dropped = pieces(CausalPreparation(Preparation(NTU, num_person=1, missing="drop"), False), hurt, 1)
    assert np.array_equal(dropped, Preparation(NTU, num_person=1).features(np.delete(x, (2, 3), 1), None, False))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 30 / 25, 25 / 30, 10.0])
def test_resampling_keeps_straight_lines_and_pieces_do_not_matter(ratio):
    time = np.arange(31.0)
    x = 1 + time[None, :, None, None] * np.array([1.0, -2.0, 0.5])
    want = 1 + np.arange(int(30 / ratio) + 1)[None, :, None, None] * ratio * np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(resample(x, ratio), want, rtol=0, atol=1e-12)
    for size in (1, 4):
        stream = Resampler(ratio)
        got = np.concatenate([stream.push(x[:, t:t + size]) for t in range(0, 31, size)], axis=1)
        assert np.array_equal(got, resample(x, ratio))


def test_a_piece_that_does_not_fit_is_not_counted():
    x, stream = 1 + np.arange(9.0)[None, :, None, None] * np.ones((1, 1, 5, 3)), Resampler(0.5)
    first = stream.push(x[:, :4])
    with pytest.raises(ValueError):
        stream.push(np.ones((1, 1, 4, 3)))
    assert np.array_equal(np.concatenate([first, stream.push(x[:, 4:])], axis=1), resample(x, 0.5))


def test_a_joint_that_is_lost_on_one_side_is_taken_from_the_nearer_frame():
    x = np.ones((1, 2, 2, 3))
    x[0, 1] = 3
    x[0, 1, 0] = 0
    assert resample(x, 0.5)[0, 1].tolist() == [[0, 0, 0], [2, 2, 2]]
    x[0, 0, 0] = np.nan
    assert tf.missing_joints(resample(x, 0.25))[0, 1].tolist() == [True, False]
