"""The linear relation between uncertainty and rejection probability, and its summaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.domain import Array, check_unit_interval


def linear_rejection(uncertainty: Array, slope: float, intercept: float) -> Array:
    r"""Rejection probability predicted by the fitted line.

    .. math:: \hat\beta(u) = \mathrm{clip}(a u + b,\, 0,\, 1)

    docs/theory.md, (7), for u (...) in [0, 1]. Reported for TinyLlama-1.1B and LLaMA-2-7B:
    a = 0.82, b = -0.06 (U-HLM, second-hand), a = 0.815, b = -0.066 (CU-HLM, second-hand).

    Valid when read as a statement about the mean of beta given u: token by token beta scatters
    widely around it.
    """
    check_unit_interval(uncertainty, "uncertainty")
    xp = array_namespace(uncertainty)
    return xp.clip(slope * uncertainty + intercept, 0.0, 1.0)


@dataclass(frozen=True)
class Line:
    """Least-squares line of y on x, with the variance of x: (...) each, NaN where undefined."""

    slope: np.ndarray
    intercept: np.ndarray
    correlation: np.ndarray
    variance: np.ndarray


def line_moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the line of y on x is a function of: 1, x, y, x^2, y^2, x y of each token, (N, 6)."""
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def line_of_totals(totals: np.ndarray) -> Line:
    r"""Least-squares lines (...) from sums (..., 6) of :func:`line_moments`.

    .. math:: a = \frac{\overline{xy} - \bar x \bar y}{\overline{x^2} - \bar x^2}, \quad
              b = \bar y - a \bar x, \quad
              r = a \sqrt{\mathrm{Var}(x) / \mathrm{Var}(y)}

    Resamples and leave-one-out samples of prompts are sums of per-prompt sums, so each costs no
    more than six additions a prompt.
    """
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(totals, dtype=np.float64), -1, 0)
    variance_x, variance_y = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
    covariance = xy / n - x / n * y / n
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(variance_x * variance_y)
        slope = np.where(variance_x > 0, covariance / variance_x, np.nan)
        correlation = np.where(scale > 0, covariance / scale, np.nan)
    return Line(slope, y / n - slope * x / n, correlation, variance_x)


@dataclass(frozen=True)
class BinnedMeans:
    """Means of both quantities and number of tokens, at least one, in bins of uncertainty (G,).

    `bin_of_token` (N,) is there for callers who resample by prompt.
    """

    uncertainty: np.ndarray
    rejection_prob: np.ndarray
    num_tokens: np.ndarray
    bin_of_token: np.ndarray

    @property
    def correlation(self) -> float:
        """Pearson correlation of the bins' means, each bin weighted by its tokens."""
        return weighted_correlation(self.uncertainty, self.rejection_prob, self.num_tokens)


def binned_means(
    uncertainty: np.ndarray, rejection_prob: np.ndarray, num_bins: int = 20
) -> BinnedMeans:
    """Mean rejection probability in bins of equal token count.

    Equal counts, not equal widths: uncertainty piles up near 0 and 1, and an equal-width bin with
    three tokens in it would weigh as much as one with three thousand. Ties stay in one bin, so
    fewer than the `num_bins` >= 2 asked for may come back. Values (N,) lie in [0, 1].
    """
    check_unit_interval(uncertainty, "uncertainty")
    check_unit_interval(rejection_prob, "rejection_prob")
    if num_bins < 2:
        raise ValueError(f"num_bins = {num_bins}: allowed is >= 2")
    # Inner edges only: a pile-up at the least value is then an edge, and a bin, of its own.
    inner_edges = np.unique(np.quantile(uncertainty, np.linspace(0, 1, num_bins + 1)[1:-1]))
    raw = np.searchsorted(inner_edges, uncertainty, side="left")
    _, bins = np.unique(raw, return_inverse=True)
    counts = np.bincount(bins)
    return BinnedMeans(
        np.bincount(bins, weights=uncertainty) / counts,
        np.bincount(bins, weights=rejection_prob) / counts,
        counts,
        bins,
    )


def weighted_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Pearson correlation under weights; NaN where either variable does not vary."""
    share = weights / np.sum(weights)
    dx, dy = x - np.sum(share * x), y - np.sum(share * y)
    scale = np.sqrt(np.sum(share * dx * dx) * np.sum(share * dy * dy))
    return float(np.sum(share * dx * dy) / scale) if scale > 0 else float("nan")
