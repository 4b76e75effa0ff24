"""Frames that wait: for those around them, or for those of another branch."""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FrameQueue", "Join", "SlidingMean", "no_frames"]

_LEAST = 32  # frames of room, so that those that wait move to the front once in many calls


def no_frames(x: Tensor, channels: int) -> Tensor:
    """(N, channels, 0, V) for x (N, C, T, V)."""
    return x.new_empty(x.shape[0], channels, 0, x.shape[3])


class FrameQueue:
    """Frames (N, C, T, V) that were appended and not dropped yet; the memory stays that of the most that ever waited.

    Args:
        lead: frames that stand before the first one, of ``fill``.
        fill: value of the frames before the first and behind the last one.
    """

    def __init__(self, lead: int = 0, fill: float = 0.0) -> None:
        self.lead, self.fill = lead, fill
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self._room: Tensor | None = None
        self._begin = self._end = 0
        self._owed = 0  # frames that were dropped before they came

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return 0 if self._room is None else self._room.nbytes

    def append(self, x: Tensor) -> None:
        """Add frames at the end."""
        if self._room is None and self.lead:
            self._put(x.new_full((*x.shape[:2], self.lead, x.shape[3]), self.fill))
        self._put(x)

    def pad(self, count: int) -> None:
        """Add ``count`` frames of ``fill`` at the end; a frame must have been appended before."""
        assert self._room is not None
        self._put(self._room.new_full((*self._room.shape[:2], count, self._room.shape[3]), self.fill))

    def view(self) -> Tensor:
        """All frames that wait, valid until the next ones are appended."""
        assert self._room is not None
        return self._room.narrow(2, self._begin, self._end - self._begin)

    def drop(self, count: int) -> None:
        """Remove the first ``count`` frames; those that are not there yet will be removed when they come."""
        here = min(count, len(self))
        self._begin += here
        self._owed += count - here

    def take(self, count: int) -> Tensor:
        """The first ``count`` frames, which must be there and are removed; valid until the next ones are appended."""
        assert self._room is not None
        taken = self._room.narrow(2, self._begin, count)
        self._begin += count
        return taken

    def _put(self, x: Tensor) -> None:
        if self._owed:
            skipped = min(self._owed, x.shape[2])
            self._owed -= skipped
            x = x[:, :, skipped:]
        count, waiting = x.shape[2], self._end - self._begin
        if self._room is None or self._end + count > self._room.shape[2]:
            room = self._room
            if room is None or 2 * (waiting + count) > room.shape[2]:
                room = x.new_empty(*x.shape[:2], max(_LEAST, 4 * (waiting + count)), x.shape[3])
            if self._room is not None:
                room[:, :, :waiting] = self.view()  # never onto itself: they wait in less than half of the room
            self._room, self._begin, self._end = room, 0, waiting
        self._room.narrow(2, self._end, count).copy_(x)
        self._end += count


class Join:
    """Branches that are late by different numbers of frames, brought together."""

    def __init__(self, count: int) -> None:
        self.queues = [FrameQueue() for _ in range(count)]

    def reset(self) -> None:
        """Forget all frames."""
        for queue in self.queues:
            queue.reset()

    def push(self, *parts: Tensor) -> list[Tensor]:
        """New frames (N, C_i, T_i, V) of every branch -> those that all have, (N, C_i, T, V)."""
        count = min(len(queue) + part.shape[2] for queue, part in zip(self.queues, parts, strict=True))
        ready = []
        for queue, part in zip(self.queues, parts, strict=True):
            if part.shape[2] == count and not len(queue):
                ready.append(part)  # the branch that the others wait for never waits itself
            else:
                queue.append(part)
                ready.append(queue.take(count))
        return ready


class SlidingMean:
    """Mean over the last frames of a stream, in float64.

    With a window the sum is made anew once per window, so that adding and taking away leaves no error that grows, and a frame
    that is not finite is forgotten.

    Args:
        window: frames; None: all frames so far.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self._total: Tensor | None = None
        self._last: Tensor | None = None  # (N, window, ...), a ring
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(0 if t is None else t.nbytes for t in (self._total, self._last))

    def push(self, frames: Tensor) -> Tensor:
        """frames (N, T, ...), T of at least 1 in the first call -> mean (N, ...) over the last ones, these included."""
        if self._total is None:
            self._total = torch.zeros_like(frames[:, 0], dtype=torch.float64)
            if self.window is not None:
                self._last = frames.new_zeros(frames.shape[0], self.window, *frames.shape[2:])
        for piece in frames.split(self.window or max(1, frames.shape[1]), 1):
            self._add(piece)
        held = self._count if self.window is None else min(self._count, self.window)
        return (self._total / held).to(frames.dtype)

    def _add(self, frames: Tensor) -> None:
        assert self._total is not None
        if self._last is None or self.window is None:
            self._total += frames.sum(1, dtype=torch.float64)
        else:
            at = self._count % self.window
            for part in frames.tensor_split([self.window - at], 1):
                place = self._last[:, at:at + part.shape[1]]
                self._total += part.sum(1, dtype=torch.float64) - place.sum(1, dtype=torch.float64)
                place.copy_(part)
                at = (at + part.shape[1]) % self.window
                if not at:
                    self._total = self._last.sum(1, dtype=torch.float64)
        self._count += frames.shape[1]
