"""Fusion of score files by sample id, with the presets' weights, from our files and from others'."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from sparse_stgcn import fuse as command
from sparse_stgcn.errors import UserError
from sparse_stgcn.fusion import PRESETS, Member, fuse, parse_weights, read, with_ids
from sparse_stgcn.metrics import top_k_accuracy
from sparse_stgcn.scores import Scores

N, CLASSES = 12, 6


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def scores(seed: int) -> Scores:
    logit = np.random.default_rng(seed).normal(size=(N, CLASSES)).astype(np.float32)
    return Scores(np.array([f"s{i:02d}" for i in range(N)]), np.arange(N) % CLASSES, softmax(logit), logit,
                  {"seed": seed})


def shuffled(s: Scores, seed: int) -> Scores:
    order = np.random.default_rng(seed).permutation(N)
    return Scores(s.sample[order], s.label[order], s.probability[order], s.logit[order], s.protocol)


def members(count: int, tmp_path: Path, shuffle: bool = False) -> list[Member]:
    paths = [tmp_path / f"{i}.npz" for i in range(count)]
    for i, path in enumerate(paths):
        (shuffled(scores(i), 50 + i) if shuffle and i else scores(i)).save(path)
    return [read(path) for path in paths]


def test_score_file_round_trip(tmp_path: Path) -> None:
    scores(3).save(tmp_path / "s.npz")
    back = Scores.load(tmp_path / "s.npz")
    for name in ("sample", "label", "probability", "logit"):
        np.testing.assert_array_equal(getattr(back, name), getattr(scores(3), name))
    assert back.protocol == {"seed": 3}
    assert back.metrics() == scores(3).metrics()


def test_a_work_directory_stands_for_its_scores(tmp_path: Path) -> None:
    scores(0).save(tmp_path / "scores.npz")
    member = read(tmp_path)
    assert member.name == str(tmp_path / "scores.npz") and len(member) == N
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="Expected a score file or a work directory with scores.npz. Got .*empty without"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"text"], ids=["empty", "cut", "text"])
def test_score_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match="to be a score file written by evaluate"):
        Scores.load(tmp_path / "s.npz")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_weighted_sum(preset: str, tmp_path: Path) -> None:
    count = {"equal": 3, "pyskl2": 2}.get(preset, 4)
    weights, on = parse_weights(preset, count)
    fused = fuse(members(count, tmp_path), weights, on)
    shares = {"equal": [1, 1, 1], "pyskl2": [1, 1], "pyskl4": [2, 2, 1, 1],
              "ctrgcn4": [0.6, 0.6, 0.4, 0.4]}[preset]
    total = sum(w * (scores(i).logit if preset == "ctrgcn4" else scores(i).probability).astype(float)
                for i, w in enumerate(shares)) / sum(shares)
    expected = softmax(total) if preset == "ctrgcn4" else total
    np.testing.assert_allclose(fused.probability, expected, rtol=1e-5)
    assert fused.metrics()["top1"] == top_k_accuracy(total, np.arange(N) % CLASSES)
    assert (fused.logit.argsort(1) == expected.argsort(1)).all()


def test_order_of_the_samples_does_not_matter(tmp_path: Path) -> None:
    straight = fuse(members(4, tmp_path), (2, 2, 1, 1))
    mixed = fuse(members(4, tmp_path, shuffle=True), (2, 2, 1, 1))
    np.testing.assert_array_equal(mixed.sample, straight.sample)
    np.testing.assert_array_equal(mixed.probability, straight.probability)
    np.testing.assert_array_equal(mixed.label, straight.label)
    # Matched by position, the same files would have given something else.
    assert not np.allclose(straight.probability, shuffled(scores(1), 51).probability)


def test_one_file_fused_is_itself(tmp_path: Path) -> None:
    np.testing.assert_allclose(fuse(members(1, tmp_path)).probability, scores(0).probability, rtol=1e-6)


@pytest.mark.parametrize(("text", "expected"), [
    ("2,2,1,1", (2, 2, 1, 1)), ("2:2:1:1", (2, 2, 1, 1)), ("0.5,1,0,3e-1", (0.5, 1, 0, 0.3)),
])
def test_weights_as_numbers(text: str, expected: tuple[float, ...]) -> None:
    assert parse_weights(text, 4) == (expected, "probability")


def changed(s: Scores, **values: np.ndarray) -> Member:
    fields = {"sample": s.sample, "label": s.label, "probability": s.probability, "logit": s.logit, **values}
    return Member("other.npz", **fields)


@pytest.mark.parametrize(("other", "message"), [
    (lambda s: changed(s, sample=np.array([*s.sample[:-1], "new"])), "'s11' in .*0.npz but not in other.npz"),
    (lambda s: Member("other.npz", s.sample[1:], s.label[1:], s.probability[1:], None), "'s00' .* not in "
                                                                                        "other.npz"),
    (lambda s: changed(s, label=s.label[::-1].copy()), "same labels in every file. Got 0 and 5 for sample "
                                                       "'s00'"),
    (lambda s: Member("other.npz", s.sample, s.label, s.probability[:, :4], None), "6 in .* and 4 in "
                                                                                   "other.npz"),
    (lambda s: Member("other.npz", None, None, s.probability, None), "none in other.npz; give the archive"),
], ids=["id", "fewer", "label", "classes", "no ids"])
def test_refuses_files_that_do_not_fit(other: Callable[[Scores], Member], message: str,
                                       tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fuse([*members(1, tmp_path), other(scores(1))])


def test_refuses_a_file_with_repeated_or_broken_scores() -> None:
    s = scores(0)
    with pytest.raises(UserError, match=r"every sample once in other.npz. Got 's01' 2 times"):
        changed(s, sample=np.array(["s01", *s.sample[1:]]))
    with pytest.raises(UserError, match="NaN or infinity"):
        changed(s, logit=np.full_like(s.logit, np.nan))


@pytest.mark.parametrize(("weights", "message"), [
    ((1, 2, 3), "2 numbers"), ((0, 0), "not all 0"), ((1, -1), ">= 0"), ((1, float("nan")), ">= 0"),
], ids=str)
def test_refuses_weights(weights: tuple[float, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fuse(members(2, tmp_path), weights)


@pytest.mark.parametrize(("text", "message"), [("best", "--weights"), ("pyskl4", r"\(4\). Got 3 files"),
                                               ("1,2", "3 files")])
def test_refuses_weight_text(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_weights(text, 3)


def write_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def test_pyskl_result(tmp_path: Path) -> None:
    member = read(write_pickle(tmp_path / "result.pkl", list(scores(0).probability)))
    assert member.sample is None
    assert member.logit is None
    np.testing.assert_allclose(member.scores("probability"), scores(0).probability, rtol=1e-6)
    with pytest.raises(UserError, match=r"Expected raw scores in .*result.pkl"):
        member.scores("logit")


def test_ctrgcn_scores(tmp_path: Path) -> None:
    content = dict(zip(scores(0).sample.tolist(), scores(0).logit, strict=True))
    member = read(write_pickle(tmp_path / "epoch1_test_score.pkl", content))
    assert member.sample is not None
    assert member.sample.tolist() == scores(0).sample.tolist()
    assert member.probability is None
    np.testing.assert_allclose(member.scores("logit"), scores(0).logit, rtol=1e-6)
    np.testing.assert_allclose(member.scores("probability"), scores(0).probability, rtol=1e-5)


def test_bare_lists_fuse_by_position_with_a_warning(tmp_path: Path) -> None:
    lists = [read(write_pickle(tmp_path / f"{i}.pkl", list(scores(i).probability))) for i in range(2)]
    with pytest.warns(UserWarning, match="matched by position"):
        fused = fuse(lists)
    np.testing.assert_allclose(fused.probability, (scores(0).probability + scores(1).probability) / 2,
                               rtol=1e-5)
    assert (fused.label == -1).all()
    short = read(write_pickle(tmp_path / "short.pkl", list(scores(0).probability[1:])))
    with pytest.raises(UserError, match=r"same number of samples. Got 12 in .* 11 in"):
        fuse([lists[0], short])


def test_a_split_gives_ids_and_labels(tmp_path: Path) -> None:
    s, mixed = scores(0), shuffled(scores(1), 7)
    pyskl = with_ids(read(write_pickle(tmp_path / "result.pkl", list(s.probability))), s.sample, s.label)
    ctrgcn = with_ids(read(write_pickle(tmp_path / "ctr.pkl",
                                        dict(zip(mixed.sample.tolist(), mixed.logit, strict=True)))),
                      s.sample, s.label)
    fused = fuse([pyskl, ctrgcn])
    np.testing.assert_allclose(fused.probability, (s.probability + scores(1).probability) / 2, rtol=1e-5)
    np.testing.assert_array_equal(fused.label, s.label)
    with pytest.raises(UserError, match="--data with the .* classes of .*result.pkl. Got the label 99"):
        with_ids(pyskl, s.sample, np.where(s.label == 0, 99, s.label))
    with pytest.raises(UserError, match="to have the 11 samples of the split"):
        with_ids(read(tmp_path / "result.pkl"), s.sample[1:], s.label[1:])
    with pytest.raises(UserError, match=r"Got 's\d\d', which is not"):
        with_ids(read(tmp_path / "ctr.pkl"), np.array([f"t{i}" for i in range(N)]), s.label)


@pytest.mark.parametrize("content", [7, "text", {"a": "b"}, [[1.0, 2.0], [1.0]], []], ids=str)
def test_refuses_pickles_without_scores(content: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.pkl"):
        read(write_pickle(tmp_path / "x.pkl", content))


def test_refuses_to_execute_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch exploded",)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="system"):
        read(write_pickle(tmp_path / "x.pkl", [Bomb()]))
    assert not (tmp_path / "exploded").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members(4, tmp_path, shuffle=True)
    files = [str(tmp_path / f"{i}.npz") for i in range(4)]
    assert command.main([*files, "--weights", "pyskl4", "--out", str(tmp_path / "fused.npz")]) == 0
    fused = Scores.load(tmp_path / "fused.npz")
    assert fused.protocol == {"files": files, "weights": [2, 2, 1, 1], "on": "probability"}
    out = capsys.readouterr().out
    assert f"fused     top-1 {fused.metrics()['top1']:.2%}" in out
    for i in range(4):
        assert f"top-1 {scores(i).metrics()['top1']:.2%}  x {[2, 2, 1, 1][i]}  {files[i]}" in out


def test_command_with_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_npz(tmp_path / "tiny.npz")
    test = tiny.archive()
    chosen = test.members("test")
    right = np.eye(tiny.CLASSES)[test.label[chosen]]
    write_pickle(tmp_path / "result.pkl", list(right))
    assert command.main([str(tmp_path / "result.pkl"), "--data", str(data)]) == 0
    assert "fused     top-1 100.00%" in capsys.readouterr().out
    assert command.main([str(tmp_path / "result.pkl")]) == 0
    assert "no file has labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="--split or --fold"):
        command.main([str(tmp_path / "result.pkl"), "--data", str(data), "--split", "train", "--fold", "0"])
