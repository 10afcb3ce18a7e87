"""Vocabulary truncation: what k probabilities cost, bounds on it, and the size to send.

The work here is finding the head of a distribution. numpy partitions and sorts plain values an
order of magnitude faster than torch on a processor, so tensors in main memory are read as numpy
arrays (the same memory, no copy); on an accelerator the same formulas run on torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

from hlmtheory.acceptance import rejection_probability, residual_distribution, total_variation
from hlmtheory.domain import (
    Array,
    check_distribution,
    check_positive,
    check_same_shape,
    check_unit_interval,
)
from hlmtheory.order import largest, put_along_last_axis

HEAD_SIZE = 16384
"""Entries of a distribution looked at first; a row whose tail reaches further is redone whole."""


def _check_sizes(low: int, high: int, vocab_size: int) -> None:
    if low < 1 or high > vocab_size:
        raise ValueError(f"size = {low if low < 1 else high}: allowed is 1 to V = {vocab_size}")


def tail_level(kept_mass: Array, size: Array | int, vocab_size: int) -> Array:
    """Probability of each token of a uniform tail: (1 - kept mass)/(V - k), 0 for k = V."""
    xp = array_namespace(kept_mass)
    if isinstance(size, int | np.integer):
        level = xp.clip(1.0 - kept_mass, 0.0, None) / max(vocab_size - int(size), 1)
        return level if size < vocab_size else xp.zeros_like(level)
    num_tail = xp.astype(xp.clip(vocab_size - size, 1, None), kept_mass.dtype)
    level = xp.clip(1.0 - kept_mass, 0.0, None) / num_tail
    return xp.where(size >= vocab_size, xp.zeros_like(level), level)


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
        specified; N(k) does not depend on it.

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
        _check_sizes(int(size), int(size), vocab)
        if size == vocab:
            return xp.asarray(x, copy=True)
        values, indices = largest(x, int(size))
        level = tail_level(xp.sum(values, axis=-1), int(size), vocab)
        base = xp.broadcast_to(level[..., None], x.shape)
        return put_along_last_axis(base, indices, values)
    most = int(xp.max(size))
    _check_sizes(int(xp.min(size)), most, vocab)
    values, indices = largest(x, most)
    inside = xp.arange(most, device=device(x)) < size[..., None]
    kept = xp.sum(xp.where(inside, values, xp.zeros_like(values)), axis=-1)
    level = tail_level(kept, size, vocab)[..., None]
    # A row with k = V keeps every entry, so its level is never written.
    base = xp.broadcast_to(level, x.shape)
    return put_along_last_axis(base, indices, xp.where(inside, values, level))


def _in_main_memory(x: Array) -> Array:
    """`x` (..., V) as (B, V), a numpy view wherever it lies in main memory; float32 or float64."""
    if "float32" not in str(x.dtype) and "float64" not in str(x.dtype):
        xp = array_namespace(x)
        x = xp.astype(x, xp.float32)  # half precision has no fast sort, and no numpy form
    if is_torch_array(x) and x.device.type == "cpu":
        x = x.detach().numpy()
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class _Head:
    """The largest entries of each row, falling, with running sums in float64: both (B, M)."""

    values: Array
    prefix: Array
    vocab_size: int

    @classmethod
    def of(cls, rows: Array, num: int) -> _Head:
        """The `num` largest entries of rows (B, V) as float64."""
        vocab = rows.shape[-1]
        if is_torch_array(rows):
            top = largest(rows, num)[0].double()
            return cls(top, top.cumsum(-1), vocab)
        top = rows if num == vocab else np.partition(rows, vocab - num, axis=-1)[:, vocab - num :]
        top = np.sort(top, axis=-1)[:, ::-1].astype(np.float64)
        return cls(top, np.cumsum(top, axis=-1), vocab)

    def count_above(self, levels: Array) -> Array:
        """How many of each row's entries exceed levels (B, G); the integers (B, G)."""
        num = self.values.shape[-1]
        if is_torch_array(levels):
            xp = array_namespace(levels)
            return num - xp.searchsorted(self.values.flip(-1), levels.contiguous(), side="right")
        rising = self.values[:, ::-1]
        return np.stack(
            [
                num - np.searchsorted(row, level, side="right")
                for row, level in zip(rising, levels, strict=True)
            ]
        )

    def kept_mass(self, sizes: Array) -> Array:
        """S_k at sizes (B, G) within the head."""
        return array_namespace(sizes).take_along_axis(self.prefix, sizes - 1, axis=-1)

    def reaches(self, sizes: Array) -> Array:
        """Whether all entries above the tail level c_k lie in the head, (B, G)."""
        if self.values.shape[-1] == self.vocab_size:
            return sizes > 0
        level = tail_level(self.kept_mass(sizes), sizes, self.vocab_size)
        return self.values[:, -1:] <= level

    def deviation(self, sizes: Array) -> Array:
        """N(k) at sizes (B, G) that the head reaches."""
        xp = array_namespace(sizes)
        kept = self.kept_mass(sizes)
        level = tail_level(kept, sizes, self.vocab_size)
        last = xp.maximum(self.count_above(level), sizes)  # crossover: x_i > c_k for i <= last
        excess = self.kept_mass(last) - kept - xp.astype(last - sizes, kept.dtype) * level
        return xp.where(sizes >= self.vocab_size, 0 * kept, xp.clip(2.0 * excess, 0.0, None))


