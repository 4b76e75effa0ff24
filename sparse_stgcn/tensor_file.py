"""A file of tensors with JSON metadata: safetensors, written as a whole or not at all, read only if it is one of ours."""
from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["FORMAT", "read_metadata", "read_tensors", "serialised", "write_atomically", "write_tensors"]

FORMAT = 2
READABLE = (1, 2)  # format 1 had float32 and the coding bitmask only, and no values_of
KEY = "sparse_stgcn"


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON metadata of a checkpoint, without reading its tensors.

    Raises:
        ValueError: not a file written by :func:`save`.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    _must_exist(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return _description(path, file.metadata())
    except SafetensorError as error:
        raise _foreign(path, error) from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> int:
    """Write tensors and JSON metadata to ``path`` by way of a temporary file; returns the size in bytes.

    Raises:
        OSError: the directory is missing or full; ``path`` is then as it was, and no temporary file is left.
    """
    return write_atomically(path, serialised(tensors, description))


def serialised(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save as serialise

    return serialise(dict(tensors), {KEY: json.dumps(description)})


def write_atomically(path: str | Path, content: bytes) -> int:
    """Write ``content`` under a temporary name beside ``path``, flush it to the disk, rename it; its size."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; a checkpoint gets the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(content)


def _flush_directory(path: Path) -> None:
    """Make a rename last through a loss of power, where the system can: a directory is not a file everywhere."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, description) of a file written by :func:`write_tensors`. Raises like :func:`load`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = read_metadata(path)
    try:
        return load_file(str(path)), description
    except SafetensorError as error:
        raise _foreign(path, error) from error


def _must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(2, "No such checkpoint", str(path))


def _foreign(path: str | Path, error: Exception | None = None) -> ValueError:
    reason = f"Got: {error}." if error else "Got a safetensors file without this project's metadata."
    return ValueError(f"Expected {path} to be a checkpoint written by sparse_stgcn.save. {reason}")


def _description(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        description = json.loads((metadata or {})[KEY])
        found = description["format"]
    except (KeyError, TypeError, ValueError):
        raise _foreign(path) from None
    if found not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise ValueError(f"Expected {path} in format {known}. Got format {found}; update sparse_stgcn.")
    return description
