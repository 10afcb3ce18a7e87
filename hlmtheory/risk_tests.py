"""Tests of a risk from the losses of finitely many prompts: p-values and confidence bounds.

Losses lie in [0, 1], one for each independent prompt; docs/theory.md, (33) to (35), (51).
Beside the tests that hold at every number of prompts stands the asymptotic one, which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
from scipy import stats

from hlmtheory.domain import check_unit_interval
from hlmtheory.kinds import TestMethod

BETS = np.append(np.arange(1, 16) / 16, 1.0)
"""Shares of the largest stake that the betting test spreads its capital over."""

BET_WEIGHTS = np.append(np.full(15, 0.25 / 15), 0.75)
"""Most of the capital on the largest stake: losses that are small means over tokens favour it."""

MONOTONE: tuple[TestMethod, ...] = ("betting", "hoeffding-bentkus")
"""Tests whose p-value rises with every loss and does not look at the order of prompts."""


def check_level(value: float, name: str) -> None:
    """Raise ValueError unless the value lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value}: allowed is above 0 and below 1")


def conformal_bound(mean_loss: np.ndarray, num_prompts: int) -> np.ndarray:
    r"""What conformal risk control compares with alpha: (n R + 1)/(n + 1), for losses in [0, 1].

    docs/theory.md, (34); Angelopoulos et al. 2022.
    """
    return np.asarray((num_prompts * np.asarray(mean_loss) + 1.0) / (num_prompts + 1.0))


def conformal_prompts_needed(alpha: float, filler: float = 0.0) -> int:
    r"""Fewest prompts, none with a loss beyond its filler, whose conformal bound is within alpha.

    .. math:: n \ge (1 - \alpha) / (\alpha (1 - f))
    """
    return int(np.ceil((1 - alpha) / (alpha * (1 - filler)) - 1e-9))


