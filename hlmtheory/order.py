"""The order primitives that the array standard lacks, for numpy and torch alike."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from hlmtheory.domain import Array


def on_accelerator(x: Array) -> bool:
    """Whether its numbers lie outside main memory."""
    return bool(is_torch_array(x) and x.device.type != "cpu")


def largest(x: Array, num: int) -> tuple[Array, Array]:
    """The `num` in 1..V largest entries of each row (..., V), falling, and their indices.

    Both are (..., num); which of several equal entries come first is not specified.
    """
    if not 1 <= num <= x.shape[-1]:
        raise ValueError(f"num = {num}: allowed is 1 to V = {x.shape[-1]}")
    if is_torch_array(x):
        top = x.topk(num, dim=-1)
        return top.values, top.indices
    if num < x.shape[-1]:
        candidates = np.argpartition(x, x.shape[-1] - num, axis=-1)[..., -num:]
    else:
        candidates = np.broadcast_to(np.arange(num), x.shape)
    values = np.take_along_axis(x, candidates, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    indices = np.take_along_axis(candidates, order, axis=-1)
    return np.take_along_axis(x, indices, axis=-1), indices


def count_up_to(rising: Array, values: Array) -> Array:
    """How many entries of each row of `rising` (B, N), sorted, are <= `values` (B, M): (B, M)."""
    xp = array_namespace(rising)
    if is_torch_array(rising):
        return xp.searchsorted(rising, values.contiguous(), side="right")
    out = np.empty(values.shape, dtype=np.intp)
    for place, (row, value) in enumerate(zip(rising, values, strict=True)):
        out[place] = np.searchsorted(row, value, side="right")
    return out


def take_along_last_axis(x: Array, indices: Array) -> Array:
    """Entries of `x` (B, V) at `indices` (B, M): for one row three times as fast as numpy's own."""
    if is_torch_array(x):
        return x.gather(-1, indices)
    rows = np.arange(len(x))[:, None]
    return x.reshape(-1).take(indices + rows * x.shape[-1] if len(x) > 1 else indices)


def put_along_last_axis(x: Array, indices: Array, values: Array) -> Array:
    """A copy of `x` (..., V) with `values` (..., M) written at `indices` (..., M)."""
    xp = array_namespace(x)
    if is_torch_array(x):
        return x.scatter(-1, indices, values)
    out = xp.asarray(x, copy=True)
    np.put_along_axis(out, indices, values, axis=-1)
    return out
