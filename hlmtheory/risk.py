"""Rejection risk: what skipping costs, the curve of skips against it, and its intervals.

Two weightings of prompts of different lengths, n prompts with T_i tokens:

- ``tokens``: sum over all tokens / number of tokens, a ratio of sums. The mean token's risk, and
  what (10), (11), (15), (16) and every measured rate mean.
- ``prompts``: mean over prompts of each prompt's own mean. The loss of (33) that the guarantees of
  hlmtheory.guarantees speak of by default.

They agree when all prompts have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.clusters import resample_prompts, sum_by_prompt
from hlmtheory.domain import (
    Array,
    check_distribution,
    check_finite,
    check_nonnegative,
    check_same_shape,
    check_unit_interval,
)
from hlmtheory.relation import linear_rejection

Weighting = Literal["tokens", "prompts"]
MAX_GRID = 1000


def rejection_risk(x: Array, y: Array, skip_probability: Array) -> Array:
    r"""Expected rejection risk of a gate in one context: its exact output bias.

    .. math:: \rho(s) = E_{d \sim x}[\sigma(d)\, \beta_d] = \sum_v \sigma_v \max(x_v - y_v, 0)

    docs/theory.md, (11). With accept/resample on the tokens not skipped it equals the total
    variation between the output law and y (12), for any sigma in [0, 1]. For sigma in {0, 1} it is
    also the least bias of any scheme with this gate (13); a randomised sigma has a lower floor.

    Parameters
    ----------
    x, y : array (..., V)
        Device and server distributions.
    skip_probability : array (..., V)
        sigma, the probability of skipping each draft, in [0, 1].

    Returns
    -------
    array (...)
        sigma = 0 gives 0 (HLM), sigma = 1 gives TV(x, y) (the device alone).

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or sigma leaves [0, 1].

    Source: docs/theory.md, (11).
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    check_same_shape(x, skip_probability, "x", "skip_probability")
    check_unit_interval(skip_probability, "skip_probability")
    xp = array_namespace(x, y, skip_probability)
    return xp.sum(skip_probability * xp.clip(x - y, 0.0, None), axis=-1)


@dataclass(frozen=True)
class SkipRiskSums:
    """Per-prompt sums from which every figure of a threshold gate follows, resamples included.

    Attributes
    ----------
    thresholds : float array (G,)
        Rising.
    skipped, rejected : float array (P, G)
        Number of skipped tokens of each prompt, and the sum of their rejection probabilities.
    num_tokens : float array (P,)
        Tokens of each prompt.
    """

    thresholds: np.ndarray
    skipped: np.ndarray
    rejected: np.ndarray
    num_tokens: np.ndarray


def threshold_grid(score: np.ndarray, most: int = MAX_GRID) -> np.ndarray:
    """The scores that occur, rising, thinned to at most `most` quantiles of the tokens.

    A gate `score <= threshold` only changes where the threshold passes a score.
    """
    values = np.asarray(score)
    check_finite(values, "score")
    if values.size == 0:
        raise ValueError("score is empty: give at least one token")
    distinct = np.unique(values)
    if len(distinct) <= most:
        return distinct
    levels = np.linspace(0, 1, most)
    return np.unique(np.quantile(values, levels, method="inverted_cdf"))


def skip_risk_sums(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    thresholds: np.ndarray | None = None,
) -> SkipRiskSums:
    """Sums by prompt of skipped tokens and of their rejection probability at every threshold.

    Parameters
    ----------
    score : float array (N,)
        What the gate compares with the threshold: a token is skipped when score <= threshold.
    rejection_prob : float array (N,)
        beta in [0, 1].
    prompt_index : int array (N,)
        Prompt of each token, in [0, num_prompts).
    num_prompts : int
    thresholds : float array (G,), optional
        Rising; by default :func:`threshold_grid`.

    Raises
    ------
    ValueError
        If lengths differ, a score is not finite, a beta leaves [0, 1], a prompt index is out of
        range, or thresholds do not rise.
    """
    values, beta, index = np.asarray(score), np.asarray(rejection_prob), np.asarray(prompt_index)
    check_finite(values, "score")
    check_unit_interval(beta, "rejection_prob")
    if not values.shape == beta.shape == index.shape:
        raise ValueError(
            f"score, rejection_prob, prompt_index have {values.shape}, {beta.shape}, "
            f"{index.shape}: give one entry a token in each"
        )
    if index.size and (index.min() < 0 or index.max() >= num_prompts):
        raise ValueError(
            f"prompt_index spans {index.min()}..{index.max()}: allowed is 0 to num_prompts - 1 = "
            f"{num_prompts - 1}"
        )
    grid = threshold_grid(values) if thresholds is None else np.asarray(thresholds, dtype=float)
    if np.any(np.diff(grid) < 0):
        raise ValueError("thresholds fall somewhere: give them in rising order")
    # A token counts from the first threshold that reaches its score on.
    cell = index * (len(grid) + 1) + np.searchsorted(grid, values, side="left")
    shape = (num_prompts, len(grid) + 1)
    length = shape[0] * shape[1]
    skipped = np.bincount(cell, minlength=length).reshape(shape)[:, :-1]
    rejected = np.bincount(cell, weights=beta, minlength=length).reshape(shape)[:, :-1]
    num_tokens = np.bincount(index, minlength=num_prompts).astype(float)
    return SkipRiskSums(
        grid, np.cumsum(skipped, axis=1, dtype=float), np.cumsum(rejected, axis=1), num_tokens
    )