def hoeffding_bentkus_p_value(mean_loss: np.ndarray, num_prompts: int, alpha: float) -> np.ndarray:
    r"""P-value of "the risk is at least alpha" from the mean of losses in [0, 1].

    .. math:: p = \min\big(e^{-n h(\hat R \wedge \alpha,\, \alpha)},\;
              e\, P(\mathrm{Bin}(n, \alpha) \le \lceil n \hat R \rceil)\big)

    with h the binary relative entropy. It is as strong as losses of 0 and 1 allow, and blind to
    how much smaller the variance of a mean over tokens is. docs/theory.md, (35).

    Parameters
    ----------
    mean_loss : float array (...)
        Empirical risk over independent prompts.
    num_prompts : int
    alpha : float
        In (0, 1).

    Returns
    -------
    float array (...)
        Rising in mean_loss.

    Source: Bates et al. 2021, after Hoeffding 1963 and Bentkus 2004.
    """
    check_level(alpha, "alpha")
    mean = np.asarray(mean_loss, dtype=float)
    smaller = np.minimum(mean, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(smaller > 0, smaller * np.log(smaller / alpha), 0.0)
        second = (1 - smaller) * np.log((1 - smaller) / (1 - alpha))
    hoeffding = np.exp(-num_prompts * (first + second))
    # n R of exact fractions may come out a rounding error above an integer.
    count = np.ceil(num_prompts * mean * (1 - 1e-14))
    bentkus = np.e * stats.binom.cdf(count, num_prompts, alpha)
    return np.asarray(np.minimum(1.0, np.minimum(hoeffding, bentkus)))


def growth(losses: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
    r"""What each prompt adds to the log of each stake's capital, (J, ...).

    .. math:: \ln\Big(1 + q_j \frac{\alpha - L}{1 - \alpha}\Big)

    Minus infinity where the largest stake meets a loss of 1.
    """
    edge = (alpha - np.asarray(losses)) / (1.0 - alpha)
    with np.errstate(divide="ignore"):
        return np.stack([np.log1p(share * edge) for share in BETS])


def betting_p_value_of(total: np.ndarray) -> np.ndarray:
    """The betting p-value (...) from each stake's growth over all prompts, (J, ...)."""
    logs = total + np.log(BET_WEIGHTS).reshape(-1, *[1] * (total.ndim - 1))
    peak = np.max(logs, axis=0)
    capital = peak + np.log(np.sum(np.exp(logs - peak), axis=0))
    return np.asarray(np.exp(-np.maximum(capital, 0.0)))


def betting_p_value(losses: np.ndarray, alpha: float) -> np.ndarray:
    r"""P-value of "the risk is at least alpha" from a bet against it, for losses in [0, 1].

    .. math:: p = \min(1, 1/W), \qquad
              W = \sum_j w_j \prod_{i=1}^{n} \Big(1 + q_j \frac{\alpha - L_i}{1 - \alpha}\Big)

    If E[L] >= alpha every factor has mean at most one, so E[W] <= 1 and P(W >= 1/delta) <= delta.
    Fixed stakes q_j keep W falling in each loss and free of the order of prompts, and the test
    valid where independent prompts have different laws, as with a fixed number a category.
    docs/theory.md, (35), (51).

    Parameters
    ----------
    losses : float array (..., n)
        Losses of n independent prompts on the last axis, in [0, 1].
    alpha : float
        In (0, 1).

    Returns
    -------
    float array (...)
        Rising in every loss.

    Source: capital process of Waudby-Smith and Ramdas 2024, with a fixed mixture of stakes.
    """
    check_level(alpha, "alpha")
    values = np.asarray(losses, dtype=float)
    check_unit_interval(values, "losses")
    return betting_p_value_of(growth(values, alpha).sum(axis=-1))


def wsr_p_value(losses: np.ndarray, alpha: float, delta: float) -> np.ndarray:
    r"""P-value of "the risk is at least alpha" from a bet that learns its stake as it goes.

    .. math:: p = \min_t 1/W_t, \quad W_t = \prod_{i \le t} \big(1 + \lambda_i (\alpha - L_i)\big),
              \quad \lambda_i = \min\Big(1, \sqrt{\frac{2 \ln(1/\delta)}{n \hat\sigma^2_{i-1}}}\Big)

    with the variance of the losses before, begun at 1/4. W is a supermartingale if every loss has
    mean at least alpha given those before, so P(sup W >= 1/delta) <= delta at every level, that of
    the stake or another. It depends on the order of prompts, needs them to be draws of *one* law,
    and does not rise with every loss: docs/theory.md, (51).

    Parameters
    ----------
    losses : float array (..., n)
        In an order that has nothing to do with them.
    alpha : float
    delta : float
        The level that stakes are meant for.

    Source: predictable plug-in of Waudby-Smith and Ramdas 2024, one-sided.
    """
    check_level(alpha, "alpha")
    check_level(delta, "delta")
    values = np.asarray(losses, dtype=float)
    check_unit_interval(values, "losses")
    num = values.shape[-1]
    place = np.arange(1, num + 1)
    mean = (0.5 + np.cumsum(values, axis=-1)) / (place + 1)
    variance = (0.25 + np.cumsum((values - mean) ** 2, axis=-1)) / (place + 1)
    before = np.concatenate([np.full_like(variance[..., :1], 0.25), variance[..., :-1]], axis=-1)
    stake = np.minimum(1.0, np.sqrt(2 * np.log(1 / delta) / (num * before)))
    capital = np.cumsum(np.log1p(stake * (alpha - values)), axis=-1)
    return np.asarray(np.exp(-np.maximum(capital.max(axis=-1), 0.0)))


def asymptotic_p_value(losses: np.ndarray, alpha: float) -> np.ndarray:
    r"""P-value of Student's t for "the risk is at least alpha": asymptotic, **no guarantee**.

    .. math:: P(t_{n-1} \le (\bar L - \alpha) / \mathrm{se})

    Its level holds only as far as the mean of n losses is normal. Losses that are mostly 0 and
    rarely large, which are those of small budgets, are the case where it is not.
    """
    check_level(alpha, "alpha")
    values = np.asarray(losses, dtype=float)
    num = values.shape[-1]
    if num < 2:
        return np.ones(values.shape[:-1])
    error = values.std(axis=-1, ddof=1) / np.sqrt(num)
    return asymptotic_p_value_of(values.mean(axis=-1), error, num, alpha)


def asymptotic_p_value_of(
    mean: np.ndarray, error: np.ndarray, num_prompts: int, alpha: float
) -> np.ndarray:
    """The same from mean and standard error; without a spread the mean is taken for certain."""
    known = error > 0
    score = np.where(known, (mean - alpha) / np.where(known, error, 1.0), 0.0)
    certain = (mean >= alpha).astype(float)
    return np.asarray(np.where(known, stats.t.cdf(score, max(num_prompts - 1, 1)), certain))


def p_value(losses: np.ndarray, alpha: float, delta: float, method: TestMethod) -> np.ndarray:
    """P-value (...) of "the risk is at least alpha" by a named test, from losses (..., n)."""
    if method == "betting":
        return betting_p_value(losses, alpha)
    if method == "hoeffding-bentkus":
        values = np.asarray(losses)
        return hoeffding_bentkus_p_value(values.mean(axis=-1), values.shape[-1], alpha)
    if method == "wsr":
        return wsr_p_value(losses, alpha, delta)
    if method == "t":
        return asymptotic_p_value(losses, alpha)
    raise ValueError(f"method = {method!r}: allowed are {', '.join(get_args(TestMethod))}")


def p_value_of_counts(
    losses: np.ndarray, counts: np.ndarray, alpha: float, method: TestMethod
) -> np.ndarray:
    """P-values (D, G) of :func:`p_value` for many draws at once, each a number of every prompt.

    Of tests that do not look at the order of prompts: all but wsr.

    Parameters
    ----------
    losses : float array (P, G)
        Of the prompts that are drawn from, at each of G thresholds.
    counts : int or float array (D, P)
        How often each prompt was drawn; every draw of equally many.
    alpha : float
    method : {"betting", "hoeffding-bentkus", "t"}

    Raises
    ------
    ValueError
        For another test.
    """
    check_level(alpha, "alpha")
    num = int(counts[0].sum())
    mean = counts @ losses / num
    if method == "betting":
        # A stake lost whole stays lost: its growth is minus infinity, which 0 counts of cannot
        # multiply.
        return betting_p_value_of(counts @ np.maximum(growth(losses, alpha), -1e4))
    if method == "hoeffding-bentkus":
        return hoeffding_bentkus_p_value(mean, num, alpha)
    if method == "t":
        square = np.maximum(counts @ losses**2 / num - mean**2, 0.0)
        spread = np.where(square > 1e-15, square, 0.0)
        return asymptotic_p_value_of(mean, np.sqrt(spread / max(num - 1, 1)), num, alpha)
    raise ValueError(f"method = {method!r}: allowed are tests that do not look at the order")


def risk_upper_bound(
    losses: np.ndarray, delta: float, method: TestMethod = "betting"
) -> np.ndarray:
    """Upper confidence bound on the risk: the largest alpha that the test at level delta keeps.

    P(risk > bound) <= delta for a threshold fixed beforehand; docs/theory.md, (35). Every p-value
    here falls with alpha, so bisection finds it.

    Parameters
    ----------
    losses : float array (n,)
        Losses of n independent prompts, in [0, 1].
    delta : float
        In (0, 1).
    method : {"betting", "hoeffding-bentkus", "wsr", "t"}

    Returns
    -------
    float array ()
        In [mean loss, 1], to 2^-40.
    """
    check_level(delta, "delta")
    values = np.asarray(losses, dtype=float)
    check_unit_interval(values, "losses")
    low, high = float(values.mean()), 1.0
    for _ in range(40):
        middle = float(np.clip((low + high) / 2, 1e-15, 1 - 1e-15))
        if p_value(values, middle, delta, method) > delta:
            low = middle
        else:
            high = middle
    return np.asarray(high)


def prompts_needed(
    alpha: float, delta: float = 0.05, method: TestMethod = "betting", filler: float = 0.0
) -> int:
    r"""Fewest prompts with which a test can reject anything: all of them without loss.

    Parameters
    ----------
    alpha, delta : float
    method : {"betting", "hoeffding-bentkus", "wsr", "t"}
    filler : float
        In [0, 1): share of alpha that a prompt is charged with though it loses nothing;
        :attr:`hlmtheory.guarantees.GridLosses.filler`. Taken to be that of every prompt; where it
        differs between them the bet, concave in each loss, needs somewhat more.
    """
    check_level(alpha, "alpha")
    check_level(delta, "delta")

    def certifies(num_prompts: int) -> bool:
        losses = np.full(num_prompts, alpha * filler)
        return bool(p_value(losses, alpha, delta, method) <= delta)

    return least_number(certifies, 1)


def least_number(passes: Callable[[int], bool], start: int) -> int:
    """The least n >= start that passes, where all beyond one that passes do."""
    high = start
    while not passes(high):
        high *= 2
    low = max(high // 2, start - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
