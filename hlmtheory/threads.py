"""Rows worked on side by side: numpy's long operations leave the interpreter to another thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

from array_api_compat import array_namespace, is_torch_array

from hlmtheory.domain import Array
from hlmtheory.order import on_accelerator

Result = TypeVar("Result")

MOST = 8
"""Threads; more are assumed to wait for the interpreter (two were measured)."""


def num_threads(like: Array) -> int:
    """Torch's, for a tensor in main memory; of anything else one: who gives a numpy array has
    threads of their own choosing, and an accelerator needs none."""
    if not is_torch_array(like) or on_accelerator(like):
        return 1
    return min(MOST, int(array_namespace(like).get_num_threads()))


def map_rows(function: Callable[[slice], Result], num_rows: int, like: Array) -> list[Result]:
    """`function` of consecutive slices of rows, one for each thread, in order.

    Parameters
    ----------
    function : callable
        Works on these rows of arrays in main memory. It checks no domain: threads begin with the
        checks on.
    num_rows : int
    like : array
        What the caller was given.
    """
    num = max(1, min(num_threads(like), num_rows))
    bounds = [num_rows * i // num for i in range(num + 1)]
    parts = [slice(begin, end) for begin, end in pairwise(bounds)]
    if num == 1:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(function, parts))