def tail_deviation(x: Array) -> Array:
    r"""L1 distance between a distribution and each of its truncations.

    .. math:: N(k) = \sum_{i > k} |x_i - \hat x_i|
              = 2 \sum_{i > k} \max(x_i - c_k, 0), \quad c_k = \frac{1 - S_k}{V - k}

    docs/theory.md, (17), for all k at once in O(V log V): one sort, prefix sums S_k, and a binary
    search for the place where the sorted probabilities cross c_k.

    N never increases. Let D(A) be the sum of |a - mean(A)| over the tail A, and a_0 the entry that
    k + 1 takes out of it. The mean of A without a_0 lies |a_0 - mean(A)|/(|A| - 1) away from
    mean(A), so D(A without a_0) <= sum over A without a_0 of |a - mean(A)| + |a_0 - mean(A)| = D(A).

    Parameters
    ----------
    x : array (..., V)
        Distribution.

    Returns
    -------
    array (..., V)
        N(1), ..., N(V), in the precision of x; N(V) = 0. For the law concentrated on one token
        and for the uniform one N = 0 throughout.

    Raises
    ------
    ValueError
        If x is not a distribution.

    Source: docs/theory.md, (17); the quantity is CU-HLM's.
    """
    check_distribution(x, "x")
    rows = _in_main_memory(x)
    xp = array_namespace(rows)
    vocab = rows.shape[-1]
    sizes = xp.broadcast_to(xp.arange(1, vocab + 1, device=device(rows)), rows.shape)
    return _like(_Head.of(rows, vocab).deviation(sizes), x, tuple(x.shape))


def tail_deviation_at(x: Array, sizes: Sequence[int]) -> Array:
    r"""N(k) of :func:`tail_deviation` at a few k only, without sorting the vocabulary.

    Only entries above c_k enter N(k), and c_k falls with k: the head of x down to the smallest
    c_k wanted is enough, and where it proves too short the row is redone whole.

    Parameters
    ----------
    x : array (..., V)
        Distribution.
    sizes : sequence of int
        k in 1..V.

    Returns
    -------
    array (..., len(sizes))
        In the precision of x, summed in float64.

    Raises
    ------
    ValueError
        If x is not a distribution or a size lies outside 1..V.

    Source: docs/theory.md, (17).
    """
    check_distribution(x, "x")
    rows = _in_main_memory(x)
    xp = array_namespace(rows)
    vocab = rows.shape[-1]
    _check_sizes(min(sizes), max(sizes), vocab)
    shape = (rows.shape[0], len(sizes))
    grid = xp.broadcast_to(xp.asarray(sizes, dtype=xp.int64, device=device(rows)), shape)
    below_vocab = max((k for k in sizes if k < vocab), default=1)
    num = min(vocab, max(HEAD_SIZE, 4 * below_vocab))
    head = _Head.of(rows, num)
    inside = xp.clip(grid, None, num)  # k = V needs no head: its N is set to zero
    short = ~xp.all(head.reaches(inside) | (grid >= vocab), axis=-1)
    deviation = xp.where(grid >= vocab, 0 * head.prefix[:, :1], head.deviation(inside))
    if bool(xp.any(short)):
        deviation[short] = _Head.of(rows[short], vocab).deviation(grid[short])
    return _like(deviation, x, (*x.shape[:-1], len(sizes)))


def _like(values: Array, x: Array, shape: tuple[int, ...]) -> Array:
    """`values` in the namespace, precision and place of x."""
    xp = array_namespace(x)
    if is_torch_array(x) and not is_torch_array(values):
        values = xp.asarray(values)
    return xp.astype(xp.reshape(values, shape), x.dtype, copy=False)


