"""Errors that are the user's to mend, and the one place where they become an exit code."""
from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Stopped", "TrainingError", "UserError", "one_of", "run", "validating"]


class UserError(ValueError):
    """A bad argument or a bad input file. The message is one sentence that names the argument and the fix."""


class TrainingError(RuntimeError):
    """Training cannot go on (the loss is not finite). The message says what to change."""


class Stopped(Exception):
    """The process was asked to end (SIGTERM) and has saved its work. The message says how to go on."""


@contextmanager
def validating(argument: str | None = None) -> Iterator[None]:
    """Turn a ValueError, TypeError or OSError raised inside into a UserError, with ``argument`` named first.

    Commands put it around everything that happens before the real work, and around nothing else: the same
    exceptions during the work are faults of the program and keep their traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OSError) as error:
        text = str(error) if str(error) else type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if argument and argument not in text:
            text = f"{argument}: {text}"
        raise UserError(text) from error


def one_of(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Check that ``value`` is one of ``allowed``.

    Raises:
        UserError: it is not; the message lists what is, the nearest name first.
    """
    if value in allowed:
        return
    from difflib import get_close_matches

    near = get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UserError(f"Expected {argument} to be one of {', '.join(allowed)}. Got {value!r}{hint}")


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main`` and return its exit code.

    0 when it returned (or what it returned), 2 with one line on stderr after a UserError, 1 with one line
    after a TrainingError, 143 with one line after Stopped, 130 after Ctrl-C. Every other exception passes through with its
    traceback. Warnings take one line on stderr, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return main(argv) or 0
    except UserError as error:
        return _report("error", error, 2)
    except TrainingError as error:
        return _report("error", error, 1)
    except Stopped as error:
        return _report("stopped", error, 128 + 15)  # what a shell gives for a process that SIGTERM has ended
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; the rest of the buffer must not raise again at exit.
        sys.stdout = None
        return 141


def _report(kind: str, what: object, code: int) -> int:
    print(f"{kind}: {' '.join(str(what).split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    _report("warning", message, 0)
