"""Tests of a risk from the losses of finitely many prompts: p-values and confidence bounds.

Losses lie in [0, 1], one for each independent prompt; docs/theory.md, (33) to (35).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import stats

from hlmtheory.domain import check_unit_interval

TestMethod = Literal["betting", "hoeffding-bentkus"]

BETS = np.append(np.arange(1, 16) / 16, 1.0)
"""Shares of the largest stake that the betting test spreads its capital over."""

BET_WEIGHTS = np.append(np.full(15, 0.25 / 15), 0.75)
"""Most of the capital on the largest stake: losses that are small means over tokens favour it."""


def check_level(value: float, name: str) -> None:
    """Raise ValueError unless the value lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value}: allowed is above 0 and below 1")


def conformal_bound(mean_loss: np.ndarray, num_prompts: int) -> np.ndarray:
    r"""What conformal risk control compares with alpha: (n R + 1)/(n + 1), for losses in [0, 1].

    docs/theory.md, (34); Angelopoulos et al. 2022.
    """
    return np.asarray((num_prompts * np.asarray(mean_loss) + 1.0) / (num_prompts + 1.0))


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


def betting_p_value(losses: np.ndarray, alpha: float) -> np.ndarray:
    r"""P-value of "the risk is at least alpha" from a bet against it, for losses in [0, 1].

    .. math:: p = \min(1, 1/W), \qquad
              W = \sum_j w_j \prod_{i=1}^{n} \Big(1 + q_j \frac{\alpha - L_i}{1 - \alpha}\Big)

    If E[L] >= alpha every factor has mean at most one, so E[W] <= 1 and P(W >= 1/delta) <= delta.
    Fixed stakes q_j keep W falling in each loss and free of the order of prompts. docs/theory.md,
    (35).

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
    return np.asarray(np.minimum(1.0, np.exp(-_log_capital(values, np.asarray(alpha)))))


def _log_capital(losses: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """ln W for losses (..., n) and alpha (...)."""
    edge = (alpha[..., None] - losses) / (1.0 - alpha[..., None])
    logs = np.empty((len(BETS), *edge.shape[:-1]))
    with np.errstate(divide="ignore"):
        for j, share in enumerate(BETS):
            logs[j] = np.sum(np.log1p(share * edge), axis=-1) + np.log(BET_WEIGHTS[j])
    peak = np.max(logs, axis=0)
    return np.asarray(peak + np.log(np.sum(np.exp(logs - peak), axis=0)))


def risk_upper_bound(
    losses: np.ndarray, delta: float, method: TestMethod = "betting"
) -> np.ndarray:
    """Upper confidence bound on the risk: the largest alpha that the test at level delta keeps.

    P(risk > bound) <= delta for a threshold fixed beforehand; docs/theory.md, (35).

    Parameters
    ----------
    losses : float array (..., n)
        Losses of n independent prompts on the last axis, in [0, 1].
    delta : float
        In (0, 1).
    method : {"betting", "hoeffding-bentkus"}

    Returns
    -------
    float array (...)
        In [mean loss, 1], to 2^-40.
    """
    check_level(delta, "delta")
    values = np.asarray(losses, dtype=float)
    check_unit_interval(values, "losses")
    mean = values.mean(axis=-1)
    low, high = np.array(mean), np.ones_like(mean)
    for _ in range(40):
        middle = np.clip((low + high) / 2, 1e-15, 1 - 1e-15)
        if method == "betting":
            p_value = np.exp(-np.maximum(_log_capital(values, middle), 0.0))
        else:
            p_value = np.vectorize(hoeffding_bentkus_p_value)(mean, values.shape[-1], middle)
        kept = p_value > delta
        low, high = np.where(kept, middle, low), np.where(kept, high, middle)
    return np.asarray(high)


def prompts_needed(alpha: float, delta: float = 0.05, method: TestMethod = "betting") -> int:
    """Fewest prompts with which Learn-then-Test can certify anything: all of them without loss."""
    check_level(alpha, "alpha")
    check_level(delta, "delta")

    def certifies(num_prompts: int) -> bool:
        if method == "betting":
            gains = num_prompts * np.log1p(BETS * alpha / (1 - alpha))
            return bool(np.sum(BET_WEIGHTS * np.exp(gains)) >= 1 / delta)
        zero = np.zeros(())
        return bool(hoeffding_bentkus_p_value(zero, num_prompts, alpha) <= delta)

    high = 1
    while not certifies(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if certifies(middle) else (middle, high)
    return high
