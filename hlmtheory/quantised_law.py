r"""The device's law in b bits a probability, as it crosses a link.

The device rounds x before it draws from it, so the law that the server verifies against is the law
that the drafts come from: nothing is lost, whatever b; docs/theory.md, (62).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from array_api_compat import array_namespace, device

from hlmtheory.domain import Array, check_distribution

RANGE_OCTAVES = 32.0
"""The least level is 2^-32: V of them still weigh nothing."""


@cache
def levels(bits: int) -> np.ndarray:
    r"""Values of the 2^b codes, rising, float64.

    .. math:: \ell_0 = 0, \qquad \ell_q = 2^{-32 (Q - q)/(Q - 1)}, \quad q = 1, \dots, Q = 2^b - 1

    Raises
    ------
    ValueError
        If bits lies outside 2..16.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"prob_bits = {bits}: allowed is 2 to 16")
    top = 2**bits - 1
    rising = np.exp2(-RANGE_OCTAVES * (top - np.arange(1, top + 1)) / (top - 1))
    return np.concatenate([[0.0], rising])


def codes_of(x: Array, bits: int) -> Array:
    """Code of each probability (..., V), int64: the nearest level in log x; 0 for 0 alone.

    So the support stays what it is, and codes never fall where x rises.

    Raises
    ------
    ValueError
        If x is not a distribution.
    """
    check_distribution(x, "x")
    xp = array_namespace(x)
    top = len(levels(bits)) - 1
    positive = x > 0
    octaves = xp.log2(xp.where(positive, x, xp.ones_like(x)))
    place = xp.round(top + octaves * ((top - 1) / RANGE_OCTAVES))
    codes = xp.astype(xp.clip(place, 1, top), xp.int64)
    return xp.where(positive, codes, xp.zeros_like(codes))


def values_of(codes: Array, bits: int) -> Array:
    """Level of each code, float64."""
    xp = array_namespace(codes)
    return xp.asarray(levels(bits), device=device(codes))[codes]


def law_of(codes: Array, total: Array, bits: int, like: Array) -> Array:
    r"""Probabilities of some codes of a law, :math:`\ell_q / \sum_v \ell_{q_v}`.

    Parameters
    ----------
    codes : integer array (..., K)
    total : float64 array (..., 1)
        Sum of the levels of the whole law, which travels with its codes.
    bits : int
    like : array
        Of the precision wanted.
    """
    return array_namespace(codes).astype(values_of(codes, bits) / total, like.dtype)


def quantised_law(x: Array, bits: int) -> Array:
    r"""The law that codes of b bits say, (..., V), in the precision of x.

    .. math:: \hat x_v = \ell_{q(x_v)} \Big/ \sum_j \ell_{q(x_j)}

    8 bits change a probability by at most 4.5 % of itself before they are normalised.

    Raises
    ------
    ValueError
        If x is not a distribution, or bits lies outside 2..16.
    """
    codes = codes_of(x, bits)
    return law_of(codes, total_of(codes, bits), bits, x)


def total_of(codes: Array, bits: int) -> Array:
    """Sum of the levels of a law's codes, (..., 1), float64."""
    return array_namespace(codes).sum(values_of(codes, bits), axis=-1, keepdims=True)
