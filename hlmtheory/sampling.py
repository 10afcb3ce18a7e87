"""Sampling from given random numbers, by inverse CDF or by a race; numpy and torch alike."""

from __future__ import annotations

import math

import numpy as np
from array_api_compat import array_namespace, device

from hlmtheory.domain import Array, check_nonnegative


def sample_inverse_cdf(weights: Array, uniforms: Array) -> Array:
    r"""Draw one token from each row of non-negative weights.

    Two inverse CDFs in a row: a block of about sqrt(V) neighbouring tokens by its mass, with the
    first uniform, then a token inside that block, with the second:

    .. math:: g = \min\{g : \sum_{h \le g} W_h > U_1 \sum_h W_h\}, \quad
              d = \min\{v \in g : \sum_{j \le v,\, j \in g} w_j > U_2 W_g\}

    P(g) P(d | g) = w_d / sum(w), so the law is exactly that of `weights`. Against one cumulative
    sum over the whole vocabulary this costs a single pass, keeps rounding at the size of one
    block, and makes the outcome insensitive to rounding of far-away tokens: the same uniforms
    give the same token unless a boundary moved across one of them.

    Parameters
    ----------
    weights : array (B, V)
        Non-negative weights; they need not sum to one.
    uniforms : array (B, 2)
        Independent uniforms in [0, 1).

    Returns
    -------
    integer array (B,)
        Token indices; never one of weight zero.

    Raises
    ------
    ValueError
        If a row has no positive weight, or uniforms is not (B, 2).
    """
    xp = array_namespace(weights, uniforms)
    batch, vocab = weights.shape
    if tuple(uniforms.shape) != (batch, 2):
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}: give ({batch}, 2)")
    block = max(1, math.isqrt(vocab))
    num_blocks = -(-vocab // block)
    padding = num_blocks * block - vocab
    if padding:
        zeros = xp.zeros((batch, padding), dtype=weights.dtype, device=device(weights))
        weights = xp.concat([weights, zeros], axis=-1)
    blocks = xp.reshape(weights, (batch, num_blocks, block))  # (B, N, block)
    block_index = _first_above(xp, xp.sum(blocks, axis=-1), uniforms[:, 0])
    rows = xp.arange(batch, device=device(weights))
    token_index = _first_above(xp, blocks[rows, block_index], uniforms[:, 1])
    return block_index * block + token_index


def _check_mass(xp: Array, total: Array) -> None:
    if not bool(xp.all(total > 0)):
        raise ValueError("weights has a row without positive weight; give at least one token mass")


def _first_above(xp: Array, weights: Array, uniform: Array) -> Array:
    """Smallest index whose cumulative weight exceeds uniform * total, row by row."""
    cumulative = xp.cumulative_sum(xp.astype(weights, xp.float64), axis=-1)
    total = cumulative[:, -1:]
    _check_mass(xp, total)
    level = xp.astype(uniform, xp.float64)[:, None] * total
    index = xp.sum(xp.astype(cumulative <= level, xp.int64), axis=-1)
    # uniform * total may round up to the total; the answer is then the last token with any mass.
    positive = xp.astype(weights > 0, xp.int64)
    last_positive = weights.shape[-1] - 1 - xp.argmax(xp.flip(positive, axis=-1), axis=-1)
    return xp.minimum(index, last_positive)


def race_argmin(weights: Array, exponentials: Array) -> Array:
    r"""The winner of each row's exponential race: a draw from its weights (Gumbel-max).

    .. math:: \arg\min_v E_v / w_v

    Two laws raced with the same exponentials give coupled draws: docs/theory.md, (41). Division
    in float64 rounds the same everywhere, so device and server agree to the bit on equal weights.

    Parameters
    ----------
    weights : array (B, V)
        Non-negative weights; they need not sum to one.
    exponentials : array (B, V)
        Independent standard exponential variables, at least 0.

    Returns
    -------
    integer array (B,)
        Token indices; never one of weight zero.

    Raises
    ------
    ValueError
        If a row has no positive weight, or exponentials are negative or of another shape.
    """
    xp = array_namespace(weights, exponentials)
    if exponentials.shape != weights.shape:
        raise ValueError(
            f"exponentials has shape {tuple(exponentials.shape)}: give {tuple(weights.shape)}"
        )
    check_nonnegative(exponentials, "exponentials")
    weights = xp.astype(weights, xp.float64)
    _check_mass(xp, xp.sum(weights, axis=-1))
    runs = weights > 0
    with np.errstate(over="ignore"):  # a tiny weight's time may exceed the largest float
        times = xp.astype(exponentials, xp.float64) / xp.where(runs, weights, 1.0)
    times = xp.clip(times, None, xp.finfo(xp.float64).max)
    return xp.argmin(xp.where(runs, times, xp.inf), axis=-1)
