r"""Shared randomness: device and server race with the same exponentials, and nothing is sent up.

With E_j independent and exponential, d = argmin_j E_j/x_j has law x and o = argmin_j E_j/y_j law y
(the Gumbel-max trick). The gate emits d if it skips, else the server's own o: docs/theory.md, (41).
Source of the coupling: arXiv 2408.07978; the joint law of d and o, and the bias under a gate, ours.

All is written in the *share* of a token, s = y/(x + y) in [0, 1], rather than in the ratio y/x:
zeros on either side then need no case of their own.
"""

from __future__ import annotations

from array_api_compat import array_namespace, device, is_torch_array

from hlmtheory.domain import (
    Array,
    check_distribution,
    check_same_shape,
    check_unit_interval,
)
from hlmtheory.head import Head
from hlmtheory.order import count_up_to, put_along_last_axis, take_along_last_axis
from hlmtheory.threads import map_rows


def coupling_columns(x: Array, y: Array, token_ids: Array) -> tuple[Array, Array]:
    r"""What the coupled bias needs to know of each candidate beside x and y: two numbers.

    .. math:: a_v = \frac{x_v s_v}{A(s_v)}, \quad \Phi_v = \int_0^{s_v} \frac{ds}{A(s)^2}, \quad
              A(s) = \sum_k \max(s x_k, (1 - s) y_k), \quad s_v = \frac{y_v}{x_v + y_v}

    A is linear between the sorted s_v, so one sort and running sums give both for all tokens:
    O(V log V). As 1/2 <= A <= 1 rounding does not grow. docs/theory.md, (41a), (41b).

    Parameters
    ----------
    x, y : array (B, V)
        Device and server distributions; normalised anew in float64.
    token_ids : integer array (B, M)
        The candidates.

    Returns
    -------
    agreement, race : float64 arrays (B, M)
        a_v = P(d = o = v), and Phi_v in [0, 2], which differences of make P(d, o) for d != o.

    Raises
    ------
    ValueError
        If x or y is not a distribution, shapes disagree, or a token is outside the vocabulary.
    """
    _check_pair(x, y)
    if x.ndim != 2 or x.shape != y.shape or token_ids.shape[:-1] != x.shape[:1]:
        shapes = tuple(x.shape), tuple(y.shape), tuple(token_ids.shape)
        raise ValueError(f"x, y, token_ids have shapes {shapes}: give (B, V), (B, V), (B, M)")
    outside = token_ids[(token_ids < 0) | (token_ids >= x.shape[-1])]
    if outside.shape[0]:
        last = x.shape[-1] - 1
        raise ValueError(f"token_ids holds {int(outside[0])}: allowed is 0 to V - 1 = {last}")
    rows_x, rows_y = Head.rows(x), Head.rows(y)
    numpy_rows = not is_torch_array(rows_x)
    ids = token_ids.numpy() if numpy_rows and is_torch_array(token_ids) else token_ids
    xp, outer = array_namespace(rows_x), array_namespace(x)
    if numpy_rows and len(rows_x):
        # Row by row all of it stays in a processor's cache.
        def of_rows(part: slice) -> list[tuple[Array, Array]]:
            ones = [slice(row, row + 1) for row in range(part.start, part.stop)]
            return [_columns(rows_x[one], rows_y[one], ids[one]) for one in ones]

        pairs = [pair for part in map_rows(of_rows, len(rows_x), x) for pair in part]
    else:
        pairs = [_columns(rows_x, rows_y, ids)]
    agreement, race = (xp.concat(column) for column in zip(*pairs, strict=True))
    return outer.asarray(agreement), outer.asarray(race)


def _columns(x: Array, y: Array, token_ids: Array) -> tuple[Array, Array]:
    """a and Phi of some tokens, (B, M) each, from one sort of all and running sums."""
    x, y = _normalised(x), _normalised(y)
    xp, share = array_namespace(x), _share(x, y)
    # Which of equal shares comes first does not matter, and a sort that need not know is faster.
    order = xp.argsort(share, axis=-1, stable=False)
    rising, x_sorted, y_sorted = (take_along_last_axis(one, order) for one in (share, x, y))
    behind = xp.cumulative_sum(x_sorted, axis=-1)  # sum of x over the tokens of at most this share
    ahead = 1.0 - xp.cumulative_sum(y_sorted, axis=-1)  # sum of y over those of a larger one
    level = rising * behind + (1.0 - rising) * ahead  # at equal shares equal, whoever comes first
    own_x, own_share = (take_along_last_axis(one, token_ids) for one in (x, share))
    place = count_up_to(rising, own_share) - 1  # the last of those with the same share
    own_level = take_along_last_axis(level, place)
    race = take_along_last_axis(_race(rising, level), place)
    return own_x * own_share / own_level, race


