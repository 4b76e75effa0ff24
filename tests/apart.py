"""Calls in a process of their own: for what cannot be undone (an instruction set, an audit hook).

The processes are forked from one that has imported torch and nothing of this package, since importing torch takes seconds.
"""
from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["call"]


def call(function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Any:
    """``function(*arguments)``, of a module's top level. AssertionError: it raised (the text says what), died or is slow."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "pytest"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, arguments, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise AssertionError(f"Expected {function.__name__} to end. Got nothing in {seconds} s.")
        result, error = receiver.recv()
    except EOFError:
        process.join(10)
        raise AssertionError(f"Expected {function.__name__} to end. Got exit code {process.exitcode}.") from None
    finally:
        process.kill()
        process.join(10)
    assert error is None, error
    return result


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], sender: Connection) -> None:
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
