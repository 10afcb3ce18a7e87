"""Quantised probabilities: their bias, and the best (k, bits) under a payload budget.

The papers charge b bits for a probability and then verify with the unrounded one. Here the server
verifies with what b bits can carry; docs/theory.md, (18), (22).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

from hlmtheory.cost import index_bits
from hlmtheory.domain import Array, check_distribution
from hlmtheory.head import Head, check_sizes
from hlmtheory.order import largest, put_along_last_axis

MAX_PROB_BITS = 24
PROB_BITS = tuple(range(1, 17))


def _check_bits(prob_bits: int) -> None:
    if not 1 <= prob_bits <= MAX_PROB_BITS:
        raise ValueError(f"prob_bits = {prob_bits}: allowed is 1 to {MAX_PROB_BITS}")


def probability_codes(ordered: Array, prob_bits: int) -> Array:
    r"""Integer codes of falling probabilities, uniform rounding that never exceeds mass one.

    .. math:: n_i = M_i - M_{i-1}, \qquad
              M_i = \min\Big(L, \sum_{j \le i} \lfloor L x_j + \tfrac12 \rfloor\Big),
              \qquad L = 2^b - 1

    The likeliest tokens are rounded to the nearest multiple of 1/L; where rounding up has used up
    the mass, later codes are cut. So the codes of a longer message begin with those of a shorter
    one, and the mass left for the tail is never negative.

    Parameters
    ----------
    ordered : float64 array (..., M)
        The M largest probabilities, falling.
    prob_bits : int
        b in 1..24.

    Returns
    -------
    float64 array (..., M)
        Integers >= 0 with sum at most 2^b - 1; the positive ones come first.

    Source: docs/theory.md, (18). Assumption: the papers' quantiser is not public to us.
    """
    _check_bits(prob_bits)
    xp = array_namespace(ordered)
    steps = 2**prob_bits - 1
    total = xp.clip(xp.cumulative_sum(xp.floor(steps * ordered + 0.5), axis=-1), None, steps)
    return xp.concat([total[..., :1], total[..., 1:] - total[..., :-1]], axis=-1)


def quantised_distribution(x: Array, size: Array | int, prob_bits: int) -> Array:
    r"""What the server rebuilds from k tokens with b bits each.

    .. math:: \hat x_i = n_i / L \;(i \le k,\, n_i > 0), \qquad
              \hat x_i = \frac{1 - \sum_{j \le k} n_j / L}{V - \#\{j \le k : n_j > 0\}}
              \;\text{else}

    with the codes n of :func:`probability_codes`. A token whose code is 0 joins the uniform tail:
    nothing but "less than half a step" is known of it. If every token has a positive code there is
    no tail to take the rounding error, and the codes are divided by their sum.

    Parameters
    ----------
    x : array (..., V)
        Distribution.
    size : int or integer array (...)
        k in 1..V.
    prob_bits : int
        b in 1..24.

    Returns
    -------
    array (..., V)
        A distribution. Growing b recovers the unquantised truncation.

    Raises
    ------
    ValueError
        If x is not a distribution, or k or b is out of range.

    Source: docs/theory.md, (17), (18).
    """
    check_distribution(x, "x")
    xp = array_namespace(x)
    vocab = x.shape[-1]
    scalar = isinstance(size, int | np.integer)
    most = int(size) if scalar else int(xp.max(size))
    check_sizes(most if scalar else int(xp.min(size)), most, vocab)
    values, indices = largest(x, most)
    codes = probability_codes(xp.astype(values, xp.float64), prob_bits)
    if not isinstance(size, int | np.integer):
        codes = xp.where(xp.arange(most, device=device(x)) < size[..., None], codes, 0 * codes)
    coded = codes > 0
    total = xp.sum(codes, axis=-1, keepdims=True)
    num_tail = vocab - xp.sum(xp.astype(coded, xp.float64), axis=-1, keepdims=True)
    steps = xp.where(num_tail > 0, 0 * total + 2**prob_bits - 1, total)
    level = (1.0 - total / steps) / xp.clip(num_tail, 1.0, None)
    filled = xp.where(coded, codes / steps, level)
    base = xp.broadcast_to(xp.astype(level, x.dtype), x.shape)
    return put_along_last_axis(base, indices, xp.astype(filled, x.dtype))


def quantised_deviation_at(x: Array, sizes: Sequence[int], prob_bits: int) -> Array:
    r"""L1 distance between a distribution and its quantised truncations.

    .. math:: N_b(k) = \sum_v |x_v - \hat x_v|

    Half of it bounds the bias of verifying against the quantised truncation, by data processing as
    in docs/theory.md, (22). Unlike N(k) it need not fall with k: rounding a small probability up
    can cost more than leaving it in the tail.

    Parameters
    ----------
    x : array (..., V)
    sizes : sequence of int
        k in 1..V.
    prob_bits : int
        b in 1..24.

    Returns
    -------
    array (..., len(sizes))

    Raises
    ------
    ValueError
        If x is not a distribution, or a k or b is out of range.

    Source: docs/theory.md, (22).
    """
    check_distribution(x, "x")
    _check_bits(prob_bits)
    rows = Head.rows(x)
    xp = array_namespace(rows)
    vocab = rows.shape[-1]
    check_sizes(min(sizes), max(sizes), vocab)
    shape = (rows.shape[0], len(sizes))
    grid = xp.broadcast_to(xp.asarray(sizes, dtype=xp.int64, device=device(rows)), shape)
    values = _quantised_deviation(Head.of(rows, vocab), grid, prob_bits)
    return Head.restore(values, x, (*x.shape[:-1], len(sizes)))


def _quantised_deviation(head: Head, sizes: Array, prob_bits: int) -> Array:
    """N_b(k) at sizes (B, G) from whole sorted distributions."""
    xp = array_namespace(sizes)
    vocab = head.vocab_size
    steps = 2**prob_bits - 1
    most = int(xp.max(sizes))
    codes = probability_codes(head.values[:, :most], prob_bits)
    num_coded = xp.sum(xp.astype(codes > 0, xp.int64), axis=-1, keepdims=True)
    kept = xp.minimum(sizes, num_coded)  # tokens of the message whose code is positive
    inside = kept > 0
    last = xp.clip(kept, 1, None) - 1

    def prefix(values: Array) -> Array:
        sums = xp.take_along_axis(xp.cumulative_sum(values, axis=-1), last, axis=-1)
        return xp.where(inside, sums, 0 * sums)

    sent = prefix(codes) / steps
    error = prefix(xp.abs(head.values[:, :most] - codes / steps))
    mass = prefix(head.values[:, :most])
    num_tail = xp.astype(vocab - kept, mass.dtype)
    level = (1.0 - sent) / xp.clip(num_tail, 1.0, None)
    crossing = xp.maximum(head.count_above(level), kept)
    above = xp.where(crossing > 0, head.kept_mass(xp.clip(crossing, 1, None)), 0 * mass)
    excess = above - mass - xp.astype(crossing - kept, mass.dtype) * level
    tail_mass = head.prefix[:, -1:] - mass
    tail_error = xp.clip(2.0 * excess - (tail_mass - num_tail * level), 0.0, None)
    total = error + tail_error
    full = kept == vocab
    if bool(xp.any(full)):
        whole = codes / xp.sum(codes, axis=-1, keepdims=True)
        rescaled = xp.sum(xp.abs(head.values - whole), axis=-1, keepdims=True)
        total = xp.where(full, rescaled, total)
    return total


@dataclass(frozen=True)
class PayloadChoice:
    """The best message within a budget, one for each context or one for all.

    Attributes
    ----------
    num_entries : int array (...)
        k.
    prob_bits : int array (...)
        b.
    payload_bits : int array (...)
        k (b + ceil(log2 V)); which k and b were chosen is not charged.
    bias_bound : float array (...)
        N_b(k)/2.
    """

    num_entries: np.ndarray
    prob_bits: np.ndarray
    payload_bits: np.ndarray
    bias_bound: np.ndarray


def optimal_payload(
    x: Array,
    budget_bits: int,
    prob_bits: Sequence[int] = PROB_BITS,
    fixed: bool = False,
) -> PayloadChoice:
    r"""Entries and bits that minimise the bias bound under a payload budget.

    .. math:: \min_{k, b} \tfrac12 N_b(k) \quad\text{subject to}\quad
              k\,(b + \lceil \log_2 V \rceil) \le B

    Searched exhaustively: all k for each b. Of equal bounds the one with fewer bits is taken.

    Parameters
    ----------
    x : array (N, V)
        Distributions.
    budget_bits : int
        B, at least 1 + ceil(log2 V).
    prob_bits : sequence of int
        The b to try, each in 1..24.
    fixed : bool
        False: a choice for each row. True: one choice for all rows that minimises the mean bound.

    Returns
    -------
    PayloadChoice
        Arrays (N,), or () if fixed; numpy for torch input too.

    Raises
    ------
    ValueError
        If x is not a distribution, the budget does not pay for one entry, or b is out of range.

    Source: docs/theory.md, (18), (22).
    """
    check_distribution(x, "x")
    rows = Head.rows(x)
    xp = array_namespace(rows)
    num_rows, vocab = rows.shape
    index = index_bits(vocab)
    affordable = [b for b in prob_bits if budget_bits >= b + index]
    if not affordable:
        raise ValueError(
            f"budget_bits = {budget_bits}: allowed is >= {min(prob_bits) + index}, the cost of one "
            f"entry of {min(prob_bits)} bits with its index"
        )
    head = Head.of(rows, vocab)
    shape = () if fixed else (num_rows,)
    best = PayloadChoice(
        np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, int), np.full(shape, np.inf)
    )
    for b in affordable:
        _check_bits(b)
        most = min(vocab, budget_bits // (b + index))
        grid = xp.broadcast_to(xp.arange(1, most + 1, device=device(rows)), (num_rows, most))
        deviation = _quantised_deviation(head, grid, b)
        bound = np.asarray(deviation.cpu() if is_torch_array(deviation) else deviation) / 2
        bound = bound.mean(axis=0) if fixed else bound
        size = np.argmin(bound, axis=-1) + 1
        value = np.min(bound, axis=-1)
        cost = size * (b + index)
        better = (value < best.bias_bound) | (
            (value == best.bias_bound) & (cost < best.payload_bits)
        )
        best = PayloadChoice(
            np.where(better, size, best.num_entries),
            np.where(better, b, best.prob_bits),
            np.where(better, cost, best.payload_bits),
            np.where(better, value, best.bias_bound),
        )
    return best
