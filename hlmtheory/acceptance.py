"""Accept/resample verification: rejection probability, residual law, total variation."""

from __future__ import annotations

from array_api_compat import array_namespace

from hlmtheory.domain import (
    Array,
    check_distribution,
    check_nonnegative,
    check_same_shape,
    check_unit_interval,
)


def rejection_probability(draft_prob: Array, target_prob: Array) -> Array:
    r"""Probability that the server rejects a draft token.

    .. math:: \beta_d = \max(0,\, 1 - y_d / x_d)

    docs/theory.md, (1). A token with x_d = 0 is never drawn; its value is 0.

    Parameters
    ----------
    draft_prob, target_prob : array (...)
        x_d and y_d in [0, 1], of the draft token under the law it was drawn from and the server's.

    Raises
    ------
    ValueError
        If a probability lies outside [0, 1].

    Source: Leviathan et al. 2023; Chen et al. 2023; U-HLM (arXiv 2412.12687).
    """
    check_unit_interval(draft_prob, "draft_prob")
    check_unit_interval(target_prob, "target_prob")
    xp = array_namespace(draft_prob, target_prob)
    positive = draft_prob > 0
    # (x - y)+ / x rather than 1 - y/x: y/x overflows where a narrow softmax left x subnormal.
    excess = xp.clip(draft_prob - target_prob, 0.0, None)
    return excess / xp.where(positive, draft_prob, xp.ones_like(draft_prob))


def residual_distribution(x: Array, y: Array) -> Array:
    r"""Law from which the server resamples a rejected draft.

    .. math:: r_v = \frac{\max(y_v - x_v,\, 0)}{\sum_j \max(y_j - x_j,\, 0)}

    docs/theory.md, (2). Where it has no mass (x = y: nothing is ever rejected) it is y itself, the
    limit in which the branch has probability zero.

    Parameters
    ----------
    x, y : array (..., V)
        Draft weights and target distribution. The weights need not be normalised: residual
        verification passes the sub-distribution sigma * x (docs/theory.md, (24)).

    Raises
    ------
    ValueError
        If x has a negative entry or a NaN, y is not a distribution, or their vocabularies differ.

    Source: Leviathan et al. 2023.
    """
    check_nonnegative(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    xp = array_namespace(x, y)
    excess = xp.clip(y - x, 0.0, None)
    mass = xp.sum(excess, axis=-1, keepdims=True)
    empty = mass <= 0
    return xp.where(empty, y, excess / xp.where(empty, xp.ones_like(mass), mass))


def total_variation(x: Array, y: Array) -> Array:
    r"""Total variation distance (...) between distributions x and y (..., V).

    .. math:: \mathrm{TV}(x, y) = \sum_v \max(x_v - y_v, 0) = \tfrac12 \sum_v |x_v - y_v|

    It is also the mean rejection probability E_{d~x}[beta_d]: docs/theory.md, (3).

    Raises
    ------
    ValueError
        If x or y is not a distribution, or their vocabularies differ.
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    xp = array_namespace(x, y)
    return xp.sum(xp.abs(x - y), axis=-1) / 2
