"""Thresholds with a guarantee from finitely many calibration prompts.

Prompts are the exchangeable unit. The loss of prompt i at threshold u is the mean of
beta_t 1{u_t <= u} over its tokens, in [0, 1] and rising in u: docs/theory.md, (33). Both rules hold
for prompts exchangeable with the calibration prompts and for the contexts of the calibration
policy; skipping changes contexts, which reruns measure.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from hlmtheory.clusters import sum_by_prompt
from hlmtheory.domain import check_unit_interval
from hlmtheory.thresholds import Threshold


def prompt_losses(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    thresholds: np.ndarray,
) -> np.ndarray:
    """Loss of each prompt at each threshold, (P, G); docs/theory.md, (33).

    Parameters
    ----------
    score : float array (N,)
        What the gate compares with the threshold.
    rejection_prob : float array (N,)
    prompt_index : int array (N,)
    num_prompts : int
    thresholds : float array (G,)
        Rising.
    """
    check_unit_interval(rejection_prob, "rejection_prob")
    num_thresholds = len(thresholds)
    # A token counts from the first threshold that reaches its score.
    first = np.searchsorted(thresholds, score, side="left")
    counted = first < num_thresholds
    sums = np.zeros((num_prompts, num_thresholds))
    np.add.at(sums, (prompt_index[counted], first[counted]), rejection_prob[counted])
    counts = sum_by_prompt(np.ones(len(score)), prompt_index, num_prompts)
    return np.cumsum(sums, axis=1) / np.maximum(counts, 1)[:, None]


def candidate_thresholds(score: np.ndarray, most: int = 1000) -> np.ndarray:
    """Thresholds worth trying: midpoints between scores that occur, thinned to `most`, and 1."""
    distinct = np.unique(score)
    middles = (distinct[1:] + distinct[:-1]) / 2
    if len(middles) > most:
        middles = np.quantile(middles, np.linspace(0, 1, most))
    return np.unique(np.append(middles, 1.0))


def conformal_threshold(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    alpha: float,
) -> Threshold:
    r"""Conformal risk control: expected risk on a fresh prompt at most alpha.

    .. math:: u_{th} = \sup\Big\{u : \frac{n \hat R(u) + 1}{n + 1} \le \alpha\Big\}

    docs/theory.md, (34). Infeasible when n < 1/alpha - 1: too few prompts for the budget.

    Raises
    ------
    ValueError
        If alpha is outside (0, 1).
    """
    _check_level(alpha, "alpha")
    rule = f"conformal-{alpha:g}"
    grid = candidate_thresholds(score)
    mean_loss = prompt_losses(score, rejection_prob, prompt_index, num_prompts, grid).mean(0)
    inflated = (num_prompts * mean_loss + 1) / (num_prompts + 1)
    return _last_within(
        rule,
        grid,
        inflated <= alpha,
        f"{num_prompts} prompts: the bound (n R + 1)/(n + 1) is above {alpha:g} for every "
        f"threshold; a budget of {alpha:g} needs at least {int(np.ceil(1 / alpha - 1))} prompts",
    )


def hoeffding_bentkus_p_value(mean_loss: np.ndarray, num_prompts: int, alpha: float) -> np.ndarray:
    r"""P-value of the hypothesis that the risk exceeds alpha, for losses in [0, 1].

    .. math:: p = \min\big(e^{-n h(\hat R \wedge \alpha,\, \alpha)},\;
              e\, P(\mathrm{Bin}(n, \alpha) \le \lceil n \hat R \rceil)\big)

    with h the binary relative entropy. docs/theory.md, (35); Bates et al. 2021, after Hoeffding
    1963 and Bentkus 2004.

    Parameters
    ----------
    mean_loss : float array (G,)
        Empirical risk over independent prompts.
    num_prompts : int
    alpha : float
        In (0, 1).
    """
    smaller = np.minimum(mean_loss, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(smaller > 0, smaller * np.log(smaller / alpha), 0.0)
        second = np.where(smaller < 1, (1 - smaller) * np.log((1 - smaller) / (1 - alpha)), 0.0)
    hoeffding = np.exp(-num_prompts * (first + second))
    bentkus = np.e * stats.binom.cdf(np.ceil(num_prompts * mean_loss - 1e-12), num_prompts, alpha)
    return np.minimum(1.0, np.minimum(hoeffding, bentkus))


def learn_then_test_threshold(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    alpha: float,
    delta: float = 0.05,
) -> Threshold:
    r"""Learn-then-Test: with probability 1 - delta the risk is at most alpha.

    docs/theory.md, (35). Thresholds are tested in rising order, fixed beforehand, each at level
    delta with the Hoeffding-Bentkus p-value, until the first that fails: fixed-sequence testing
    controls the family-wise error, and the loss rises with the threshold. The grid is made of the
    calibration scores' quantiles, which are a function of the device side alone.

    Raises
    ------
    ValueError
        If alpha or delta is outside (0, 1).
    """
    _check_level(alpha, "alpha")
    _check_level(delta, "delta")
    rule = f"ltt-{alpha:g}"
    grid = candidate_thresholds(score)
    mean_loss = prompt_losses(score, rejection_prob, prompt_index, num_prompts, grid).mean(0)
    passed = hoeffding_bentkus_p_value(mean_loss, num_prompts, alpha) <= delta
    return _last_within(
        rule,
        grid,
        np.cumprod(passed).astype(bool),
        f"{num_prompts} prompts certify no threshold at risk {alpha:g} with confidence "
        f"{1 - delta:g}; even without any loss it takes "
        f"{int(np.ceil(np.log(delta) / np.log(1 - alpha)))} prompts",
    )


def _check_level(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value}: allowed is above 0 and below 1")


def _last_within(rule: str, grid: np.ndarray, within: np.ndarray, why_not: str) -> Threshold:
    if not within[0]:
        return Threshold(rule, float("nan"), False, why_not)
    last = len(grid) - 1 if within.all() else int(np.argmin(within)) - 1
    reason = "certified even when every token is skipped" if last == len(grid) - 1 else ""
    return Threshold(rule, float(grid[last]), True, reason)