def online_bound_denominator(draft_prob: Array, rejection_prob: Array, eta: float = 1.0) -> Array:
    r"""Denominator of CU-HLM's bound on the truncation bias.

    .. math:: D = (1 - x_d)\, l(-1) + x_d\, l(-\beta_d), \qquad l(z) = \ln(1 + e^{\eta z})/\eta

    docs/theory.md, (19). 0 < D <= l(0) = ln(2)/eta, with equality at x_d = 1 and beta_d = 0.

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

    docs/theory.md, (19). At k = V it is 0.

    Valid when eta >= ln(2)/2 = 0.347, for then D <= 2 and U_TV >= N(k)/2, the bound (22). With a
    softer maximum U_TV shrinks in proportion to eta and falls below the exact bias.

    Parameters
    ----------
    deviation : array (...)
        N(k) of the context, in [0, 2].
    draft_prob, rejection_prob : array (...)
        x_d and the predicted beta_d, in [0, 1].
    eta : float
        Sharpness of the soft maximum, > 0.

    Returns
    -------
    array (...)
        Not clipped: values above 1 say nothing.

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

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or a size lies outside 1..V.

    Source: docs/theory.md, (21).
    """
    return reference_law_bias(x, y, truncated_distribution(x, size))


def reference_law_bias(x: Array, y: Array, reference: Array) -> Array:
    """Exact bias of drafting from x and verifying against any law: docs/theory.md, (21).

    Zero where the reference is x; never above TV(x, reference), by data processing.

    Parameters
    ----------
    x, y, reference : array (..., V)
        Device and server distributions, and what the server takes for x.

    Returns
    -------
    array (...)
    """
    check_distribution(x, "x")
    check_same_shape(x, y, "x", "y")
    xp = array_namespace(x, y)
    rejected = x * rejection_probability(reference, y)
    num_rejected = xp.sum(rejected, axis=-1, keepdims=True)
    output = x - rejected + num_rejected * residual_distribution(reference, y)
    return xp.sum(xp.abs(output - y), axis=-1) / 2


def truncation_bias_at(x: Array, y: Array, sizes: Sequence[int]) -> Array:
    r"""The exact bias (21) of :func:`truncation_bias` at several k, in about one pass over V.

    A token v outside the top k with both x_v <= c_k and y_v <= c_k is accepted with probability
    y_v/c_k and never resampled, so all such tokens together enter through the sums of x, y and x y
    alone. Those of the smallest c_k are summed once; only the others are looked at for every k.

    Parameters
    ----------
    x, y : array (..., V)
        Device and server distributions.
    sizes : sequence of int
        k in 1..V.

    Returns
    -------
    array (..., len(sizes))

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or a size lies outside 1..V.

    Source: docs/theory.md, (21).
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    _check_sizes(min(sizes), max(sizes), x.shape[-1])
    rows_x, rows_y = _in_main_memory(x), _in_main_memory(y)
    if is_torch_array(rows_x):
        return array_namespace(x).stack([truncation_bias(x, y, k) for k in sizes], axis=-1)
    values = np.stack([_bias_row(p, q, sizes) for p, q in zip(rows_x, rows_y, strict=True)])
    return _like(values, x, (*x.shape[:-1], len(sizes)))


def _bias_row(x: np.ndarray, y: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The exact bias at sizes (G,) for one pair of distributions (V,)."""
    vocab = len(x)
    most = max((k for k in sizes if k < vocab), default=1)
    top = np.partition(x, vocab - most)[vocab - most :]
    smallest = float(tail_level(np.sum(top, dtype=np.float64), most, vocab))
    looked_at = (x >= min(smallest, float(np.min(top)))) | (y > smallest)
    xs, ys = x[looked_at].astype(np.float64), y[looked_at].astype(np.float64)
    order = np.argsort(-xs)
    xs, ys = xs[order], ys[order]
    zero = x.dtype.type(0)
    rest_x = np.where(looked_at, zero, x)
    sum_x, sum_y = float(np.sum(rest_x)), float(np.sum(np.where(looked_at, zero, y)))
    sum_xy = float(rest_x @ y)
    prefix = np.cumsum(xs)
    missing, excess = np.cumsum(np.maximum(xs - ys, 0.0)), np.cumsum(np.maximum(ys - xs, 0.0))
    out = np.zeros(len(sizes))
    for i, k in enumerate(sizes):
        level = float(tail_level(prefix[k - 1], k, vocab)) if k < vocab else 0.0
        if k >= vocab:
            continue
        tail_x, tail_y = xs[k:], ys[k:]
        accepted = tail_x * np.minimum(tail_y / level, 1.0) if level > 0 else tail_x
        above = np.maximum(tail_y - level, 0.0)
        rest_accepted = sum_xy / level if level > 0 else sum_x
        rejected = missing[k - 1] + np.sum(tail_x - accepted) + max(sum_x - rest_accepted, 0.0)
        residual = excess[k - 1] + np.sum(above)
        share = rejected / residual if residual > 0 else 0.0
        gap = np.sum(np.abs(accepted + share * above - tail_y))
        rest_gap = max(sum_y - rest_accepted, 0.0) if level > 0 else 0.0
        out[i] = (excess[k - 1] * abs(share - 1.0) + gap + rest_gap) / 2
    return out


