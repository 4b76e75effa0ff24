"""From a source to a native archive, record by record: bounded memory, and a stopped conversion continues."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from . import storage
from .archive import FORMAT, VERSION, Archive
from .source import LeftOut, Record, Source

# Room for a .npy header that is written again at the end, when the number of frames is known.
_HEADER = 256
_FLUSH_EVERY = 64


def write_archive(
    source: Source, out: str | Path, overwrite: bool = False, progress: Callable[[int], None] | None = None
) -> Archive:
    """Convert `source` to the archive directory `out` and open it.

    Frames go to a hidden directory beside `out`, with a log of the finished records; a conversion that was stopped
    continues there if source and options are the same, and a finished one is renamed to `out`. `progress` is called
    with the number of records done.

    Raises:
        UserError: `out` exists and `overwrite` is off, a record is damaged, or none is left.
    """
    out = Path(out)
    storage.check_target(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.partial")
    part = _Part(folder, source)
    try:
        for index in range(part.next, len(source)):
            part.append(index, source.record(index))
            if progress is not None:
                progress(index + 1)
    finally:
        part.close()
    part.finish()
    storage.replace_directory(folder, out)
    return Archive.open(out)


class _Part:
    """A conversion in progress: `keypoint.npy` and `score.npy` without their headers, and one line per record."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.sizes = {"keypoint": self._row_shape("keypoint"), "score": self._row_shape("score")}
        if not source.has_score:
            del self.sizes["score"]
        self.lines: list[dict[str, Any]] = []
        state = folder / "state.json"
        fingerprint = source.fingerprint()
        if not (state.is_file() and self._read_text(state) == fingerprint and self._resume()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            state.write_text(fingerprint, encoding="utf-8")
            self.lines = []
        self.files: dict[str, IO[bytes]] = {name: self._open(name) for name in self.sizes}
        self.log = open(folder / "records.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        for line in self.lines:
            self._log(line)
        self._flush()

    @property
    def next(self) -> int:
        return len(self.lines)

    @property
    def frames(self) -> int:
        return sum(line.get("frames", 0) for line in self.lines)

    def append(self, index: int, record: Record | LeftOut) -> None:
        if isinstance(record, LeftOut):
            line: dict[str, Any] = {"left_out": record.sample, "reason": record.reason}
        else:
            values = {"keypoint": record.keypoint, "score": record.score}
            finite = True
            for name, row in self.sizes.items():
                array = _padded(values[name], row, self.source.dtype, record.sample, name)
                finite &= bool(np.isfinite(array).all())
                self.files[name].write(array.tobytes())
            line = {"sample": record.sample, "label": int(record.label), "frames": len(record.keypoint),
                    "finite": finite, **record.fields}
        self.lines.append(line)
        # Frames reach the disk before the line that counts them.
        self._log(line)
        if index % _FLUSH_EVERY == 0:
            self._flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.log.close()

    def finish(self) -> None:
        """Write headers, the small arrays and meta.json; remove what only a resumed conversion needs."""
        kept = [line for line in self.lines if "sample" in line]
        if not kept:
            raise UserError(f"Expected at least one usable sequence in '{self.source.path}'. Got none.")
        frames = self.frames
        for name, row in self.sizes.items():
            with open(self.folder / f"{name}.npy", "r+b") as file:
                file.write(_header((frames, *row), self.source.dtype))
                file.truncate(_HEADER + frames * self._bytes(name))
                os.fsync(file.fileno())
        samples = np.array([line["sample"] for line in kept])
        names = {name for line in kept for name in line} - {"sample", "label", "frames", "finite"}
        fields = {"sample": samples} | {name: np.array([line.get(name, -1) for line in kept]) for name in sorted(names)}
        label = np.array([line["label"] for line in kept], np.int64)
        label_names = list(self.source.label_names) or [str(i) for i in range(int(label.max()) + 1)]
        arrays = {"offset": np.concatenate([[0], np.cumsum([line["frames"] for line in kept])]), "label": label}
        arrays |= {f"field_{name}": value for name, value in fields.items()}
        arrays |= {f"split_{name}": mask for name, mask in self.source.splits(samples, fields).items()}
        for name, value in arrays.items():
            np.save(self.folder / f"{name}.npy", value, allow_pickle=False)
        left_out = {line["left_out"]: line["reason"] for line in self.lines if "left_out" in line}
        info = {**self.source.info, "finite": all(line["finite"] for line in kept)}
        if left_out:
            info["left_out"] = left_out
        storage.write_meta(self.folder, {
            "format": FORMAT, "version": VERSION, "name": self.source.path.stem, "label_names": label_names,
            "skeleton": self.source.skeleton.to_dict(), "info": info})
        # Checked before it gets its final name.
        Archive.open(self.folder)
        for name in ("records.jsonl", "state.json"):
            (self.folder / name).unlink()

    def _resume(self) -> bool:
        """Read the log of a stopped conversion up to the last record whose frames are all there."""
        room = min(((self.folder / f"{name}.npy").stat().st_size - _HEADER) // self._bytes(name)
                   if (self.folder / f"{name}.npy").is_file() else -1 for name in self.sizes)
        if room < 0:
            return False
        frames = 0
        for text in self._read_text(self.folder / "records.jsonl").split("\n")[:-1]:
            try:
                line = json.loads(text)
                frames += line.get("frames", 0)
            except (ValueError, AttributeError, TypeError):
                break
            if frames > room:
                break
            self.lines.append(line)
        return bool(self.lines)

    def _open(self, name: str) -> IO[bytes]:
        path = self.folder / f"{name}.npy"
        file = open(path, "r+b" if path.is_file() else "w+b")  # noqa: SIM115
        file.truncate(_HEADER + self.frames * self._bytes(name))
        file.seek(0, os.SEEK_END)
        return file

    def _row_shape(self, name: str) -> tuple[int, ...]:
        s = self.source
        return (s.num_persons, len(s.skeleton), *([s.channels] if name == "keypoint" else []))

    def _bytes(self, name: str) -> int:
        return int(np.prod(self.sizes[name])) * self.source.dtype.itemsize

    def _log(self, line: dict[str, Any]) -> None:
        self.log.write(json.dumps(line, default=storage.plain) + "\n")

    def _flush(self) -> None:
        for file in self.files.values():
            file.flush()
        self.log.flush()

    @staticmethod
    def _read_text(path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _padded(values: np.ndarray | None, row: tuple[int, ...], dtype: np.dtype, sample: str, name: str) -> np.ndarray:
    """`values` (T, M', ...) with zeros for the persons that are missing up to `row`."""
    if values is None:
        raise UserError(f"Expected {name} in every record. Got none in '{sample}'; it is in other records.")
    if values.ndim != len(row) + 1 or values.shape[2:] != row[1:] or values.shape[1] > row[0] or not len(values):
        raise UserError(f"Expected {name} of record '{sample}' to have at least one frame and the shape (T, M <= "
                        f"{row[0]}, {', '.join(map(str, row[1:]))}). Got {values.shape}; all records need the same "
                        "joints.")
    out = np.zeros((len(values), *row), dtype)
    out[:, :values.shape[1]] = values
    return out


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """A version 1.0 .npy header that fills exactly the room kept for it."""
    text = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}).encode("latin1")
    size = _HEADER - 10
    return np.lib.format.magic(1, 0) + size.to_bytes(2, "little") + text.ljust(size - 1) + b"\n"
