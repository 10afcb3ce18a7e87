"""What a process keeps beside its weights: how much, and how; without glibc nothing is done."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEPT_BYTES = 2**30

WORKING_SET_BYTES = 5 * 2**29
"""Room for everything but the weights, 2.5 GiB, where the machine has twice that to spare: a whole
batch of 64 short prompts over 150,000 tokens of vocabulary. The weights are read once a step,
whatever the rows, and on a processor whose matrix units outrun its memory they are what a step
waits for (docs/performance.md). Not measured at run time: how prompts are put together decides how
sums round, and a second run of the same command should give the same tokens. Where less than twice
as much is free, what is free decides."""


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