def draft_from_sent_rejection(x: Array, y: Array, size: Array | int) -> Array:
    r"""Mean rejection probability when drafts are drawn from the truncated law: TV(xhat, y).

    docs/theory.md, (23): draft and verify with the law that is sent, and the output is exactly y
    for every k; the price is this many rejections instead of TV(x, y), at most N(k)/2 more.

    Parameters
    ----------
    x, y : array (..., V)
    size : int or integer array (...)

    Returns
    -------
    array (...)
        k = V recovers TV(x, y).

    Source: docs/theory.md, (23); known from quantise-sample-verify work.
    """
    return total_variation(truncated_distribution(x, size), y)


def online_truncation_size(
    x: Array, draft_prob: Array, rejection_prob: Array, theta: float = 0.1, eta: float = 1.0
) -> Array:
    r"""Smallest size whose bound is within a tolerance, for each context.

    .. math:: k^* = \min\{k : N(k) \le \theta D\}

    docs/theory.md, (19). N never increases in k (:func:`tail_deviation`), so bisection finds the
    first k that meets the tolerance; it runs on the head of the distribution, and on all of it
    only where the head does not settle the answer.

    Parameters
    ----------
    x : array (B, V)
        Distributions.
    draft_prob, rejection_prob : array (B,)
        x_d and the predicted beta_d.
    theta : float
        Tolerance on U_TV, > 0. 0.1 is the replications' default.
    eta : float
        Sharpness of the soft maximum, > 0.

    Returns
    -------
    integer array (B,)
        k* in 1..V; k = V always meets the tolerance.

    Raises
    ------
    ValueError
        If theta or eta is not positive, or x is not a distribution.

    Source: CU-HLM (arXiv 2505.11788), eq. 26, second-hand.
    """
    check_positive(theta, "theta")
    check_distribution(x, "x")
    limits = theta * online_bound_denominator(draft_prob, rejection_prob, eta)
    rows = _in_main_memory(x)
    vocab = rows.shape[-1]
    limit = _in_main_memory(limits[..., None])
    sizes, settled = _smallest_sizes(_Head.of(rows, min(vocab, HEAD_SIZE)), limit)
    xp = array_namespace(rows)
    if not bool(xp.all(settled)):
        rest = ~settled
        sizes[rest], _ = _smallest_sizes(_Head.of(rows[rest], vocab), limit[rest])
    out = array_namespace(x)
    return out.reshape(out.asarray(sizes), tuple(x.shape[:-1]))


def _smallest_sizes(head: _Head, limit: Array) -> tuple[Array, Array]:
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

    Attributes
    ----------
    num_entries : int
        k*, or the largest size tried if none meets the tolerance.
    mean_bound : float
        Mean U_TV over tokens at that size.
    feasible : bool
        Whether it meets the tolerance.
    num_tokens : int
        Tokens averaged over.
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
        U_TV of each token at each size; rows with NaN are left out.
    sizes : sequence of int
        The G sizes, rising.
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
        raise ValueError(f"sizes has {len(sizes)} entries for {table.shape[1]} columns: give rising "
                         "sizes, one for each column of bounds")
    known = table[np.isfinite(table).all(axis=1)]
    if len(known) == 0:
        raise ValueError("bounds has no complete row: give at least one token")
    mean = known.mean(axis=0)
    fits = mean <= theta
    index = int(np.argmax(fits)) if fits.any() else len(sizes) - 1
    return OfflineTruncation(int(sizes[index]), float(mean[index]), bool(fits.any()), len(known))


def offline_truncation_size(bounds: np.ndarray, sizes: Sequence[int], theta: float = 0.1) -> int:
    """k* of :func:`offline_truncation`: the largest size given if none meets the tolerance."""
    return offline_truncation(bounds, sizes, theta).num_entries
