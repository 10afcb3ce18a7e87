r"""Bias of gate and truncation together, from a table that a trace can keep.

With P the output law of gate sigma and truncation xhat to k entries, a = x min(1, y/xhat) what is
accepted and e = (y - xhat)_+ what is resampled from,

.. math:: P_v - y_v = a_v - y_v + \sigma_v (x_v - a_v) + r\,e_v, \qquad
          r = \frac{Z - w}{E}, \quad Z = \sum_v (x_v - a_v),\ E = \sum_v e_v,\
          w = \sum_v \sigma_v (x_v - a_v).

Beyond the head, where sigma is 0, the sum of positive parts depends on the gate through w alone: a
convex, piecewise linear, falling function, kept at NUM_NODES values of w. Of the head x and y are
known. docs/theory.md, "Gate and truncation together".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

from hlmtheory.acceptance import rejection_probability
from hlmtheory.domain import Array, check_distribution, check_same_shape
from hlmtheory.head import Head, check_sizes, tail_level
from hlmtheory.order import put_along_last_axis

NUM_NODES = 17
"""Values of w, evenly spaced from 0 to that of a gate that skips the whole head."""

WEIGHT = np.linspace(0.0, 1.0, NUM_NODES)

LEAST_LEVEL = 1e-13
"""Taken for a lower tail level: it moves V times as much of the sent law, and no more."""

MAX_ELEMENTS = 2**26
"""Of one array of an accelerator: so many sizes are worked out together."""

ENTRIES = ("rejected", "residual", *(f"beyond-{node}" for node in range(NUM_NODES)))
"""What is kept of each size: Z, E, and the sum beyond the head at every node."""


def truncation_table(x: Array, y: Array, head: Array, sizes: Sequence[int]) -> Array:
    r"""ENTRIES at several k, (B, len(sizes) * len(ENTRIES)), size by size.

    Parameters
    ----------
    x, y : array (B, V)
    head : int array (B, M)
        The likeliest tokens, x falling.
    sizes : sequence of int
        Rising k in 1..V.

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or a size lies outside 1..V.

    Source: docs/theory.md, "Gate and truncation together".
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    check_sizes(min(sizes), max(sizes), x.shape[-1])
    rows_x, rows_y = Head.rows(x), Head.rows(y)
    if is_torch_array(rows_x):
        most = max(1, MAX_ELEMENTS // (len(rows_x) * rows_x.shape[-1]))
        parts = [
            _by_definition(rows_x, rows_y, head, sizes[begin : begin + most])
            for begin in range(0, len(sizes), most)
        ]
        return Head.restore(array_namespace(x).concat(parts, axis=-1), x, (len(rows_x), -1))
    tokens = np.asarray(head)
    values = np.stack(
        [_row(*row, sizes).ravel() for row in zip(rows_x, rows_y, tokens, strict=True)]
    )
    return Head.restore(values, x, values.shape)


def _by_definition(x: Array, y: Array, head: Array, sizes: Sequence[int]) -> Array:
    """Entries of several sizes (B, G * len(ENTRIES)), in passes over the sorted vocabulary."""
    xp = array_namespace(x)
    (vocab, num_head), place = (x.shape[-1], head.shape[-1]), device(x)
    falling = 3.0 - xp.arange(num_head, dtype=x.dtype, device=place) / num_head
    first = put_along_last_axis(x, head, xp.broadcast_to(falling, head.shape))
    order = xp.argsort(first, axis=-1, descending=True)
    x, y = (xp.take_along_axis(one, order, axis=-1) for one in (x, y))
    number = xp.asarray(list(sizes), device=place)
    mass = xp.cumulative_sum(x, axis=-1, dtype=xp.float64)[:, number - 1]
    level = xp.astype(tail_level(mass, number, vocab), x.dtype)[..., None]  # (B, G, 1)
    inside = xp.arange(vocab, device=place) < number[:, None]
    x, y = x[:, None], y[:, None]
    sent = xp.where(inside, x, level)
    refused = x * rejection_probability(sent, y)
    residual = xp.clip(y - sent, 0.0, None)
    rejected, total = xp.sum(refused, axis=-1), xp.sum(residual, axis=-1)
    divisor = xp.where(total > 0, total, xp.ones_like(total))
    most = xp.sum(refused[..., :num_head], axis=-1)
    gap, rise = (x - refused - y)[..., num_head:], residual[..., num_head:]
    out = [rejected, total]
    for node in range(NUM_NODES):
        share = (rejected - most * (node / (NUM_NODES - 1))) / divisor
        out.append(xp.sum(xp.clip(gap + share[..., None] * rise, 0.0, None), axis=-1))
    return xp.reshape(xp.stack(out, axis=-1), (order.shape[0], -1))


def _row(x: np.ndarray, y: np.ndarray, head: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Entries (G, len(ENTRIES)) of one pair of laws (V,).

    One pass and one sort of what is above the lowest tail level c; tokens below it in x and in y
    are accepted with probability y/c at every k and never resampled, and enter by three sums.
    """
    vocab, num_head = len(x), len(head)
    out = np.zeros((len(sizes), len(ENTRIES)))
    kept = np.array([k for k in sizes if k < vocab])
    if len(kept) < len(sizes):  # nothing is truncated
        out[len(kept) :, :2] = np.sum(np.maximum(x - y, 0.0), dtype=np.float64)
    if not len(kept):
        return out
    rest = x.copy()
    rest[head] = -1
    most = int(kept[-1])
    lowest, mass = 2.0, float(np.sum(x[head[:most]], dtype=np.float64))
    if most > num_head:
        top = np.partition(rest, vocab - most + num_head)[vocab - most + num_head :]
        lowest, mass = float(np.min(top)), mass + float(np.sum(top, dtype=np.float64))
    floor = max(float(tail_level(np.asarray(mass), most, vocab)), LEAST_LEVEL)
    # The head, then what x puts above some tail level, falling; then what only y does; the rest.
    tokens = np.flatnonzero(rest > min(floor, lowest))
    missing = most - num_head - len(tokens)
    if missing > 0:  # of those that tie at the last place
        tokens = np.append(tokens, np.flatnonzero(rest == lowest)[:missing])
    tokens = np.append(head, tokens[np.argsort(-x[tokens])])
    num_sorted = len(tokens)
    only_y = y > floor
    only_y[tokens] = False
    tokens = np.append(tokens, np.flatnonzero(only_y))
    rest[tokens] = 0
    xs, ys = x[tokens], y[tokens]
    sums = np.array([np.sum(rest, dtype=np.float64), float(rest @ y)])
    deepest = max(most, num_head)
    top_x, top_y = xs[:deepest].astype(np.float64), ys[:deepest].astype(np.float64)
    levels = np.maximum(tail_level(np.cumsum(top_x)[kept - 1], kept, vocab), LEAST_LEVEL)
    small, large = _split_sums(xs, ys, kept, levels)
    over, under = (np.cumsum(np.maximum(sign * (top_x - top_y), 0))[kept - 1] for sign in (1, -1))
    refused = small[0] + sums[0] - (small[1] + sums[1]) / levels
    out[: len(kept), 0] = over + np.maximum(refused, 0.0)
    out[: len(kept), 1] = under + np.maximum(large[0] - large[1] * levels, 0.0)
    sent = np.where(np.arange(num_head) < kept[:, None], top_x[:num_head], levels[:, None])
    refusal = top_x[:num_head] * rejection_probability(sent, top_y[:num_head])
    skipped = np.sum(refusal, axis=-1)
    products = xs * ys
    above = num_sorted - np.searchsorted(xs[:num_sorted][::-1], levels, side="right").ravel()
    for i, (k, level) in enumerate(zip(kept.tolist(), levels.tolist(), strict=True)):
        rejected, residual = out[i, :2].tolist()
        first, last = 0.0, 0.0  # r of the first node and of the last
        if residual > 0:
            first, last = rejected / residual, (rejected - float(skipped[i])) / residual
        # For r <= 1 only tokens with x > c can be emitted too often.
        part = slice(max(k, num_head), above[i] if first <= 1 else None)
        out[i, 2:] = _beyond(xs[part], ys[part], products[part], level, first, last)
        if first > 1:
            more = np.sum(np.maximum(ys[num_head:k] - xs[num_head:k], 0.0))
            out[i, 2:] += more * np.maximum(first + WEIGHT * (last - first) - 1.0, 0.0)
    return out


def _split_sums(
    x: np.ndarray, y: np.ndarray, sizes: np.ndarray, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Over each size's tail: sums of x and x y where y < c, (2, G); of y and 1 elsewhere, (2, G).

    Every token is counted once, by how many sizes leave it out and how many levels are up to y.
    """
    num = len(sizes) + 1
    left_out = np.repeat(np.arange(num), np.diff(np.concatenate([[0], sizes, [len(x)]])))
    reached = np.zeros(len(y), dtype=np.uint8)
    for level in levels.tolist():
        reached += y >= level
    cell = left_out * num + reached
    last = np.arange(num - 2, -1, -1)[:, None]  # levels below c
    small: list[np.ndarray] = []
    large: list[np.ndarray] = []
    for target, weights in ((small, x), (small, x * y), (large, y), (large, None)):
        table = np.bincount(cell, weights, num * num).reshape(num, num)
        tails = np.cumsum(table[::-1], axis=0)[::-1][1:]  # (G, levels up to y)
        upto = np.cumsum(tails, axis=1)
        below = np.take_along_axis(upto, last, axis=1)[:, 0]
        target.append(below if target is small else upto[:, -1] - below)
    return np.array(small), np.array(large)


def _beyond(
    x: np.ndarray, y: np.ndarray, products: np.ndarray, level: float, first: float, last: float
) -> np.ndarray:
    """Sum of positive parts over a tail (n,), at NUM_NODES values of r from first down to last."""
    gap = np.minimum(x, products / level) - y
    rise = np.maximum(y - level, 0.0)
    upper, lower = gap + first * rise, gap + last * rise
    # Positive at the first node and not at the last; the others are linear between the two.
    some = np.flatnonzero((upper > 0) & (lower <= 0))
    ends = np.sum(np.maximum(upper, 0.0)) - np.sum(upper[some]), np.sum(np.maximum(lower, 0.0))
    out = ends[0] + WEIGHT * (ends[1] - ends[0])
    if len(some):
        place = (NUM_NODES - 1) * upper[some] / (upper[some] - lower[some])  # where it ends
        until = np.ceil(place).astype(np.intp)
        sums = [
            np.cumsum(np.bincount(until, values[some], NUM_NODES + 1)[::-1])[::-1][1:]
            for values in (upper, lower)
        ]
        out += sums[0] + WEIGHT * (sums[1] - sums[0])
    return np.asarray(out)


def bias_from_table(
    table: np.ndarray, x: np.ndarray, y: np.ndarray, sigma: np.ndarray, size: np.ndarray, vocab: int
) -> np.ndarray:
    r"""TV(P, y) of a gate that skips within the head, at a size of the table, (B,).

    Exact at the nodes of w. Between them the sum beyond the head is read off its chord, which is
    above it by at most a quarter of the distance times the change of slope.

    Parameters
    ----------
    table : float array (B, len(ENTRIES))
    x, y : float array (B, M)
        Of the head.
    sigma : float array (B, M)
    size : int array (B,)
        k that the entries are of.
    vocab : int
        V.

    Source: docs/theory.md, "Gate and truncation together".
    """
    inside = np.arange(x.shape[-1]) < size[:, None]
    kept = np.sum(np.where(inside, x, 0.0), axis=-1)
    # Beyond the head x and y are sent as they are where k reaches so far, and c is not asked for.
    sent = np.where(inside, x, tail_level(kept, size, vocab)[:, None])
    refused = x * rejection_probability(sent, y)
    rejected, residual = table[:, 0], table[:, 1]
    skipped, most = np.sum(sigma * refused, axis=-1), np.sum(refused, axis=-1)
    some = residual > 0
    share = np.where(some, (rejected - skipped) / np.where(some, residual, 1.0), 0.0)
    share = np.maximum(share, 0.0)[:, None]
    head = x - refused - y + sigma * refused + share * np.maximum(y - sent, 0.0)
    place = np.where(most > 0, skipped / np.where(most > 0, most, 1.0), 0.0) * (NUM_NODES - 1)
    left = np.clip(np.floor(np.nan_to_num(place)), 0, NUM_NODES - 2).astype(np.intp)
    rows, weight = np.arange(len(table)), np.clip(place - left, 0.0, 1.0)
    beyond = (1 - weight) * table[rows, 2 + left] + weight * table[rows, 3 + left]
    return np.asarray(np.minimum(np.sum(np.maximum(head, 0.0), axis=-1) + beyond, 1.0))
