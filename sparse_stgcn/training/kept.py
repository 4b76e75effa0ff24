"""The last resume files of a run: written one after another, and the newest good one found again.

``resume.safetensors`` is the newest, ``resume.1.safetensors`` the one before it, and so on. A new one is written whole under a
third name before any of them moves, so that at every moment, and on a full disk too, those that were there are there.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError, UserError, validating
from .checkpoint import Position, save_state, verify

__all__ = ["STATE", "KeptStates", "Rejected", "writing"]

STATE = "resume.safetensors"
_NEXT = "resume.next.safetensors"


@dataclass(frozen=True)
class Rejected:
    """A resume file that is not used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name} is not used: {self.reason}"


class KeptStates:
    """The resume files in a work directory.

    Args:
        folder: the work directory.
        keep: how many files stay.

    Attributes:
        goes_on: what a message tells the user to do to go on from them.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self.goes_on = f"continue with --resume {folder}"

    def files(self) -> list[Path]:
        """Those that exist, the newest first."""
        return [path for path in (self.folder / _NEXT, self.folder / STATE, *self._older()) if path.exists()]

    def _older(self) -> list[Path]:
        number = lambda path: path.name.split(".")[1]
        return sorted((path for path in self.folder.glob("resume.*.safetensors") if number(path).isdigit()),
                      key=lambda path: int(number(path)))

    def newest(self, model: nn.Module) -> tuple[Path | None, list[Rejected]]:
        """The newest file that holds a state of ``model``, and the newer ones that do not.

        Returns:
            (None, []) if there is no file at all: the run has to begin from the start.

        Raises:
            UserError: there are files, and none can be used; the message says why for each.
        """
        rejected: list[Rejected] = []
        for path in self.files():
            try:
                with validating():
                    verify(path, model)
            except UserError as error:
                rejected.append(Rejected(path, str(error)))
            else:
                return path, rejected
        if rejected:
            raise UserError(f"Expected --resume to find a resume file that can be used. Got none in {self.folder}: "
                            + "; ".join(map(str, rejected)))
        return None, []

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, history: list[dict[str, Any]],
             position: Position | None = None, average: nn.Module | None = None, data: Mapping[str, Any] | None = None) -> None:
        """Write a new file, see ``checkpoint.save_state``, and drop the oldest one.

        Raises:
            TrainingError: it cannot be written (the disk is full); all that were there are as they were.
        """
        new = self.folder / _NEXT
        with writing(self):
            save_state(new, model, optimizer, epoch, history, position, average, data)
            names = [STATE, *(f"resume.{i}.safetensors" for i in range(1, self.keep))]
            for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
                if (self.folder / newer).exists():
                    os.replace(self.folder / newer, self.folder / older)
            os.replace(new, self.folder / STATE)
            for path in self._older()[self.keep - 1:]:
                path.unlink()

    def clear(self) -> None:
        """Remove all of them: the run is finished and will not go on."""
        for path in self.files():
            path.unlink()

    def tidy(self) -> None:
        """Remove what a process that was killed while it wrote has left; nothing of it was of use."""
        for path in self.folder.glob(".*.part"):
            path.unlink()


@contextmanager
def writing(states: KeptStates) -> Iterator[None]:
    """Around everything that a training writes into its work directory.

    Raises:
        TrainingError: in place of OSError (the disk is full, a quota is used up), with the way to go on.
    """
    try:
        yield
    except OSError as error:
        there = ", ".join(path.name for path in states.files()) or "no resume file yet"
        raise TrainingError(f"Expected {states.folder} to take another file. Got: {error.strerror or error}; make room, then "
                            f"{states.goes_on}. Whole as before: {there}.") from error
