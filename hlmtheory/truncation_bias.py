"""Exact bias of truncation at many sizes at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from hlmtheory.domain import Array, check_distribution, check_same_shape
from hlmtheory.head import Head, check_sizes, tail_level
from hlmtheory.truncation import truncation_bias


def truncation_bias_at(x: Array, y: Array, sizes: Sequence[int]) -> Array:
    r"""The bias of :func:`truncation_bias` at several k, (..., len(sizes)), in about one pass.

    A token v outside the top k with both x_v <= c_k and y_v <= c_k is accepted with probability
    y_v/c_k and never resampled, so all such tokens together enter through the sums of x, y and x y
    alone. Those of the smallest c_k are summed once; only the others are looked at for every k.

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or a size lies outside 1..V.

    Source: docs/theory.md, (21).
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    check_sizes(min(sizes), max(sizes), x.shape[-1])
    rows_x, rows_y = Head.rows(x), Head.rows(y)
    if is_torch_array(rows_x):
        return array_namespace(x).stack([truncation_bias(x, y, k) for k in sizes], axis=-1)
    values = np.stack([_bias_row(p, q, sizes) for p, q in zip(rows_x, rows_y, strict=True)])
    return Head.restore(values, x, (*x.shape[:-1], len(sizes)))


def _bias_row(x: np.ndarray, y: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The exact bias at sizes (G,) for one pair of distributions (V,)."""
    vocab = len(x)
    out = np.zeros(len(sizes))
    most = max((k for k in sizes if k < vocab), default=0)
    if most == 0:
        return out
    top = np.partition(x, vocab - most)[vocab - most :]
    smallest = float(tail_level(np.sum(top, dtype=np.float64), most, vocab))
    looked_at = (x >= min(smallest, float(np.min(top)))) | (y > smallest)
    zero = x.dtype.type(0)
    rest_x = np.where(looked_at, zero, x)
    sum_x, sum_y = float(np.sum(rest_x)), float(np.sum(np.where(looked_at, zero, y)))
    sum_xy = float(rest_x @ y)
    places = np.flatnonzero(looked_at)
    places = places[np.argsort(-x[places])]
    xs, ys = x[places].astype(np.float64), y[places].astype(np.float64)
    prefix = np.cumsum(xs[:most])
    missing = np.cumsum(np.maximum(xs[:most] - ys[:most], 0.0))
    excess = np.cumsum(np.maximum(ys[:most] - xs[:most], 0.0))
    for i, k in enumerate(sizes):
        if k >= vocab:
            continue
        level = float(tail_level(prefix[k - 1], k, vocab))
        tail_x, tail_y = xs[k:], ys[k:]
        below = np.minimum(tail_y, level)
        over = tail_y - below
        accepted = tail_x * below
        if level > 0:
            accepted /= level
            rest_accepted = sum_xy / level
        else:  # nothing is left for the tail: a draft from it is always accepted
            accepted, rest_accepted = tail_x.copy(), sum_x
        rejected = (
            missing[k - 1] + (np.sum(tail_x) - np.sum(accepted)) + max(sum_x - rest_accepted, 0.0)
        )
        residual = excess[k - 1] + np.sum(over)
        share = max(rejected, 0.0) / residual if residual > 0 else 0.0
        over *= share
        accepted += over
        accepted -= tail_y
        gap = np.sum(np.abs(accepted, out=accepted)) + max(sum_y - rest_accepted, 0.0)
        out[i] = (excess[k - 1] * abs(share - 1.0) + gap) / 2
    return out
