"""The line of rejection on uncertainty, and what stands beside it, with intervals by prompt."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats

from calibrate.run.figure import SHARE, as_figure, figure
from calibrate.run.records import Bin, Curve, Figure, Histogram, LineFit, Relation, WaldTest
from hlmtheory.clusters import (
    jackknife_correlation_interval,
    mean_over_tokens,
    ratio_of_sums,
    sum_by_prompt,
)
from hlmtheory.relation import (
    binned_means,
    line_moments,
    line_of_totals,
    linear_rejection,
    weighted_correlation,
)

NUM_LINE_POINTS = 41
HISTOGRAM_BINS = (40, 32)


def fit_line(
    uncertainty: np.ndarray,
    rejection_prob: np.ndarray,
    can_reject: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    confidence: float = 0.95,
) -> LineFit:
    """Fit beta = a u + b by ordinary least squares, standard errors clustered by prompt.

    Parameters
    ----------
    uncertainty, rejection_prob : float array (N,)
    can_reject : bool array (N,)
        y_d < x_d, whose mean is Delta.
    prompt_index : int array (N,)
    num_prompts : int
    confidence : float

    Returns
    -------
    LineFit
        Without a slope, and with the reason, where uncertainty does not vary or there are fewer
        than three tokens.
    """

    def mean(values: np.ndarray) -> Figure:
        found = mean_over_tokens(values, prompt_index, num_prompts)
        return as_figure(found, "", confidence, *SHARE)

    few = len(uncertainty) < 3
    if few or np.ptp(uncertainty) == 0:
        level, none = mean(rejection_prob), Figure(value=None)
        return LineFit(
            slope=none,
            intercept=level,
            correlation=none,
            correlation_binned=none,
            mean_rejection=level,
            delta=mean(can_reject.astype(float)),
            curvature=none,
            covariance=((0.0, 0.0), (0.0, 0.0)),
            num_bins=1,
            degenerate=f"{len(uncertainty)} tokens, fewer than three"
            if few
            else f"all {len(uncertainty)} tokens have the uncertainty {uncertainty[0]:.4g}",
        )
    groups = prompt_index if num_prompts >= 2 else None
    result = _least_squares([uncertainty], rejection_prob, groups)
    by_bin = _binned_sums(uncertainty, rejection_prob, prompt_index, num_prompts)  # (P, 3, bins)
    moments = sum_by_prompt(
        line_moments(uncertainty, rejection_prob), prompt_index, num_prompts
    )  # (P, 6)

    def binned_correlation(totals: np.ndarray) -> np.ndarray:
        n, u, beta = np.moveaxis(totals.reshape(-1, *by_bin.shape[1:]), 1, 0)
        safe = np.where(n > 0, n, 1)
        rows = zip(u / safe, beta / safe, n, strict=True)
        return np.array([weighted_correlation(*row) for row in rows])

    def correlation(sums: np.ndarray, statistic: Any) -> Figure:
        interval = jackknife_correlation_interval(sums, statistic, confidence)
        value = statistic(sums.sum(0, keepdims=True))[0]
        return figure(value, *(interval or ()))

    def coefficient(fitted: Any, place: int) -> Figure:
        interval = () if groups is None else fitted.conf_int(alpha=1 - confidence)[place]
        return figure(fitted.params[place], *interval)

    curvature = Figure(value=None)
    if len(uncertainty) > 3:  # a parabola through three points leaves nothing to judge it by
        centred = (uncertainty - uncertainty.mean()) ** 2
        parabola = _least_squares([uncertainty, centred], rejection_prob, groups)
        curvature = coefficient(parabola, 2)
    covariance = np.asarray(result.cov_params())
    return LineFit(
        slope=coefficient(result, 1),
        intercept=coefficient(result, 0),
        correlation=correlation(moments, lambda totals: line_of_totals(totals).correlation),
        correlation_binned=correlation(by_bin.reshape(num_prompts, -1), binned_correlation),
        mean_rejection=mean(rejection_prob),
        delta=mean(can_reject.astype(float)),
        curvature=curvature,
        lack_of_fit=_lack_of_fit(uncertainty, rejection_prob, groups, num_prompts),
        covariance=(
            (float(covariance[1, 1]), float(covariance[1, 0])),
            (float(covariance[0, 1]), float(covariance[0, 0])),
        ),
        num_bins=by_bin.shape[2],
    )


def _lack_of_fit(
    uncertainty: np.ndarray, rejection_prob: np.ndarray, groups: np.ndarray | None, num_prompts: int
) -> WaldTest | None:
    """Whether bins of equal count have a level of their own beside the line.

    A level for all bins but two, for a line goes through any two; Wald's test that all are 0, with
    a covariance clustered by prompt. With G prompts and q levels, W (G - q) / (q (G - 1)) is read
    as F(q, G - q), as Hotelling's statistic is: a chi-square would take the covariance as known.
    """
    of_token = binned_means(uncertainty, rejection_prob).bin_of_token
    bins = np.unique(of_token)[1:-1]
    if groups is None or len(bins) == 0 or num_prompts < 2 * len(bins):
        return None
    levels = [(of_token == one).astype(float) for one in bins]
    fitted = _least_squares([uncertainty, *levels], rejection_prob, groups)
    which = np.eye(2 + len(bins))[2:]
    with np.errstate(all="ignore"):
        test = fitted.wald_test(which, use_f=False, scalar=True)
    if not np.isfinite(test.statistic):
        return None  # the levels do not vary
    q, rest = len(bins), num_prompts - len(bins)
    ratio = float(test.statistic) * rest / (q * (num_prompts - 1))
    return WaldTest(
        statistic=float(test.statistic), degrees=q, p_value=float(stats.f.sf(ratio, q, rest))
    )


def _least_squares(
    columns: list[np.ndarray], response: np.ndarray, groups: np.ndarray | None
) -> Any:
    """OLS with a constant; standard errors clustered where groups are given."""
    import statsmodels.api as sm

    model = sm.OLS(response, sm.add_constant(np.column_stack(columns), has_constant="add"))
    if groups is None:
        return model.fit()
    with warnings.catch_warnings():
        # Few clusters make statsmodels warn about the rank of the joint test, not used here.
        warnings.simplefilter("ignore")
        return model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)


def _binned_sums(
    uncertainty: np.ndarray, rejection_prob: np.ndarray, prompt_index: np.ndarray, num_prompts: int
) -> np.ndarray:
    """Sums by prompt and bin of 1, u and beta, (P, 3, num_bins)."""
    bins = binned_means(uncertainty, rejection_prob)
    num_bins = len(bins.num_tokens)
    cell = prompt_index * num_bins + bins.bin_of_token
    sums = [
        np.bincount(cell, weights=values, minlength=num_prompts * num_bins)
        for values in (np.ones_like(uncertainty), uncertainty, rejection_prob)
    ]
    return np.stack([part.reshape(num_prompts, num_bins) for part in sums], axis=1)


def relation(
    uncertainty: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    fit: LineFit,
    confidence: float = 0.95,
) -> Relation:
    """What stands beside the line: bins of equal count, its band, the best rising curve, tokens.

    Isotonic regression is least squares among all curves that do not fall; its corners are kept.
    """
    sums = _binned_sums(uncertainty, rejection_prob, prompt_index, num_prompts)
    bins = [
        Bin(
            uncertainty=float(u.sum() / n.sum()),
            rejection_prob=as_figure(ratio_of_sums(beta, n), "", confidence, *SHARE),
            num_tokens=int(n.sum()),
        )
        for n, u, beta in sums.transpose(2, 1, 0)
    ]
    corners, heights = _isotonic(uncertainty, rejection_prob)
    counts, u_edges, beta_edges = np.histogram2d(
        uncertainty, rejection_prob, bins=HISTOGRAM_BINS, range=((0, 1), (0, 1))
    )
    return Relation(
        bins=tuple(bins),
        line=_line_band(fit, num_prompts, confidence),
        isotonic_uncertainty=tuple(corners.tolist()),
        isotonic_rejection=tuple(heights.tolist()),
        tokens=Histogram(
            uncertainty_edges=tuple(u_edges.tolist()),
            rejection_edges=tuple(beta_edges.tolist()),
            counts=tuple(tuple(row) for row in counts.astype(int).tolist()),
        ),
    )


def _isotonic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last x of every level stretch of the best rising curve, and its heights there."""
    from scipy.optimize import isotonic_regression

    values, place = np.unique(x, return_inverse=True)  # ties share one height
    weights = np.bincount(place)
    found = isotonic_regression(np.bincount(place, weights=y) / weights, weights=weights)
    first, last = found.blocks[:-1], found.blocks[1:] - 1
    kept = np.unique(np.concatenate([first, last]))
    return values[kept], np.clip(found.x[kept], 0.0, 1.0)


def _line_band(fit: LineFit, num_prompts: int, confidence: float) -> Curve:
    """The line from u = 0 to 1 with the interval that its covariance implies, clipped to [0, 1]."""
    u = np.linspace(0.0, 1.0, NUM_LINE_POINTS)
    slope, intercept = float(fit.slope.value or 0.0), float(fit.intercept.value or 0.0)
    design = np.stack([u, np.ones_like(u)], axis=-1)
    variance = np.einsum("gi,ij,gj->g", design, np.asarray(fit.covariance), design)
    ends: list[tuple[float | None, ...]] = [(None,) * len(u)] * 2
    if num_prompts >= 2:
        quantile = float(stats.t.ppf(0.5 + confidence / 2, num_prompts - 1))
        half = quantile * np.sqrt(np.maximum(variance, 0.0))
        centre = slope * u + intercept
        ends = [tuple(np.clip(centre + side * half, 0.0, 1.0).tolist()) for side in (-1, 1)]
    return Curve(
        grid=tuple(u.tolist()),
        value=tuple(linear_rejection(u, slope, intercept).tolist()),
        low=ends[0],
        high=ends[1],
    )