def bracketed_columns(
    x_head: Array, y_head: Array, x: Array, y: Array, distance: Array, own: Array
) -> list[tuple[Array, Array, Array]]:
    r"""Bounds on a_v and Phi_v of one token v and on Phi of a head, without the other tokens.

    .. math:: \max(s X, (1 - s) Y) \le \sum_{k\ \mathrm{beyond}} \max(s x_k, (1 - s) y_k)
              \le s E + \max(s, 1 - s)(X - E) + (1 - s)(Y - X + E)

    with X, Y the masses beyond the head and v, and E the sum of (x - y)+ there. Both ends are races
    themselves, with all beyond put into one token or into three, so A lies between the A of these
    two, and a_v and differences of Phi lie between theirs. docs/theory.md, (41f).

    Parameters
    ----------
    x_head, y_head : array (B, M)
    x, y, distance : array (B,)
        Of the token, and TV(x, y).
    own : bool array (B, M)
        Where in the head the token is; nowhere, if it lies beyond.

    Returns
    -------
    two triples (a_v (B,), Phi_v (B,), Phi of the head (B, M)), float64
        The greatest a_v and differences of Phi, and the least.
    """
    xp = array_namespace(x_head, y_head)
    num, inside = x_head.shape[-1], xp.any(own, axis=-1)
    place = xp.where(inside, xp.argmax(xp.astype(own, xp.int32), axis=-1), num)[:, None]
    of_head = xp.broadcast_to(xp.arange(num, device=device(place)), x_head.shape)
    ids = xp.concat([place, of_head], axis=-1)
    p, q = (
        xp.astype(xp.concat([head, xp.where(inside, 0 * v, v)[:, None]], axis=-1), xp.float64)
        for head, v in ((x_head, x), (y_head, y))
    )
    rest_p, rest_q = (xp.clip(1.0 - xp.sum(c, axis=-1, keepdims=True), 0.0, None) for c in (p, q))
    excess = xp.sum(xp.clip(p - q, 0.0, None), axis=-1, keepdims=True)
    excess = xp.clip(xp.astype(distance, xp.float64)[:, None] - excess, 0.0, None)
    met = xp.minimum(xp.clip(rest_p - excess, 0.0, None), rest_q)
    none = 0 * met
    beyond = [[(rest_p, rest_q)], [(rest_p - met, none), (met, met), (none, rest_q - met)]]
    out: list[tuple[Array, Array, Array]] = []
    for tokens in beyond:
        more_p, more_q = zip(*tokens, strict=True)
        laws = xp.concat([p, *more_p], axis=-1), xp.concat([q, *more_q], axis=-1)
        a, phi = _columns(*laws, ids)
        out.append((a[:, 0], phi[:, 0], phi[:, 1:]))
    return out


def coupled_output_probability(
    token: tuple[Array, ...], x_head: Array, race: Array, skip_probability: Array
) -> Array:
    r"""P_v of one token under a gate that skips none but the head, (B,); docs/theory.md, (41c).

    .. math:: P_v = \sigma_v (x_v - a_v) + y_v \Big(1 - \sum_{i \ne v} \sigma_i x_i
              (\Phi_v - \Phi_i)_+\Big)

    Parameters
    ----------
    token : x, y, a, Phi and sigma of v, (B,) each
    x_head, race, skip_probability : array (B, M)
        x, Phi and sigma of the head; v may be one of it.
    """
    x, y, agreement, own_race, sigma = token
    xp = array_namespace(x, race)
    ahead = xp.clip(own_race[:, None] - race, 0.0, None)  # 0 at v itself
    lost = xp.sum(skip_probability * x_head * ahead, axis=-1)
    return sigma * xp.clip(x - agreement, 0.0, None) + y * xp.clip(1.0 - lost, 0.0, None)


