"""Arrays on disk: directories of `.npy` files, members of an `.npz`, and how little of them stays in memory."""
from __future__ import annotations

import json
import mmap
import os
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

# What numpy, zipfile and zlib raise on damaged input.
DAMAGED = (ValueError, OSError, EOFError, KeyError, IndexError, TypeError, SyntaxError, NotImplementedError, MemoryError,
           OverflowError, RuntimeError, RecursionError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
# After so many bytes read from a memory map its pages are handed back to the system.
RELEASE_BYTES = 64 << 20
_read_bytes: dict[int, int] = {}


# ---- directories ---------------------------------------------------------------------------------------------

def read_directory(path: Path, kind: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays (`keypoint` and `score` memory-mapped) and `meta.json` of an archive directory."""
    meta_path = path / "meta.json"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"Expected an archive directory with meta.json. Got '{path}' without it; convert the data "
                        "first.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Expected readable JSON in '{meta_path}'. Got: {one_line(error)}.") from error
    if not isinstance(meta, dict) or meta.get("format") != kind:
        raise UserError(f"Expected format {kind!r} in '{meta_path}'. Got another file; convert the data first.")
    if meta.get("version") != version:
        raise UserError(f"Expected version {version} in '{meta_path}'. Got {meta.get('version')!r}; convert the data "
                        "again with this version of the package.")
    if not isinstance(meta.get("info", {}), dict) or not isinstance(meta.get("label_names", []), list):
        raise UserError(f"Expected info to be an object and label_names a list in '{meta_path}'. Got other types.")
    arrays = {}
    for file in sorted(path.glob("*.npy")):
        mapped = file.stem in ("keypoint", "score")
        try:
            arrays[file.stem] = plain_text(np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False))
        except DAMAGED as error:
            raise UserError(f"Expected a readable array in '{file}'. Got: {one_line(error)}; convert the data "
                            "again.") from error
    return arrays, meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json`."""
    text = json.dumps(meta, indent=1, ensure_ascii=False, default=plain)
    (folder / "meta.json").write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """A NumPy value as JSON can hold it."""
    return value.item() if isinstance(value, np.generic) else value.tolist() if isinstance(value, np.ndarray) else str(value)


@contextmanager
def directory_in_progress(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write into; renamed to `path` at the end, removed after an error."""
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        replace_directory(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise a UserError if `path` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"Expected an output path that does not exist. Got '{path}'; remove it or ask to overwrite it.")
    if path.exists() and not (path / "meta.json").is_file():
        raise UserError(f"Expected an archive directory to overwrite. Got '{path}', which is something else.")


def replace_directory(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what was there is moved aside first, so that `path` is never half of both."""
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.replace(path, old)
        os.replace(folder, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, path)


# ---- .npz ----------------------------------------------------------------------------------------------------

def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file; members that are stored uncompressed are memory-mapped."""
    arrays: dict[str, np.ndarray] = {}
    key = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                mapped = _map_member(path, member) if member.compress_type == zipfile.ZIP_STORED else None
                if mapped is None:
                    with archive.open(member) as stream:
                        mapped = np.lib.format.read_array(stream, allow_pickle=False)
                arrays[key] = plain_text(mapped)
    except DAMAGED as error:
        at = f", key {key!r}" if key else ""
        raise UserError(f"Expected data to be a complete .npz file of plain arrays. Got '{path}'{at}: "
                        f"{one_line(error)}.") from error
    return arrays


def _map_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray | None:
    """Memory map of an uncompressed member, or None if it is too small to be worth it."""
    if member.file_size < 1 << 20 or member.flag_bits & 0x1:
        return None
    with open(path, "rb") as stream:
        stream.seek(member.header_offset + 26)
        skip = int.from_bytes(stream.read(2), "little") + int.from_bytes(stream.read(2), "little")
        stream.seek(skip, os.SEEK_CUR)
        begin = stream.tell()
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        offset = stream.tell()
        if dtype.hasobject or dtype.itemsize * int(np.prod(shape, dtype=object)) != member.file_size - (offset - begin):
            raise ValueError("the header does not fit the size of the array")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def plain_text(array: np.ndarray) -> np.ndarray:
    """The array, if it is no text or text made of Unicode characters.

    NumPy checks neither when it reads; a code point beyond Unicode makes Python itself fail, wherever it is used first.

    Raises:
        ValueError: it has other code points.
    """
    if array.dtype.kind != "U" or not array.size or not array.dtype.itemsize:
        return array
    points = np.ascontiguousarray(array).view(np.dtype("u4").newbyteorder(array.dtype.byteorder))
    if points.max() > 0x10FFFF:
        raise ValueError("text with code points beyond Unicode")
    return array


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and without a final full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")[:300]


# ---- memory maps ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _MapDescription:
    path: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    order: str


def describe(value: Any) -> Any:
    """Stand-in for a whole memory map that can be sent to another process; other values stay as they are."""
    if isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap):
        order = "C" if value.flags.c_contiguous else "F"
        return _MapDescription(str(value.filename), value.dtype, value.offset, value.shape, order)
    return value


def restore(value: Any) -> Any:
    """The inverse of `describe`."""
    if isinstance(value, _MapDescription):
        return np.memmap(value.path, value.dtype, "r", value.offset, value.shape, value.order)  # type: ignore[call-overload]
    return value


def account(array: np.ndarray | None, num_bytes: int) -> None:
    """Count what was read from a memory map; after `RELEASE_BYTES` take its pages off the resident set.

    They stay in the system's page cache, so that reading them again costs no disk access while memory is plentiful.
    """
    pages = getattr(array, "_mmap", None)
    if pages is None:
        return
    total = _read_bytes.get(id(pages), 0) + num_bytes
    if total >= RELEASE_BYTES:
        total = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
    _read_bytes[id(pages)] = total
