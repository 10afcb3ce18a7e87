"""Estimates as JSON carries them: a value with its interval and unit."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from calibrate.run.folder import Figure
from hlmtheory.clusters import RatioEstimate, mean_over_tokens


def as_figure(estimate: RatioEstimate, unit: str, confidence: float) -> Figure:
    """A ratio estimate with its Student-t interval over prompts."""
    low, high = estimate.interval(confidence) or (None, None)
    return Figure(estimate.value, low, high, unit)


def mean_figure(values: np.ndarray, confidence: float, unit: str = "") -> Figure:
    """Mean of independent values (N,), one a prompt or one a draw, with its Student-t interval."""
    num = len(values)
    return as_figure(mean_over_tokens(values, np.arange(num), num), unit, confidence)


def excludes_zero(number: dict[str, Any]) -> bool:
    """Whether a figure, as JSON has it, has an interval without 0."""
    return number["low"] is not None and not number["low"] <= 0 <= number["high"]


def share_figure(count: int, total: int, confidence: float) -> Figure:
    """Share of independent trials, with its exact (Clopper-Pearson) interval; none of no trials."""
    if total == 0:
        return Figure(None)
    interval = stats.binomtest(count, total).proportion_ci(confidence)
    return Figure(count / total, float(interval.low), float(interval.high))
