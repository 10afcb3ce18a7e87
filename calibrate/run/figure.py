"""Figures: estimates with interval and unit, curves of them, and how numbers are printed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from calibrate.run.records import Curve, Figure
from hlmtheory.clusters import RatioEstimate, mean_over_tokens

NBSP = "\N{NO-BREAK SPACE}"
NO_VALUE = "–"
SHARE = (0.0, 1.0)
"""Where shares, probabilities and risks lie; intervals are cut at its ends, which costs nothing."""
AMOUNT = (0.0, np.inf)
"""Where bits, times and counts lie."""


def figure(
    value: float, low: float | None = None, high: float | None = None, unit: str = ""
) -> Figure:
    """A figure of plain floats; what is not finite is null, and with the value its interval."""
    if not np.isfinite(value):
        return Figure(value=None, unit=unit)
    return Figure(value=float(value), low=_known(low), high=_known(high), unit=unit)


def as_figure(
    estimate: RatioEstimate,
    unit: str = "",
    confidence: float = 0.95,
    low_bound: float = -np.inf,
    high_bound: float = np.inf,
) -> Figure:
    """A ratio estimate with its Student-t interval over prompts, clipped to the bounds."""
    interval = estimate.interval(confidence)
    low, high = (None, None) if interval is None else np.clip(interval, low_bound, high_bound)
    return figure(estimate.value, low, high, unit)


def mean_figure(
    values: np.ndarray,
    confidence: float,
    unit: str = "",
    low_bound: float = -np.inf,
    high_bound: float = np.inf,
) -> Figure:
    """Mean of independent values (N,), one a prompt or one a draw, with its Student-t interval."""
    num = len(values)
    estimate = mean_over_tokens(values, np.arange(num), num)
    return as_figure(estimate, unit, confidence, low_bound, high_bound)


def share_figure(count: int, total: int, confidence: float) -> Figure:
    """Share of independent trials, with its exact (Clopper-Pearson) interval; none of no trials."""
    if total == 0:
        return Figure(value=None)
    interval = stats.binomtest(count, total).proportion_ci(confidence)
    return figure(count / total, interval.low, interval.high)


def excludes_zero(number: Figure) -> bool:
    """Whether a figure has an interval without 0."""
    return number.low is not None and number.high is not None and not number.low <= 0 <= number.high


def scaled(number: Figure, scale: float, unit: str = "") -> Figure:
    """A figure in a unit `scale` times smaller: 100 gives per cent."""
    low, high = (None if end is None else end * scale for end in (number.low, number.high))
    return figure(np.nan if number.value is None else number.value * scale, low, high, unit)


def curve(
    grid: Sequence[float] | np.ndarray,
    estimates: Sequence[RatioEstimate],
    confidence: float,
    low_bound: float = -np.inf,
    high_bound: float = np.inf,
) -> Curve:
    """Line up estimates over their grid, their intervals clipped to the bounds."""
    figures = [as_figure(one, "", confidence, low_bound, high_bound) for one in estimates]
    return Curve(
        grid=tuple(float(place) for place in grid),
        value=tuple(number.value for number in figures),
        low=tuple(number.low for number in figures),
        high=tuple(number.high for number in figures),
    )


def number_text(
    number: Figure | float | None,
    digits: int = 3,
    *,
    decimals: int | None = None,
    interval: bool = True,
) -> str:
    """How the project prints a number: value [low, high], kept on one line; a dash for none.

    Parameters
    ----------
    number : Figure, float or None
    digits : int
        Significant digits; no digit before the decimal point is lost.
    decimals : int, optional
        Digits behind the decimal point instead.
    interval : bool
        Whether to print the interval of a figure that has one.
    """
    if not isinstance(number, Figure):
        number = Figure(value=None) if number is None else figure(number)
    if number.value is None:
        return NO_VALUE
    text = _text(number.value, digits, decimals)
    if interval and number.low is not None and number.high is not None:
        low, high = (_text(end, digits, decimals) for end in (number.low, number.high))
        text += f"{NBSP}[{low},{NBSP}{high}]"
    return text


def percent_text(
    number: Figure, digits: int = 3, *, decimals: int | None = None, interval: bool = True
) -> str:
    """A share as per cent, without the sign; otherwise as :func:`number_text`."""
    return number_text(scaled(number, 100), digits, decimals=decimals, interval=interval)


def share_text(share: float) -> str:
    """A plain share, such as a budget or a confidence, with the sign."""
    return f"{100 * share:g}{NBSP}%"


def signed_percent_text(share: float) -> str:
    """How far off something is, in per cent of it, with both signs."""
    return f"{100 * share:+.1f}{NBSP}%".replace("-", "\N{MINUS SIGN}")


def _text(value: float, digits: int, decimals: int | None) -> str:
    if decimals is None:
        rounded = float(f"{value:.{digits}g}")
        whole = abs(rounded) >= 10 ** (digits - 1)
        text = f"{value:,.0f}" if whole else f"{value:.{digits}g}"
    else:
        text = f"{value:,.{decimals}f}"
    if text.startswith("-") and not text.strip("-0."):
        text = text[1:]  # rounded to 0, which has no sign
    return text.replace("-", "\N{MINUS SIGN}")


def _known(bound: float | None) -> float | None:
    return None if bound is None or not np.isfinite(bound) else float(bound)
