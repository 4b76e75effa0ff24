"""SIGTERM: the run is asked to end. It saves its state at the next step and ends with exit code 143."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from ..errors import Stopped

__all__ = ["StopRequest"]


class StopRequest:
    """Listens to SIGTERM inside a ``with`` block; elsewhere, and in other threads than the main one, nothing changes.

    Attributes:
        asked: whether the signal has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False
        self._before: object = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]  # what signal.signal returned
            self._before = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, the signal raises ``Stopped`` where the program is: for work that may be begun again, such as a test."""
        self._at_once = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._at_once:
            raise Stopped
