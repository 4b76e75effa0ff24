"""Memory between steps: kept in the process, so that a step does not wait for the kernel to hand it out page by page."""
from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory(limit: int = 2**31 - 1) -> bool:
    """Let glibc's malloc keep up to ``limit`` freed bytes instead of returning them after every layer.

    Activations of 10 MB are otherwise unmapped and mapped again many times in a step, and each of their pages is a fault and
    a page of zeros to write: up to 110 thousand faults in a step of an ST-GCN. For the whole process. True if the C library
    has the setting, which glibc alone does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, min(limit, 2**30)) and mallopt(_TRIM_THRESHOLD, limit))
