"""Damage to files: to their bytes, and to what they are made of, so that checksums and syntax do not stop it all."""
from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from typing import Any

__all__ = ["mutate"]

NUMBERS = (0, 1, -1, 2, 255, 65536, 2**31 - 1, 2**31, -2**31, 2**63 - 1, 2**64, 10**30, 0.5, 1e308, -1e-320,
           float("nan"), float("inf"))
TEXTS = ("", " ", "..", "../../../../etc/passwd", "/etc/passwd", "C:\\x", "\x00", "\ud800", "é" * 50, "a" * 5000, "%s%n",
         "{}", "<script>", "nturgb+d", "None", "true", "1e999")
TOKENS = (b"..", b"/etc/passwd", b"\x00", b"\xff\xff\xff\xff", b"\xff" * 8, b"\x80", b"NaN", b"-1", b"9" * 20, b"1e999", b"\n",
          b",", b"[", b"{", b"&a [*a]", b"!!python/object/apply:os.system ['id']", b"<f4", b"|O", b"O8", b"(1073741824,)",
          b"cos\nsystem\n(S'id'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"\x94", b"R", b"b", b"0", b"2",
          b"\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.")
# What damage itself may stumble over, in a file that an earlier fault has spoilt.
SPOILT = (ValueError, KeyError, struct.error, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


def mutate(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """``data`` with one to four faults; ``other`` is a second file of the same kind, whose parts may be taken."""
    kinds = [_bytes]
    if data[:2] == b"PK":
        kinds += [_zip, _zip, _zip]
    elif data[:1] in (b"{", b"["):
        kinds += [_json, _json]
    elif data[8:9] == b"{":
        kinds += [_safetensors, _safetensors]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        with contextlib.suppress(*SPOILT):
            data = rng.choice(kinds)(data, rng, other)
    return data


def _bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    changed, size = bytearray(data), len(data)
    at, length = rng.randrange(size + 1), min(rng.choice((1, 1, 2, 4, 8, 64, 1024)), size)
    kind = rng.randrange(8)
    if kind == 0 and size:
        changed[min(at, size - 1)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        changed[at:at + length] = rng.randbytes(length)
    elif kind == 2:
        del changed[at:at + length]
    elif kind == 3:
        changed[at:at] = rng.choice(TOKENS)
    elif kind == 4:
        token = rng.choice(TOKENS)
        changed[at:at + len(token)] = token
    elif kind == 5:
        del changed[at:]
    elif kind == 6:
        changed[at:at] = changed[(start := rng.randrange(size + 1)):start + length]
    elif other:
        start = rng.randrange(len(other))
        changed[at:at + length] = other[start:start + length]
    return bytes(changed)


def _zip(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A member damaged, renamed, left out or written twice; the archive around it is whole."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    index, kind = rng.randrange(len(members)), rng.randrange(6)
    name, content = members[index]
    if kind == 0:
        members[index] = (rng.choice([n for n, _ in members] + ["../" + name, "/tmp/" + name, "x.npy"]), content)
    elif kind == 1:
        del members[index]
    elif kind == 2:
        members[index] = (name, rng.choice(members)[1])
    else:
        members[index] = (name, (_npy if content[:6] == b"\x93NUMPY" and kind < 5 else _bytes)(content, rng, other))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same name twice is meant
        for name, content in members:
            file.writestr(name, content)
    return out.getvalue()


def _npy(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Another dtype, order or shape in the header of an ``.npy``, whose length stays right."""
    size = struct.unpack("<H", data[8:10])[0]
    header, body = data[10:10 + size].decode("latin1"), data[10 + size:]
    start = header.index("'shape':") + 8
    dtype = rng.choice(("<f4", ">f4", "<f2", "|b1", "<i8", "|O", "<U8", "|S4", "<c8", "|V16", "<M8[s]", "<f16",
                        "[('a', '<f4')]"))
    shape = rng.choice(("()", "(0,)", "(1,)", "(-1,)", "(2, 3)", "(1, 1, 1, 1)", "(1000000000000,)", "(0, 99999999999)",
                        "(4294967296, 4294967296)", "(3, 1, 5, 3)", "(True,)", "(1.5,)", "1", "(" + "1, " * 40 + ")"))
    if rng.random() < 0.5:
        header = header[:start] + f" {shape}, }}"
    else:
        kind = dtype if dtype[0] == "[" else repr(dtype)
        header = f"{{'descr': {kind}, 'fortran_order': {rng.random() < 0.3}, 'shape':{header[start:].strip()}"
    text = header.strip().encode("latin1")
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + body


def _safetensors(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Another value in the header, or in the JSON text that its metadata holds; the length before it stays right."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    metadata = header.get("__metadata__", {})
    inner = [key for key, value in metadata.items() if value[:1] == "{"] if isinstance(metadata, dict) else []
    if inner and rng.random() < 0.7:
        key = rng.choice(inner)
        metadata[key] = json.dumps(_value(json.loads(metadata[key]), rng))
    else:
        header = _value(header, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size:]


def _json(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return json.dumps(_value(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def _value(root: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts, at any depth, replaced, left out, doubled or moved."""
    places = list(_places(root))
    if not places:
        return _any(rng, root)
    owner, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1:
        other, other_key = rng.choice(places)
        if owner is not other:
            owner[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 2 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == 2:
        owner[rng.choice(TEXTS)] = owner[key]
    else:
        owner[key] = _any(rng, owner[key])
    return root


def _any(rng: random.Random, before: Any) -> Any:
    if isinstance(before, (int, float)) and rng.random() < 0.5:
        return before + rng.choice((-1, 1, 0.5, 1000))
    nested: Any = 0
    for _ in range(rng.choice((1, 3, 2000))):
        nested = [nested]
    return rng.choice((*NUMBERS, *TEXTS, None, True, False, [], {}, [before, before], {"a": before}, nested))


def _places(value: Any) -> Any:
    """(container, key) of every part, at most a few of long lists."""
    keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 8))) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])
