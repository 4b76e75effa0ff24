"""Memory between steps: kept in the process, in huge pages, so that a step does not wait for the kernel to hand it out."""
from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from ..kernels import use_pool

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
_USUAL_PAD, _HUGE_PAGE = 128 * 1024, 2 * 1024 * 1024


def keep_freed_memory(limit: int = 2**31 - 1) -> bool:
    """Keep freed memory for the next layer: large results of this package's ops in blocks of their own (``kernels.use_pool``),
    and up to ``limit`` bytes of all else in glibc's malloc.

    Activations of 10 MB are otherwise unmapped and mapped again many times in a step, and each of their pages is a fault and
    a page of zeros to write: up to 110 thousand faults in a step of an ST-GCN. Half of ``limit`` is reserved, not
    used, in huge pages where Linux offers them ("madvise"). For the whole process. True if the C library has the
    setting, which glibc alone does.
    """
    use_pool(True)
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = bool(mallopt(_MMAP_THRESHOLD, min(limit, 2**30)) and mallopt(_TRIM_THRESHOLD, limit))
    if kept and mallopt(_TOP_PAD, limit // 2):
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        libc.free(libc.malloc(min(limit // 4, 2**26)))  # the heap grows by the pad at once, and is not trimmed below it
        mallopt(_TOP_PAD, _USUAL_PAD)
        _allow_huge_pages(libc)
    return kept


def _allow_huge_pages(libc: ctypes.CDLL) -> None:
    """madvise on the heap; where that is not possible its pages stay small."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    maps = Path("/proc/self/maps")
    if advice is None or not maps.is_file():
        return
    for line in maps.read_text().splitlines():
        if line.endswith("[heap]"):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            first = -(-first // _HUGE_PAGE) * _HUGE_PAGE
            if last > first:
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
