"""Vocabulary truncation: what k probabilities cost, bounds on it, and the size to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device

from hlmtheory.acceptance import rejection_probability, residual_distribution
from hlmtheory.domain import (
    Array,
    check_distribution,
    check_positive,
    check_same_shape,
    check_unit_interval,
)
from hlmtheory.head import Head, check_sizes, tail_level
from hlmtheory.order import largest, put_along_last_axis
from hlmtheory.threads import map_rows

HEAD_SIZE = 16384
"""Entries of a distribution looked at first; a row whose tail reaches further is redone whole."""


def truncated_distribution(x: Array, size: Array | int) -> Array:
    r"""Top-k of a distribution x (..., V) with a uniform tail, (..., V).

    .. math:: \hat x_i = x_i \;(i \le k), \qquad
              \hat x_i = \frac{1 - \sum_{j \le k} x_j}{V - k} \;(i > k)

    with tokens numbered by falling probability and k in 1..V, for all rows or one for each (...);
    docs/theory.md, (17). k = V recovers x. Which of several equally likely tokens at the edge are
    kept is not specified: N(k) does not depend on it, the exact bias (21) does. Half-precision
    logits make such ties common.

    Raises
    ------
    ValueError
        If x is not a distribution or a size lies outside 1..V.

    Source: CU-HLM (arXiv 2505.11788), eq. 16, second-hand.
    """
    check_distribution(x, "x")
    vocab = x.shape[-1]
    xp = array_namespace(x)
    if isinstance(size, int | np.integer):
        check_sizes(int(size), int(size), vocab)
        if size == vocab:
            return xp.asarray(x, copy=True)
        values, indices = largest(x, int(size))
        level = tail_level(xp.sum(values, axis=-1), int(size), vocab)
        base = xp.broadcast_to(level[..., None], x.shape)
        return put_along_last_axis(base, indices, values)
    most = int(xp.max(size))
    check_sizes(int(xp.min(size)), most, vocab)
    values, indices = largest(x, most)
    inside = xp.arange(most, device=device(x)) < size[..., None]
    kept = xp.sum(xp.where(inside, values, xp.zeros_like(values)), axis=-1)
    level = tail_level(kept, size, vocab)[..., None]
    # A row with k = V keeps every entry, so its level is never written.
    base = xp.broadcast_to(level, x.shape)
    return put_along_last_axis(base, indices, xp.where(inside, values, level))


def tail_deviation(x: Array) -> Array:
    r"""L1 distance between a distribution and each of its truncations.

    .. math:: N(k) = \sum_{i > k} |x_i - \hat x_i|
              = 2 \sum_{i > k} \max(x_i - c_k, 0), \quad c_k = \frac{1 - S_k}{V - k}

    N(1), ..., N(V) of x (..., V), in its precision, at once in O(V log V): one sort, prefix sums
    S_k, and a binary search for the place where the sorted probabilities cross c_k. N(V) = 0; for
    the law concentrated on one token and for the uniform one N = 0 throughout.

    N never increases. Let D(A) be the sum of |a - mean(A)| over a tail A, and a_0 the entry that
    k + 1 takes out of it. The mean of the rest lies |a_0 - mean(A)|/(|A| - 1) away from mean(A),
    so D(rest) <= sum over the rest of |a - mean(A)| + |a_0 - mean(A)| = D(A).

    Raises
    ------
    ValueError
        If x is not a distribution.

    Source: docs/theory.md, (17); the quantity is CU-HLM's.
    """
    check_distribution(x, "x")
    rows = Head.rows(x)
    xp = array_namespace(rows)
    vocab = rows.shape[-1]
    sizes = xp.broadcast_to(xp.arange(1, vocab + 1, device=device(rows)), rows.shape)
    return Head.restore(Head.of(rows, vocab).deviation(sizes), x, tuple(x.shape))


def tail_deviation_at(x: Array, sizes: Sequence[int]) -> Array:
    r"""N(k) of :func:`tail_deviation` at a few k in 1..V, (..., len(sizes)), without a full sort.

    Only entries above c_k enter N(k), and c_k falls with k: the head of x down to the smallest
    c_k wanted is enough, and where it proves too short the row is redone whole.

    Raises
    ------
    ValueError
        If x is not a distribution or a size lies outside 1..V.
    """
    check_distribution(x, "x")
    rows = Head.rows(x)
    xp = array_namespace(rows)
    check_sizes(min(sizes), max(sizes), rows.shape[-1])
    parts = map_rows(lambda part: _deviation_at(rows[part], sizes), len(rows), x)
    deviation = xp.concat(parts)
    return Head.restore(deviation, x, (*x.shape[:-1], len(sizes)))


def _deviation_at(rows: Array, sizes: Sequence[int]) -> Array:
    """N(k) of rows (B, V), (B, G)."""
    xp, vocab = array_namespace(rows), rows.shape[-1]
    shape = (rows.shape[0], len(sizes))
    grid = xp.broadcast_to(xp.asarray(sizes, dtype=xp.int64, device=device(rows)), shape)
    below_vocab = max((k for k in sizes if k < vocab), default=1)
    num = min(vocab, max(HEAD_SIZE, 8 * below_vocab))
    head = Head.of(rows, num)
    inside = xp.clip(grid, None, num)  # k = V needs no head: its N is set to zero
    short = ~xp.all(head.reaches(inside) | (grid >= vocab), axis=-1)
    deviation = xp.where(grid >= vocab, 0 * head.prefix[:, :1], head.deviation(inside))
    if bool(xp.any(short)):
        deviation[short] = Head.of(rows[short], vocab).deviation(grid[short])
    return deviation


def online_bound_denominator(draft_prob: Array, rejection_prob: Array, eta: float = 1.0) -> Array:
    r"""Denominator of CU-HLM's bound on the truncation bias.

    .. math:: D = (1 - x_d)\, l(-1) + x_d\, l(-\beta_d), \qquad l(z) = \ln(1 + e^{\eta z})/\eta

    docs/theory.md, (19). 0 < D <= l(0) = ln(2)/eta, with equality at x_d = 1 and beta_d = 0.

    Parameters
    ----------
    draft_prob, rejection_prob : array (...)
        x_d and, from the fitted line, the predicted beta_d.
    eta : float
        Sharpness of the soft maximum, > 0. Default 1, the replications' choice.

    Raises
    ------
    ValueError
        If a probability leaves [0, 1] or eta is not positive.

    Source: CU-HLM (arXiv 2505.11788), eq. 26, second-hand.
    """
    check_unit_interval(draft_prob, "draft_prob")
    check_unit_interval(rejection_prob, "rejection_prob")
    check_positive(eta, "eta")
    xp = array_namespace(draft_prob, rejection_prob)
    at_minus_one = float(np.log1p(np.exp(-eta)) / eta)
    return (1.0 - draft_prob) * at_minus_one + draft_prob * xp.log1p(
        xp.exp(-eta * rejection_prob)
    ) / eta


def truncation_bound_soft(
    deviation: Array, draft_prob: Array, rejection_prob: Array, eta: float = 1.0
) -> Array:
    r"""CU-HLM's bound on the bias of verifying against a truncation: U_TV = N(k)/D.

    docs/theory.md, (19), from N(k) (...) in [0, 2] and the arguments of
    :func:`online_bound_denominator`. 0 at k = V; not clipped: values above 1 say nothing.

    Valid when eta >= ln(2)/2 = 0.347, for then D <= 2 and U_TV >= N(k)/2, the bound (22). With a
    softer maximum U_TV shrinks in proportion to eta and falls below the exact bias.

    Source: CU-HLM (arXiv 2505.11788), eq. 26, second-hand.
    """
    return deviation / online_bound_denominator(draft_prob, rejection_prob, eta)


def truncation_bias_bound(deviation: Array) -> Array:
    r"""Bound on the bias of verifying against a truncation: N(k)/2 = TV(x, xhat).

    docs/theory.md, (22): accept/resample against xhat maps xhat to y and the draft law x to the
    output, so data processing gives TV(output, y) <= TV(x, xhat). It needs nothing of the server,
    and no such bound is smaller: for y = xhat every draft is accepted and the bias is N(k)/2.

    It is 2/D times smaller than :func:`truncation_bound_soft`, which lies in
    [2 eta/ln 2, 2 eta/ln(1 + e^-eta)]: 2.885 to 6.384 for eta = 1.
    """
    return deviation / 2


def truncation_bias(x: Array, y: Array, size: Array | int) -> Array:
    r"""Exact bias of drafting from x and verifying against its truncation.

    .. math:: \mathrm{TV}(P, y), \quad
              P_v = x_v \min(1, y_v/\hat x_v) + Z\, r_v, \quad
              Z = \sum_v x_v \max(0, 1 - y_v/\hat x_v)

    with r the normalised max(y - xhat, 0). 0 for k = V; never above N(k)/2.

    Parameters
    ----------
    x, y : array (..., V)
        Device and server distributions.
    size : int or integer array (...)
        k in 1..V.

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or a size lies outside 1..V.

    Source: docs/theory.md, (21).
    """
    reference = truncated_distribution(x, size)
    check_same_shape(x, y, "x", "y")
    xp = array_namespace(x, y)
    rejected = x * rejection_probability(reference, y)
    num_rejected = xp.sum(rejected, axis=-1, keepdims=True)
    output = x - rejected + num_rejected * residual_distribution(reference, y)
    return xp.sum(xp.abs(output - y), axis=-1) / 2


def online_truncation_size(
    x: Array, draft_prob: Array, rejection_prob: Array, theta: float = 0.1, eta: float = 1.0
) -> Array:
    r"""Smallest size whose bound is within a tolerance, for each context.

    .. math:: k^* = \min\{k : N(k) \le \theta D\}

    docs/theory.md, (19). N never increases in k (:func:`tail_deviation`), so bisection finds the
    first k that meets the tolerance; it runs on the head of the distribution, and on all of it
    only where the head does not settle the answer. k = V always meets it.

    Parameters
    ----------
    x : array (..., V)
        Distributions.
    draft_prob, rejection_prob, eta
        As in :func:`online_bound_denominator`.
    theta : float
        Tolerance on U_TV, > 0. 0.1 is the replications' default.

    Raises
    ------
    ValueError
        If theta or eta is not positive, or x is not a distribution.

    Source: CU-HLM (arXiv 2505.11788), eq. 26, second-hand.
    """
    check_positive(theta, "theta")
    check_distribution(x, "x")
    limits = theta * online_bound_denominator(draft_prob, rejection_prob, eta)
    rows = Head.rows(x)
    vocab = rows.shape[-1]
    limit = Head.rows(limits[..., None])
    sizes, settled = _smallest_sizes(Head.of(rows, min(vocab, HEAD_SIZE)), limit)
    xp = array_namespace(rows)
    if not bool(xp.all(settled)):
        rest = ~settled
        sizes[rest], _ = _smallest_sizes(Head.of(rows[rest], vocab), limit[rest])
    out = array_namespace(x)
    return out.reshape(out.asarray(sizes), tuple(x.shape[:-1]))


def _smallest_sizes(head: Head, limit: Array) -> tuple[Array, Array]:
    """min{k : N(k) <= limit} (B,) by bisection, and whether the head settles it, (B,) bool."""
    xp = array_namespace(head.values)
    num = head.values.shape[-1]
    ones = xp.ones((head.values.shape[0], 1), dtype=xp.int64, device=device(head.values))

    # c_k falls with k, so the sizes that the head reaches are 1..reach.
    reach = 0 * ones
    step = 1 << (num - 1).bit_length()
    while step:
        probe = xp.clip(reach + step, 1, num)
        reach = xp.where((reach + step <= num) & head.reaches(probe), reach + step, reach)
        step //= 2
    high = xp.maximum(reach, ones)
    settled = (reach >= 1) & (head.deviation(high) <= limit)
    low = 0 * ones  # a size known not to fit, or 0
    for _ in range((num - 1).bit_length() + 1):
        middle = xp.clip((low + high) // 2, 1, None)
        fits = head.deviation(middle) <= limit
        high, low = xp.where(fits, middle, high), xp.where(fits, low, middle)
    return high[:, 0], settled[:, 0]


@dataclass(frozen=True)
class OfflineTruncation:
    """A size fixed for all tokens: docs/theory.md, (20).

    `num_entries` is k*, or, not `feasible`, the largest size tried if none meets the tolerance;
    `mean_bound` the mean U_TV there over `num_tokens` tokens.
    """

    num_entries: int
    mean_bound: float
    feasible: bool
    num_tokens: int


def offline_truncation(
    bounds: np.ndarray, sizes: Sequence[int], theta: float = 0.1
) -> OfflineTruncation:
    r"""Smallest fixed size whose mean bound is within a tolerance.

    .. math:: k^* = \min\{k : E_t[U_{TV}(k)] \le \theta\}

    docs/theory.md, (20), over the sizes given: on a grid k* is rounded up to the next grid size,
    with sizes 1..V it is exact. The mean is over tokens. The paper's optimum for its models is 30.

    Parameters
    ----------
    bounds : float array (N, G), or (G,) if averaged already
        U_TV of each token at each of the G rising sizes; rows with NaN are left out.
    sizes : sequence of int
    theta : float
        Tolerance, > 0.

    Raises
    ------
    ValueError
        If no row is complete, the sizes do not rise, or theta is not positive.

    Source: CU-HLM (arXiv 2505.11788), eq. 24, second-hand.
    """
    check_positive(theta, "theta")
    table = np.atleast_2d(np.asarray(bounds))
    if table.shape[1] != len(sizes) or any(np.diff(np.asarray(sizes)) < 0):
        raise ValueError(
            f"sizes has {len(sizes)} entries for {table.shape[1]} columns of bounds: give rising "
            "sizes, one for each column"
        )
    known = table[np.isfinite(table).all(axis=1)]
    if len(known) == 0:
        raise ValueError("bounds has no complete row: give at least one token")
    mean = known.mean(axis=0)
    fits = mean <= theta
    index = int(np.argmax(fits)) if fits.any() else len(sizes) - 1
    return OfflineTruncation(int(sizes[index]), float(mean[index]), bool(fits.any()), len(known))
