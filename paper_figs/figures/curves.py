"""Re-arrangements of token columns that several figures need; every mean is hlmtheory.clusters'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hlmtheory.clusters import RatioEstimate, mean_over_tokens


@dataclass(frozen=True)
class Curve:
    """Means along a grid with their prompt-clustered intervals.

    Attributes
    ----------
    grid, value, low, high : float array (G,)
        `low` and `high` are NaN where no interval is defined.
    """

    grid: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(grid: np.ndarray, estimates: list[RatioEstimate], confidence: float) -> Curve:
    """Line up estimates over their grid."""
    nan = (float("nan"), float("nan"))
    intervals = [estimate.interval(confidence) or nan for estimate in estimates]
    low, high = np.array(intervals, dtype=float).reshape(-1, 2).T
    return Curve(np.asarray(grid, dtype=float), np.array([e.value for e in estimates]), low, high)


def column_means(
    grid: np.ndarray,
    values: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    confidence: float,
) -> Curve:
    """Mean of every column of values (N, G); tokens that are NaN are left out."""
    estimates = [
        mean_over_tokens(values[:, g], prompt_index, num_prompts) for g in range(values.shape[1])
    ]
    return curve(grid, estimates, confidence)


def threshold_means(
    score: np.ndarray,
    weight: np.ndarray,
    thresholds: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    confidence: float,
) -> Curve:
    """Mean of weight where score <= threshold and 0 elsewhere, at each threshold.

    With weight 1 the skip rate, with weight beta the rejection risk: docs/theory.md, (11).
    """
    estimates = [
        mean_over_tokens(weight * (score <= threshold), prompt_index, num_prompts)
        for threshold in thresholds
    ]
    return curve(thresholds, estimates, confidence)


def group_means(
    values: np.ndarray,
    group: np.ndarray,
    num_groups: int,
    prompt_index: np.ndarray,
    num_prompts: int,
    confidence: float,
) -> Curve:
    """Mean of the tokens of each group 0..num_groups-1; groups without any are left out."""
    grid, estimates = [], []
    for number in range(num_groups):
        inside = (group == number) & np.isfinite(values)
        if inside.any():
            grid.append(number)
            estimates.append(mean_over_tokens(values[inside], prompt_index[inside], num_prompts))
    return curve(np.array(grid), estimates, confidence)


def skip_risk_curve(score: np.ndarray, rejection_prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rejection risk and skip rate as the threshold on a score rises, tied tokens together.

    Returns
    -------
    risk, skip_rate : float array (M + 1,)
        Starting at (0, 0); both never fall. docs/theory.md, (15).
    """
    order = np.argsort(score, kind="stable")
    num = len(score)
    last_of_tie = np.append(np.diff(score[order]) > 0, True)
    risk = np.cumsum(rejection_prob[order])[last_of_tie] / num
    rate = np.arange(1, num + 1)[last_of_tie] / num
    return np.concatenate([[0.0], risk]), np.concatenate([[0.0], rate])


def error_lengths(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Distances below and above, (2, G), as Matplotlib's error bars want them; 0 where unknown."""
    lengths = np.stack([value - low, high - value])
    return np.where(np.isfinite(lengths), np.maximum(lengths, 0.0), 0.0)
