"""How the process keeps its large buffers; without glibc nothing is done."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEPT_BYTES = 2**30


def keep_large_buffers() -> None:
    """Let freed arrays of a step be the arrays of the next, instead of going back to the system.

    A step needs a dozen arrays of batch x vocabulary, tens of megabytes each. By default glibc maps
    every one anew, and the page faults cost several times the arithmetic. Kept are at most 1 GiB,
    in one heap for all threads: a thread's own would give back what it frees.
    """
    if (libc := glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)


def glibc() -> Any:
    """The C library, or None where it is another than glibc."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except (OSError, TypeError):
        return None