def coupled_output_bias(
    x_head: Array, y_head: Array, agreement: Array, race: Array, skip_probability: Array
) -> Array:
    r"""Exact one-step bias of a gate that skips none but the candidates, from their columns.

    .. math:: \sum_v \Big(\sigma_v (x_v - a_v)
              - y_v \sum_{i \ne v} \sigma_i x_i (\Phi_v - \Phi_i)_+\Big)_+

    docs/theory.md, (41d). A token with sigma_v = 0 is never emitted too often and sends nothing
    elsewhere, so only the skipped candidates are read: what is NaN at others does not matter.

    Parameters
    ----------
    x_head, y_head, agreement, race : array (B, M)
        Of the candidates, distinct tokens; the last two of :func:`coupling_columns`.
    skip_probability : array (B, M)
        sigma in [0, 1], or booleans.

    Returns
    -------
    float64 array (B,)
        TV(output law, y): 0 where no candidate is skipped, NaN where a skipped one holds NaN.

    Raises
    ------
    ValueError
        If sigma leaves [0, 1].
    """
    xp = array_namespace(x_head, y_head, agreement, race, skip_probability)
    sigma = xp.astype(skip_probability, xp.float64)
    check_unit_interval(sigma, "skip_probability")
    zeros = xp.zeros_like(sigma)
    columns = [xp.astype(column, xp.float64) for column in (x_head, y_head, agreement, race)]
    columns = [xp.where(sigma > 0, column, zeros) for column in columns]
    order = xp.argsort(columns[-1], axis=-1)
    x, y, met, phi, sigma = (xp.take_along_axis(c, order, axis=-1) for c in (*columns, sigma))
    # sum_i sigma_i x_i (Phi_v - Phi_i)_+: the candidates behind v in the order of Phi, v adding 0.
    skipped = sigma * x
    behind = phi * xp.cumulative_sum(skipped, axis=-1) - xp.cumulative_sum(skipped * phi, axis=-1)
    excess = sigma * (x - met) - y * xp.clip(behind, 0.0, None)
    return xp.sum(xp.clip(excess, 0.0, None), axis=-1)


def joint_law(x: Array, y: Array) -> Array:
    r"""P(d = i, o = v) of the two coupled draws, written out; for small vocabularies: O(V^2).

    .. math:: P(d = o = v) = \frac{x_v s_v}{A(s_v)}
              = \Big[\sum_j \max\Big(\frac{x_j}{x_v}, \frac{y_j}{y_v}\Big)\Big]^{-1}, \qquad
              P(d = i, o = v) = x_i y_v (\Phi_v - \Phi_i)_+ \quad (i \ne v)

    docs/theory.md, (41a), (41b); the symbols as in :func:`coupling_columns`.

    Parameters
    ----------
    x, y : array (..., V)

    Returns
    -------
    float64 array (..., V, V)
        Device tokens i in rows, server tokens v in columns; the sums are x and y.

    Raises
    ------
    ValueError
        If x or y is not a distribution or the vocabularies differ.
    """
    _check_pair(x, y)
    xp = array_namespace(x, y)
    p, q = _normalised(x), _normalised(y)
    share = _share(p, q)
    at = share[..., :, None]  # (..., V, 1): one knot a row
    level = xp.sum(xp.maximum(at * p[..., None, :], (1.0 - at) * q[..., None, :]), axis=-1)
    order = xp.argsort(share, axis=-1)
    sorted_phi = _race(*(xp.take_along_axis(a, order, axis=-1) for a in (share, level)))
    phi = put_along_last_axis(sorted_phi, order, sorted_phi)
    apart = xp.clip(phi[..., None, :] - phi[..., :, None], 0.0, None)
    together = (p * share / level)[..., :, None]
    eye = xp.eye(p.shape[-1], dtype=xp.float64, device=device(p))
    return p[..., :, None] * q[..., None, :] * apart + together * eye


def coupled_output_law(x: Array, y: Array, skip_probability: Array) -> Array:
    r"""Exact law of the emitted token at one step of a coupled gate; for small vocabularies.

    .. math:: P_v = \sigma_v x_v + y_v - \sum_i \sigma_i P(d = i, o = v)

    docs/theory.md, (41c). sigma = 0 gives y and sigma = 1 gives x.

    Parameters
    ----------
    x, y, skip_probability : array (..., V)

    Returns
    -------
    float64 array (..., V)

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or sigma leaves [0, 1].
    """
    joint = joint_law(x, y)
    xp = array_namespace(x, y)
    sigma = xp.astype(skip_probability, xp.float64)
    check_unit_interval(sigma, "skip_probability")
    moved = xp.sum(sigma[..., :, None] * joint, axis=-2)
    return sigma * _normalised(x) + _normalised(y) - moved


def _check_pair(x: Array, y: Array) -> None:
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")


def _normalised(x: Array) -> Array:
    """x in float64 with sum 1: the law of a race is that of its weights' proportions."""
    xp = array_namespace(x)
    x = xp.astype(x, xp.float64)
    return x / xp.sum(x, axis=-1, keepdims=True)


def _share(x: Array, y: Array) -> Array:
    """y/(x + y), and 0 for a token that neither draws."""
    both = x + y
    return y / array_namespace(x).where(both > 0, both, 1.0)


def _race(share: Array, level: Array) -> Array:
    """Integral of 1/A^2 from 0 to each of the rising `share`, A linear between: A(0) = 1."""
    xp = array_namespace(share)
    before = xp.concat([xp.zeros_like(share[..., :1]), share[..., :-1]], axis=-1)
    level_before = xp.concat([xp.ones_like(level[..., :1]), level[..., :-1]], axis=-1)
    return xp.cumulative_sum((share - before) / (level_before * level), axis=-1)
