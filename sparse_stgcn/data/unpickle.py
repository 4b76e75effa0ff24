"""Reading pickles from strangers: NumPy arrays and plain containers, and nothing that could run code."""
from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ..errors import UserError
from .storage import one_line

_PLAIN_DTYPE = re.compile(r"[<>=|]?([biufcSU]\d{1,9}|\?)")


def load_pickle(path: str | Path) -> Any:
    """The content of a pickle made of dicts, lists, tuples, sets, texts, numbers and NumPy arrays.

    Whatever else the file asks for is refused by name before anything of it is looked up. Memory stays bounded by
    the size of the file: lengths that a damaged file claims are compared with what is left of it.

    Raises:
        UserError: the file is absent, cut off, not a pickle, or holds anything else; the message names it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            return _plain(_Unpickler(_Bounded(stream, os.fstat(stream.fileno()).st_size)).load(), {})
    except FileNotFoundError:
        raise UserError(f"Expected an existing pickle file. Got '{path}'.") from None
    except _Refused as refused:
        raise UserError(f"Expected only NumPy arrays and plain containers in pickle '{path}'. Got {refused}; a pickle "
                        "with other objects can run any program and is not opened.") from None
    # Damaged bytes make the pickle machine fail in every way there is; each of them means the same to the user.
    except Exception as error:
        raise UserError(f"Expected a complete pickle file. Got '{path}', which is damaged or something else: "
                        f"{type(error).__name__}: {one_line(error)}.") from error


class _Refused(Exception):
    """The file asks for something that is not plain data."""


class _Bounded:
    """A stream that refuses to read more than the file has: a claimed length allocates nothing."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise EOFError("it ends before its content does")
        self._left -= count
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(1 << 20)
        self._left -= len(line)
        return line

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[:] = data
        return len(data)


class _Dtype:
    """A NumPy dtype in the making: the pickle gives the code first and the byte order later."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise _Refused(f"an array of dtype {code!r}")
        self.value = np.dtype(code)

    def build(self, state: Any) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _Array:
    """A NumPy array in the making: the pickle gives its content after creating it."""

    def __init__(self, *_: object) -> None:
        # The shape that comes with the creation is ignored: it could ask for any amount of memory.
        self.value = np.zeros(0)

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise _Refused(f"an array with {type(dtype).__name__} for a dtype")
    if isinstance(raw, str):  # written by Python 2
        raw = raw.encode("latin1")
    if not isinstance(raw, (bytes, bytearray)):
        raise _Refused("an array of objects")
    if order not in ("C", "F"):
        raise ValueError(f"unknown array order {order!r}")
    shape = tuple(int(n) for n in (shape if isinstance(shape, (tuple, list)) else (shape,)))
    if min(shape, default=0) < 0:
        raise ValueError("an array with a negative size")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if count * dtype.value.itemsize != len(raw):
        raise ValueError("an array whose size is not that of its content")
    flat = np.frombuffer(raw, dtype.value) if count and raw else np.zeros(count, dtype.value)
    return flat.reshape(shape, order=order)  # type: ignore[call-overload]


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    return _array(raw, dtype, (1,), "C")[0]


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    return _array(raw, dtype, shape, order)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    if any(isinstance(argument, int) for argument in arguments):
        raise _Refused("a buffer made by its length")
    return _encode(*arguments) if arguments and isinstance(arguments[0], str) else bytes(*arguments)


def _bytearray(*arguments: Any) -> bytearray:
    return bytearray(_bytes(*arguments))


def _dict(*arguments: Any) -> dict[Any, Any]:
    # OrderedDict(items) and defaultdict(type): the type of missing values is of no use here.
    return dict(*(argument for argument in arguments if isinstance(argument, (list, tuple, dict))))


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode, ("collections", "OrderedDict"): _dict, ("collections", "defaultdict"): _dict,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Array
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer
for _module in ("builtins", "__builtin__"):
    _ALLOWED |= {(_module, kind.__name__): kind for kind in (list, tuple, set, frozenset, complex)}
    _ALLOWED |= {(_module, "dict"): _dict, (_module, "bytearray"): _bytearray, (_module, "bytes"): _bytes}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    # The pure Python machine: its memo is a dict, so that a huge memo index costs nothing, and BUILD can be limited to
    # our own two types, so that no other object's state can be set.
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, stream: _Bounded) -> None:
        super().__init__(stream, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"'{module}.{name}'") from None

    def persistent_load(self, pid: object) -> Any:
        raise _Refused(f"a reference to the outside ({pid!r})")

    def load_build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, target = stack.pop(), stack[-1]
        if not isinstance(target, (_Array, _Dtype)):
            raise _Refused(f"a state for a {type(target).__name__}")
        target.build(state)

    dispatch[pickle.BUILD[0]] = load_build


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """`value` with the arrays and dtypes in the making replaced; containers that are shared stay shared."""
    if isinstance(value, (_Array, _Dtype)):
        return value.value
    if not isinstance(value, (list, dict, tuple)):
        return value
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        result: Any = tuple(_plain(item, done) for item in value)
        # The original stays referenced, so that its id cannot come back for another object.
        done[id(value)] = result
        done[id(result)] = value
        return result
    done[id(value)] = value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        if isinstance(item, (_Array, _Dtype, list, dict, tuple)):
            value[key] = _plain(item, done)
    return value
