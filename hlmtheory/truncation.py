"""Vocabulary truncation: what k probabilities cost, bounds on it, and the size to send."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace, device

from hlmtheory.acceptance import rejection_probability
from hlmtheory.domain import (
    Array,
    check_distribution,
    check_positive,
    check_same_shape,
    check_unit_interval,
)
from hlmtheory.order import largest, put_along_last_axis


def _check_sizes(low: int, high: int, vocab_size: int) -> None:
    if low < 1 or high > vocab_size:
        raise ValueError(f"size = {low if low < 1 else high}: allowed is 1 to V = {vocab_size}")


def tail_level(kept_mass: Array, size: Array | int, vocab_size: int) -> Array:
    """Probability of each token of a uniform tail: (1 - kept mass)/(V - k), 0 for k = V."""
    xp = array_namespace(kept_mass)
    num_tail = vocab_size - size
    if isinstance(num_tail, int | np.integer):
        num_tail = max(int(num_tail), 1)
    else:
        num_tail = xp.astype(xp.clip(num_tail, 1, None), kept_mass.dtype)
    level = xp.clip(1.0 - kept_mass, 0.0, None) / num_tail
    return xp.where(kept_mass * 0 + size >= vocab_size, xp.zeros_like(level), level)


def truncated_distribution(x: Array, size: Array | int) -> Array:
    r"""Top-k of a distribution with a uniform tail.

    .. math:: \hat x_i = x_i \;(i \le k), \qquad
              \hat x_i = \frac{1 - \sum_{j \le k} x_j}{V - k} \;(i > k)

    with tokens numbered by falling probability; docs/theory.md, (17).

    Parameters
    ----------
    x : array (..., V)
        Distribution.
    size : int or integer array (...)
        k in 1..V, for all rows or one for each.

    Returns
    -------
    array (..., V)
        k = V recovers x. Among tokens of equal probability at the edge, which are kept is not
        specified.

    Source: CU-HLM (arXiv 2505.11788), eq. 16, second-hand.
    """
    check_distribution(x, "x")
    vocab = x.shape[-1]
    xp = array_namespace(x)
    if isinstance(size, int | np.integer):
        _check_sizes(int(size), int(size), vocab)
        values, indices = largest(x, int(size))
        kept = xp.sum(values, axis=-1)
        level = tail_level(kept, int(size), vocab)
        base = xp.broadcast_to(level[..., None], x.shape)
        return put_along_last_axis(base, indices, values)
    most = int(xp.max(size))
    _check_sizes(int(xp.min(size)), most, vocab)
    values, indices = largest(x, most)
    rank = xp.arange(most, device=device(x))
    inside = rank < size[..., None]
    kept = xp.sum(xp.where(inside, values, xp.zeros_like(values)), axis=-1)
    level = tail_level(kept, size, vocab)[..., None]
    base = xp.broadcast_to(level, x.shape)
    return put_along_last_axis(base, indices, xp.where(inside, values, level))


def tail_deviation(x: Array) -> Array:
    r"""L1 distance between a distribution and each of its truncations.

    .. math:: N(k) = \sum_{i > k} |x_i - \hat x_i|
              = 2 \sum_{i > k} \max(x_i - c_k, 0), \quad c_k = \frac{1 - S_k}{V - k}

    docs/theory.md, (17), for all k at once in O(V log V): one sort, prefix sums S_k, and a binary
    search for the place where the sorted probabilities cross c_k.

    Parameters
    ----------
    x : array (..., V)
        Distribution.

    Returns
    -------
    array (..., V)
        N(1), ..., N(V); N(V) = 0. N never increases: see docs/theory.md, (17).
    """
    check_distribution(x, "x")
    xp = array_namespace(x)
    vocab = x.shape[-1]
    ordered = xp.sort(x, axis=-1, descending=True)
    prefix = xp.cumulative_sum(ordered, axis=-1)  # S_1..S_V
    sizes = xp.arange(1, vocab + 1, device=device(x))
    levels = tail_level(prefix, sizes, vocab)
    # Number of entries above c_k, found in the rising order that searchsorted wants.
    rising = xp.flip(ordered, axis=-1)
    flat_rising = xp.reshape(rising, (-1, vocab))
    flat_levels = xp.reshape(levels, (-1, vocab))
    above = xp.stack(
        [
            vocab - xp.searchsorted(flat_rising[i], flat_levels[i], side="right")
            for i in range(flat_rising.shape[0])
        ]
    )
    above = xp.reshape(above, x.shape)
    count = xp.clip(above, sizes, None)  # crossover index, at least k
    mass = xp.take_along_axis(prefix, count - 1, axis=-1) - prefix
    excess = mass - xp.astype(count - sizes, x.dtype) * levels
    return xp.clip(2.0 * excess, 0.0, None)


def tail_deviation_at(x: Array, sizes: Sequence[int]) -> Array:
    r"""N(k) of :func:`tail_deviation` at a few k only, without sorting the vocabulary.

    .. math:: N(k) = 2\Big[\sum_i \max(x_i - c_k, 0) - S_k + k c_k\Big]

    for the k likeliest tokens all lie above their tail's mean c_k.

    Parameters
    ----------
    x : array (..., V)
        Distribution.
    sizes : sequence of int
        k in 1..V, rising.

    Returns
    -------
    array (..., len(sizes))
    """
    check_distribution(x, "x")
    xp = array_namespace(x)
    vocab = x.shape[-1]
    _check_sizes(min(sizes), max(sizes), vocab)
    prefix = xp.cumulative_sum(largest(x, max(sizes))[0], axis=-1)
    columns = []
    for size in sizes:
        if size == vocab:
            columns.append(xp.zeros_like(prefix[..., 0]))
            continue
        kept = prefix[..., size - 1]
        level = tail_level(kept, size, vocab)
        above = xp.sum(xp.clip(x - level[..., None], 0.0, None), axis=-1)
        columns.append(xp.clip(2.0 * (above - kept + size * level), 0.0, None))
    return xp.stack(columns, axis=-1)


def online_bound_denominator(draft_prob: Array, rejection_prob: Array, eta: float = 1.0) -> Array:
    r"""Denominator of CU-HLM's bound on the truncation bias.

    .. math:: D = (1 - x_d)\, l(-1) + x_d\, l(-\beta_d), \qquad l(z) = \ln(1 + e^{\eta z})/\eta

    docs/theory.md, (19).

    Parameters
    ----------
    draft_prob : array (...)
        x_d in [0, 1].
    rejection_prob : array (...)
        Predicted beta_d in [0, 1], from the fitted line.
    eta : float
        Sharpness of the soft maximum, > 0. Default 1, the replications' choice.

    Returns
    -------
    array (...)
        Positive values.

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

    docs/theory.md, (19). At k = V it is 0.

    Parameters
    ----------
    deviation : array (...)
        N(k) of the context.
    draft_prob, rejection_prob : array (...)
    eta : float

    Returns
    -------
    array (...)

    Source: CU-HLM (arXiv 2505.11788), eq. 26, second-hand.
    """
    return deviation / online_bound_denominator(draft_prob, rejection_prob, eta)


def truncation_bias_bound(deviation: Array) -> Array:
    r"""Bound on the bias of verifying against a truncation: N(k)/2 = TV(x, xhat).

    docs/theory.md, (22), by data processing; it needs nothing of the server and is at least
    2/D times smaller than :func:`truncation_bound_soft`, which is at least 2.88 for eta = 1.
    """
    return deviation / 2


def truncation_bias(x: Array, y: Array, size: Array | int) -> Array:
    r"""Exact bias of drafting from x and verifying against its truncation.

    .. math:: \mathrm{TV}(P, y), \quad
              P_v = x_v \min(1, y_v/\hat x_v) + Z\, r_v, \quad
              Z = \sum_v x_v \max(0, 1 - y_v/\hat x_v)

    with r the normalised max(y - xhat, 0); docs/theory.md, (21).

    Parameters
    ----------
    x, y : array (..., V)
        Device and server distributions.
    size : int or integer array (...)
        k in 1..V.

    Returns
    -------
    array (...)
        0 for k = V; never above N(k)/2.
    """
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    xp = array_namespace(x, y)
    reference = truncated_distribution(x, size)
    accepted = x * (1.0 - rejection_probability(reference, y))
    excess = xp.clip(y - reference, 0.0, None)
    mass = xp.sum(excess, axis=-1, keepdims=True)
    rejected = 1.0 - xp.sum(accepted, axis=-1, keepdims=True)
    empty = mass <= 0
    law = xp.where(empty, y, excess / xp.where(empty, xp.ones_like(mass), mass))
    return xp.sum(xp.abs(accepted + rejected * law - y), axis=-1) / 2


def online_truncation_size(
    x: Array, draft_prob: Array, rejection_prob: Array, theta: float = 0.1, eta: float = 1.0
) -> Array:
    r"""Smallest size whose bound is within a tolerance, for each context.

    .. math:: k^* = \min\{k : N(k) \le \theta D\}

    docs/theory.md, (19). N never increases in k, so the first k that meets the tolerance is found
    by bisection between powers of two. k = V always meets it.

    Parameters
    ----------
    x : array (B, V)
        Distributions.
    draft_prob, rejection_prob : array (B,)
        x_d and the predicted beta_d.
    theta : float
        Tolerance on U_TV, > 0. 0.1 is the replications' default.
    eta : float

    Returns
    -------
    integer array (B,)
        k* in 1..V.

    Raises
    ------
    ValueError
        If theta or eta is not positive, or x is not a distribution.

    Source: CU-HLM (arXiv 2505.11788), eq. 26, second-hand.
    """
    check_positive(theta, "theta")
    check_distribution(x, "x")
    xp = array_namespace(x)
    limits = theta * online_bound_denominator(draft_prob, rejection_prob, eta)
    sizes = [_online_size_row(x[i], float(limits[i])) for i in range(x.shape[0])]
    return xp.asarray(sizes, dtype=xp.int64, device=device(x))


def _online_size_row(row: Array, limit: float) -> int:
    """min{k : N(k) <= limit} of one distribution (V,)."""
    xp = array_namespace(row)
    vocab = row.shape[0]
    num = min(32, vocab)
    prefix = xp.cumulative_sum(largest(row, num)[0], axis=-1)

    def fits(size: int) -> bool:
        if size >= vocab:
            return True
        kept = prefix[size - 1]
        level = tail_level(kept, size, vocab)
        above = xp.sum(xp.clip(row - level, 0.0, None))
        return bool(2.0 * (above - kept + size * level) <= limit)

    low = 0  # largest size known not to fit
    while not fits(num):
        low = num
        num = min(8 * num, vocab)
        prefix = xp.cumulative_sum(largest(row, num)[0], axis=-1)
    high = num
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def offline_truncation_size(bounds: np.ndarray, sizes: Sequence[int], theta: float = 0.1) -> int:
    r"""Smallest fixed size whose mean bound is within a tolerance.

    .. math:: k^* = \min\{k : E_t[U_{TV}(k)] \le \theta\}

    docs/theory.md, (20), over the sizes given. The paper's optimum for its models is k* = 30.

    Parameters
    ----------
    bounds : float array (N, G)
        U_TV of each token at each size; rows with NaN are left out.
    sizes : sequence of int
        The G sizes, rising.
    theta : float
        Tolerance, > 0.

    Returns
    -------
    int
        The largest size if none meets the tolerance.

    Source: CU-HLM (arXiv 2505.11788), eq. 24, second-hand.
    """
    check_positive(theta, "theta")
    known = bounds[np.isfinite(bounds).all(axis=1)]
    if len(known) == 0:
        raise ValueError("bounds has no complete row: give at least one token")
    fits = known.mean(axis=0) <= theta
    return int(sizes[int(np.argmax(fits))] if fits.any() else sizes[-1])
