"""The restricted unpickler: what plain pickles hold, and that nothing else is read from them or run."""
from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pyskl_reader import annotations, pickled, write

from sparse_stgcn.data import Archive
from sparse_stgcn.data.pyskl import PysklSource, load_pickle
from sparse_stgcn.errors import UserError

PLAIN = {
    "a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.float32(3), "c": [np.asfortranarray(np.ones((2, 3))), "q"],
    "d": {1, 2}, "e": b"xx", "f": collections.OrderedDict(a=np.zeros((0, 3))), "g": np.bool_(True), "h": bytearray(b"12"),
    "i": np.arange(3, dtype=">i4"), "n": None, "s": np.array(["ab", "c"]), "t": (1, (2.5, np.array("abc"))), "z": 1 << 90,
    "u": frozenset({3}), "v": 2j, "w": b"", "m": collections.defaultdict(list, x=[1]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_is_read(tmp_path: Path, protocol: int) -> None:
    shared_array = np.arange(4)
    got = load_pickle(write(tmp_path / "x.pkl", PLAIN | {"p": [shared_array, shared_array]}, protocol))
    assert set(got) == {*PLAIN, "p"}
    for key, want in PLAIN.items():
        if isinstance(want, (np.ndarray, np.generic)):
            assert got[key].dtype == want.dtype and got[key].shape == want.shape
            np.testing.assert_array_equal(got[key], want)
    for key in "denhzuvw":
        assert got[key] == PLAIN[key] and type(got[key]) is type(PLAIN[key])
    np.testing.assert_array_equal(got["c"][0], np.ones((2, 3)))
    assert got["c"][1] == "q" and got["t"][0] == 1 and got["t"][1][1] == "abc" and got["f"]["a"].shape == (0, 3)
    assert got["m"] == {"x": [1]} and got["p"][0] is got["p"][1]


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    # What Python 2.7 with NumPy 1.11 wrote for {'k': numpy.arange(2, dtype='i2')}: byte strings, old module names.
    raw = (b"\x80\x02}q\x01U\x01kq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq"
           b"\x06\x87q\x07Rq\x08(K\x01K\x02\x85q\tcnumpy\ndtype\nq\nU\x02i2q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03U\x01<q\x0eNNNJ"
           b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x04\x00\x00\x01\x00q\x10tq\x11bs.")
    (tmp_path / "x.pkl").write_bytes(raw)
    np.testing.assert_array_equal(load_pickle(tmp_path / "x.pkl")["k"], np.arange(2, dtype=np.int16))


class Calls:
    """Pickles to a call of any function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], tuple(self.call[1:])


MARK = "unpickled-a-call"
HOSTILE = {
    "os.system": (Calls(os.system, f"touch {MARK}"), "system"),
    "eval": (Calls(eval, f"open('{MARK}', 'w')"), "eval"),
    "exec": (Calls(exec, f"open('{MARK}', 'w')"), "exec"),
    "subprocess": (Calls(subprocess.check_call, ["touch", MARK]), "check_call"),
    "getattr": (Calls(getattr, "text", "upper"), "getattr"),
    "open": (Calls(open, MARK, "w"), "open"),
    "numpy file": (Calls(np.fromfile, "x"), "fromfile"),
    "numpy load": (Calls(np.load, "x"), "load"),
    "numpy zeros": (Calls(np.zeros, (1 << 40,)), "zeros"),
    "ndarray of any size": (Calls(bytearray, 1 << 40), "length"),
    "object array": (np.array([{}], dtype=object), "dtype 'O8'"),
    "record array": (np.zeros(2, dtype=[("a", "f4")]), "dtype 'V4'"),
    "date array": (np.zeros(2, dtype="M8[s]"), "dtype 'M8'"),
    "path": (Path("/etc"), "Path"),
    "range": (range(3), "range"),
    "own class": (Calls(Archive.open, "x"), "getattr"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str,
                                             protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    value, word = HOSTILE[case]
    with pytest.raises(UserError) as error:
        load_pickle(write(tmp_path / "x.pkl", {"annotations": [{"keypoint": value}]}, protocol))
    assert word in str(error.value) and str(error.value).startswith("Expected only NumPy arrays")
    assert not (tmp_path / MARK).exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
DTYPE = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
CRAFTED = {
    "class with a state": b"c__builtin__\nset\n}S'a'\nI1\nsb.",
    "state for a dtype class": b"cnumpy\ndtype\n}S'value'\nI1\nsb.",
    "state for a list": b"](I1\ntb.",
    "import of a module": b"cos\nsystem\n(S'true'\ntR.",
    "new object": b"\x80\x02cnumpy\nndarray\n(K\x05t\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"P1\n.",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7fh\x00.",
    "claimed bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"abc.",
    "claimed text": b"\x80\x04\x8d" + struct.pack("<Q", (1 << 63) - 1) + b"abc.",
    "claimed bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b"abc.",
    "claimed frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "negative bytes": b"\x80\x02T\xff\xff\xff\xffabc.",
    "array larger than its bytes": ARRAY + b"(I1\n(I1000000000000\nt" + DTYPE + b"I00\nS'abcd'\ntb.",
    "array of negative size": ARRAY + b"(I1\n(I-1\nI-1\nt" + DTYPE + b"I00\nS'abcd'\ntb.",
    "array without dtype": ARRAY + b"(I1\n(I1\ntS'f4'\nI00\nS'abcd'\ntb.",
    "array with a list": ARRAY + b"(I1\n(I1\nt" + DTYPE + b"I00\n(lI1\natb.",
    "empty": b"",
    "only a mark": b"(.",
    "unknown opcode": b"\x80\x04\xff.",
    "text": b"Traceback (most recent call last):\n",
    "zip": b"PK\x03\x04" + bytes(40),
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "future protocol": b"\x80\xffN.",
    "deep": b"(" * 100_000 + b"." ,
    "deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_bytes_end_in_one_sentence(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.pkl").write_bytes(CRAFTED[case])
    with pytest.raises(UserError, match="^Expected") as error:
        load_pickle(tmp_path / "x.pkl")
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_nested_sharing_stays_small(tmp_path: Path) -> None:
    value: Any = [np.arange(3)]
    for _ in range(60):
        value = [value, value]
    got = load_pickle(write(tmp_path / "x.pkl", value))
    for _ in range(60):
        assert got[0] is got[1]
        got = got[0]
    np.testing.assert_array_equal(got[0], np.arange(3))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_damaged_pickles_never_end_in_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    raw = bytearray(pickle.dumps(pickled(annotations(3, 4)), data.draw(st.sampled_from([0, 2, 4, 5]))))
    raw = raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))]
    for _ in range(data.draw(st.integers(0, 5))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        source = PysklSource(path, {"joints": list("abcd"), "edges": [[1, 0], [2, 0], [3, 0]], "root": 0})
        for i in range(len(source)):
            source.record(i)
    except ValueError as error:
        assert "\n" not in str(error)


def test_command_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(os.system, "echo pwned")))
    out = subprocess.run([sys.executable, "-m", "sparse_stgcn.convert", str(tmp_path / "x.pkl"), str(tmp_path / "out")],
                         capture_output=True, text=True)
    assert out.returncode == 2 and "Traceback" not in out.stderr and "system'" in out.stderr and not out.stdout
