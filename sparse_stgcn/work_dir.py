"""Work directories: what one holds, where that is not what a command needs, and locks that keep it to one process."""
from __future__ import annotations

import os
import weakref
from pathlib import Path

from .errors import UserError
from .options import read_mapping

__all__ = ["Lock", "is_multilevel", "is_taken", "occupy", "remedy", "take"]

TRAIN = "lock.train"  # not the lock of a sweep, which is held while its child trains
_ENSEMBLE = "ensemble.safetensors"


class Lock:
    """An exclusive lock on a file, until ``release``, or until the object or the process is gone.

    Args:
        path: the file; it is made if it is not there, and stays.

    Raises:
        BlockingIOError: another one has the lock.
        OSError: the file cannot be opened. On a file system without locks nothing is locked.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, self._file)
        try:
            _flock(self._file)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            pass

    def fileno(self) -> int:
        return self._file


# Of this process, by device and inode: a notebook that goes on with its own run, moved or not, is no other process.
_occupied: weakref.WeakValueDictionary[tuple[int, int], Lock] = weakref.WeakValueDictionary()


def take(path: Path) -> Lock | None:
    """The lock, or None if another one has it; raises OSError like :class:`Lock`."""
    try:
        return Lock(path)
    except BlockingIOError:
        return None


def is_taken(path: Path) -> bool:
    """Whether somebody has the lock, this process included."""
    if not path.exists():
        return False
    lock = take(path)
    if lock is not None:
        lock.release()
    return lock is None


def occupy(folder: Path, argument: str = "--resume") -> Lock | None:
    """Keep a work directory to this process as long as the lock lives; None where files cannot be written or locked.

    Raises:
        UserError: another process has it.
    """
    path = folder / TRAIN
    try:
        lock = take(path)
        found = path.stat()
    except OSError:
        return None
    key = found.st_dev, found.st_ino
    if lock is None:
        own = _occupied.get(key)
        if own is not None and own.release.alive:
            return own
        raise UserError(f"Expected {argument} of a run that nobody continues. Got {folder}, which another process is training; "
                        "wait until it ends, or stop it.")
    _occupied[key] = lock
    return lock


def is_multilevel(folder: Path) -> bool:
    """Whether a run of ``sparse_stgcn.multilevel`` was begun there."""
    try:
        return "levels" in read_mapping(folder / "config.yaml")
    except UserError:
        return False


def remedy(folder: Path, argument: str) -> str:
    """What a directory without the files of a finished run holds, and what to do: the end of an error message."""
    if is_multilevel(folder):
        levels = sorted(path.parent for path in folder.glob("*/model.safetensors"))
        if levels and (folder / _ENSEMBLE).is_file():
            return f"it holds several levels of sparsity; name one of them as {argument}: {', '.join(map(str, levels))}."
        return (f"finish its levels with python -m sparse_stgcn.multilevel --resume {folder}, then name the directory of one "
                f"of them as {argument}.")
    if (folder / _ENSEMBLE).is_file():
        return (f"it holds an ensemble, tested already: its figures are in {folder / 'result.json'}. Name the work directory "
                f"of one of its members as {argument}, or give {folder / _ENSEMBLE} to python -m sparse_stgcn.predict.")
    if (folder / "config.yaml").is_file():
        return f"finish the run with python -m sparse_stgcn.train --resume {folder}."
    return "train first, with python -m sparse_stgcn.train."


def _flock(file: int) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_to_parent() -> None:
    """In a process that was forked, such as one that loads data: it may outlive the one whose lock it would keep."""
    for lock in list(_occupied.values()):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