@dataclass(frozen=True)
class SkipRiskCurve:
    """Skip rate against rejection risk as the threshold of one score rises.

    Attributes
    ----------
    thresholds, skip_rate, risk : float array (G,)
        All rising.
    weighting : {"tokens", "prompts"}
        Of skip_rate and risk.
    num_tokens, num_prompts : int
    """

    thresholds: np.ndarray
    skip_rate: np.ndarray
    risk: np.ndarray
    weighting: Weighting
    num_tokens: int
    num_prompts: int


def skip_risk_curve(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    thresholds: np.ndarray | None = None,
    weighting: Weighting = "tokens",
) -> SkipRiskCurve:
    r"""Skip rate and rejection risk of the gate `score <= threshold` on a trace.

    .. math:: p(u) = \frac1N \sum_t 1\{s_t \le u\}, \qquad
              \hat R(u) = \frac1N \sum_t \beta_t 1\{s_t \le u\}

    docs/theory.md, (11), (15). Among gates that see the same features none skips more at any risk
    than the one whose score is E[beta | features] (Neyman-Pearson), so estimators compare by this
    curve.

    Parameters
    ----------
    score, rejection_prob, prompt_index, num_prompts, thresholds
        As in :func:`skip_risk_sums`.
    weighting : {"tokens", "prompts"}
        Means over tokens (the formula above) or over prompts of each prompt's mean.

    Returns
    -------
    SkipRiskCurve

    Raises
    ------
    ValueError
        As :func:`skip_risk_sums`, or for an unknown weighting.
    """
    sums = skip_risk_sums(score, rejection_prob, prompt_index, num_prompts, thresholds)
    used = sums.num_tokens > 0
    if weighting == "tokens":
        total = sums.num_tokens.sum()
        skip_rate, risk = sums.skipped.sum(axis=0) / total, sums.rejected.sum(axis=0) / total
    elif weighting == "prompts":
        lengths = sums.num_tokens[used, None]
        skip_rate = (sums.skipped[used] / lengths).mean(axis=0)
        risk = (sums.rejected[used] / lengths).mean(axis=0)
    else:
        raise ValueError(f"weighting = {weighting!r}: allowed are 'tokens', 'prompts'")
    return SkipRiskCurve(
        sums.thresholds,
        skip_rate,
        risk,
        weighting,
        int(sums.num_tokens.sum()),
        int(np.count_nonzero(used)),
    )


def skip_rate_at_risk(curve: SkipRiskCurve, alpha: float) -> float:
    """Largest skip rate whose risk is within alpha; 0 where no threshold is: docs/theory.md, (15).

    Parameters
    ----------
    curve : SkipRiskCurve
    alpha : float
        Risk budget in [0, 1].
    """
    check_unit_interval(alpha, "alpha")
    inside = curve.risk <= alpha
    return float(np.max(curve.skip_rate, where=inside, initial=0.0))


@dataclass(frozen=True)
class LinearRisk:
    """The risk that the fitted line predicts: docs/theory.md, (16).

    Attributes
    ----------
    thresholds, risk, bound : float array (G,)
        u_th, R_lin(u_th), and the coarser bound; bound >= risk.
    """

    thresholds: np.ndarray
    risk: np.ndarray
    bound: np.ndarray


def linear_risk(
    uncertainty: np.ndarray, slope: float, intercept: float, thresholds: np.ndarray
) -> LinearRisk:
    r"""Rejection risk by the fitted line, from device-side data alone.

    .. math:: R_{lin}(u_{th}) = \int_0^{u_{th}} \mathrm{clip}(a u + b, 0, 1)\, dF(u)
              \;\le\; \mathrm{clip}(a u_{th} + b, 0, 1)\, P(u \le u_{th})

    docs/theory.md, (16), with F the empirical law of u over tokens. At u_th = -b/a it is zero: the
    risk-averse rule claims no risk at all, which clipping the line, not the data, brings about.

    Parameters
    ----------
    uncertainty : float array (N,)
        u in [0, 1].
    slope, intercept : float
        a >= 0 and b of the line.
    thresholds : float array (G,)

    Returns
    -------
    LinearRisk

    Raises
    ------
    ValueError
        If u leaves [0, 1], the slope is negative, or there are no tokens.

    Valid when E[beta | u] = clip(a u + b, 0, 1); where the line lies below the mean of beta, near
    u = -b/a as a rule, both figures are too small. The bound needs a >= 0.
    """
    check_unit_interval(uncertainty, "uncertainty")
    if not slope >= 0:
        raise ValueError(f"slope = {slope}: allowed is >= 0; the bound needs a rising line")
    ordered = np.sort(np.asarray(uncertainty, dtype=float))
    if ordered.size == 0:
        raise ValueError("uncertainty is empty: give at least one token")
    grid = np.asarray(thresholds, dtype=float)
    summed = np.append(0.0, np.cumsum(linear_rejection(ordered, slope, intercept)))
    count = np.searchsorted(ordered, grid, side="right")
    at_threshold = linear_rejection(np.clip(grid, 0.0, 1.0), slope, intercept)
    return LinearRisk(grid, summed[count] / ordered.size, at_threshold * count / ordered.size)


