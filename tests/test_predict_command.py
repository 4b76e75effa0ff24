"""The predict command: files, streams and what it writes."""
from __future__ import annotations

import csv
import dataclasses
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from predicted import TOLERANCE, sequences

from sparse_stgcn import Predictor, checkpoint, compact, predict, sparsify
from sparse_stgcn.errors import run
from sparse_stgcn.scores import Scores
from sparse_stgcn.streaming.predictor import StreamPredictor
from sparse_stgcn.streaming.rolling import RollingPredictor


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
    torch.manual_seed(0)
    network = tiny.create_model("stgcn", 4, layout="coco", base_channels=8)
    # A sparse one: of a dense one every process chooses the engine that it finds faster, and their sums differ in order.
    compact(sparsify(network, 0.8, block=(4, 1)))
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


def test_a_folder_of_archives_is_its_archives(tmp_path):
    from sparse_stgcn.data.samples import find_files

    for place in ("folder/mine", "folder/.mine.partial", "folder/deep"):
        (tmp_path / place).mkdir(parents=True)
        np.save(tmp_path / place / "keypoint.npy", np.zeros((4, 25, 3), np.float32))
    (tmp_path / "folder" / "mine" / "meta.json").write_text("{}")
    folder = tmp_path / "folder"
    assert list(find_files([folder])) == [folder / "deep" / "keypoint.npy", folder / "mine"]