def sequence_bias_bound(risk: np.ndarray, prompt_index: np.ndarray, num_prompts: int) -> np.ndarray:
    r"""Bound on the total variation between whole answers, for each prompt.

    .. math:: \mathrm{TV}(P_{1:T}, Y_{1:T}) \le \min\Big(1, \sum_{t=1}^{T} E[\rho(s_t)]\Big)

    docs/theory.md, (14): the two answers are drawn together, token by token, and part at step t
    with probability at most rho(s_t).

    Parameters
    ----------
    risk : float array (N,)
        rho(s_t), the exact bias of the policy at each context, in [0, 1].
    prompt_index : int array (N,)
    num_prompts : int

    Returns
    -------
    float array (num_prompts,)
        One trajectory's sum for each prompt; average several trajectories of a prompt before
        clipping at 1, as the expectation stands inside. Not clipped here.

    Valid when the contexts are those of the policy's own trajectories, not of the calibration run.
    """
    check_unit_interval(risk, "risk")
    return sum_by_prompt(np.asarray(risk, dtype=float), np.asarray(prompt_index), num_prompts)


@dataclass(frozen=True)
class RatioIntervals:
    """Ratios of sums over prompts with percentile intervals of the cluster bootstrap.

    Attributes
    ----------
    value, low, high : float array (G,)
    confidence : float
    num_prompts, num_resamples : int
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float
    num_prompts: int
    num_resamples: int


def cluster_bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    num_resamples: int,
    generator: np.random.Generator,
    confidence: float = 0.95,
) -> RatioIntervals:
    r"""Intervals of ratios of sums, prompts drawn with replacement.

    .. math:: \hat\theta_g = \frac{\sum_i A_{ig}}{\sum_i B_{ig}}, \qquad
              \hat\theta^*_g = \frac{\sum_i w_i A_{ig}}{\sum_i w_i B_{ig}},
              \quad w \sim \mathrm{Multinomial}(n, 1/n)

    All G ratios of a resample share their w, so differences between them may be taken too. The
    resamples are one matrix product, block by block: memory does not grow with their number but
    for the (R, G) results.

    Parameters
    ----------
    numerators : float array (P,) or (P, G)
        A: sums over the tokens of each prompt.
    denominators : float array (P,) or (P, G)
        B >= 0: with B the number of tokens, the mean over tokens; with B = 1 and A each prompt's
        mean, the mean over prompts.
    num_resamples : int
        R >= 1.
    generator : numpy Generator
    confidence : float
        In (0, 1).

    Returns
    -------
    RatioIntervals
        NaN where the ratio is 0/0; resamples with 0/0 are left out.

    Raises
    ------
    ValueError
        If there are fewer than two prompts, shapes do not match, or an argument is out of range.

    Valid when prompts are independent draws from one population; with fewer than about 20 of them
    percentile intervals are too short.
    """
    tops = np.asarray(numerators, dtype=float)
    bottoms = np.asarray(denominators, dtype=float)
    check_finite(tops, "numerators")
    check_nonnegative(bottoms, "denominators")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: allowed is above 0 and below 1")
    if num_resamples < 1:
        raise ValueError(f"num_resamples = {num_resamples}: allowed is >= 1")
    tops = tops[:, None] if tops.ndim == 1 else tops
    bottoms = bottoms[:, None] if bottoms.ndim == 1 else bottoms
    num_prompts = tops.shape[0]
    if num_prompts < 2 or bottoms.shape[0] != num_prompts:
        raise ValueError(
            f"numerators, denominators have {num_prompts}, {bottoms.shape[0]} prompts: give at "
            "least two, and the same in both"
        )
    ratios = np.empty((num_resamples, tops.shape[1]))
    block = max(1, min(num_resamples, 4_000_000 // num_prompts))
    for start in range(0, num_resamples, block):
        stop = min(start + block, num_resamples)
        weights = resample_prompts(num_prompts, stop - start, generator)
        ratios[start:stop] = _ratio(weights @ tops, weights @ bottoms)
    tail = (1 - confidence) / 2
    known = ~np.all(np.isnan(ratios), axis=0)
    low, high = np.full((2, tops.shape[1]), np.nan)
    if known.any():
        quantile = np.nanquantile if np.isnan(ratios).any() else np.quantile
        low[known], high[known] = quantile(ratios[:, known], [tail, 1 - tail], axis=0)
    return RatioIntervals(
        _ratio(tops.sum(axis=0), bottoms.sum(axis=0)),
        low,
        high,
        confidence,
        num_prompts,
        num_resamples,
    )


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominators > 0, numerators / denominators, np.nan)
