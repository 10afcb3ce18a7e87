"""What a trace says: the fitted line, the estimators side by side, Delta, with intervals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calibrate.run.errors import UserError
from calibrate.run.folder import Figure
from calibrate.run.traces import Trace
from hlmtheory.clusters import (
    bootstrap_totals,
    jackknife_correlation_interval,
    mean_over_tokens,
    percentile_interval,
    resample_prompts,
    sum_by_prompt,
)
from hlmtheory.learned_score import cross_fitted_score
from hlmtheory.relation import (
    binned_means,
    line_moments,
    line_of_totals,
    weighted_correlation,
)

NUM_RESAMPLES = 2000
RISK_LEVELS = (0.005, 0.01, 0.02, 0.05)
ESTIMATORS = ("uncertainty", "uncertainty_sampled", "entropy", "one_minus_max_prob", "margin")
SCORE_BINS = 200


def estimator_scores(trace: Trace) -> dict[str, np.ndarray]:
    """Every score of each token, larger where rejection is likelier, learned ones last."""
    return {name: estimator_score(trace, name) for name in ESTIMATORS} | learned_scores(trace)


def estimator_score(trace: Trace, name: str) -> np.ndarray:
    """One of ESTIMATORS, larger where rejection is likelier."""
    if name == "one_minus_max_prob":
        return 1.0 - trace["max_prob"]
    if name == "margin":
        return 1.0 - trace["margin"]
    return trace[name]


LEARNED_MODELS: tuple[Literal["boosting", "logistic"], ...] = ("boosting", "logistic")
LEARNED_FEATURES = ("uncertainty", "entropy", "max_prob", "margin", "draft_prob", "step")
LEARNED_MIN_PROMPTS = 10
LEARNED_MAX_TOKENS = 200_000


def learned_scores(trace: Trace) -> dict[str, np.ndarray]:
    """E[beta | device-side features], cross-fitted by prompt; docs/theory.md, (15).

    Empty with fewer than LEARNED_MIN_PROMPTS prompts, which leave too few to fit on, and beyond
    LEARNED_MAX_TOKENS tokens, which would take minutes.
    """
    if trace.num_prompts < LEARNED_MIN_PROMPTS or trace.num_tokens > LEARNED_MAX_TOKENS:
        return {}
    names = [name for name in (*LEARNED_FEATURES, "attention_entropy") if name in trace]
    features = np.column_stack([trace[name] for name in names])
    return {
        f"learned_{model}": cross_fitted_score(
            features, trace["rejection_prob"], trace.prompt_index, model
        )
        for model in LEARNED_MODELS
    }


@dataclass(frozen=True)
class LineFit:
    """Least squares of beta on u with everything clustered by prompt.

    Attributes
    ----------
    slope, intercept, correlation, correlation_binned, mean_rejection, delta : Figure
    covariance : 2 x 2 list
        Cluster-robust covariance of (slope, intercept).
    curvature : Figure
        Coefficient of u^2 when it is added to the line: zero if the relation is linear.
    num_bins : int
    """

    slope: Figure
    intercept: Figure
    correlation: Figure
    correlation_binned: Figure
    mean_rejection: Figure
    delta: Figure
    curvature: Figure
    covariance: list[list[float]]
    num_bins: int


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

    Raises
    ------
    UserError
        If uncertainty does not vary, or there are fewer than three tokens.
    """
    if len(uncertainty) < 3 or np.ptp(uncertainty) == 0:
        raise UserError(
            f"cannot fit a line: {len(uncertainty)} tokens, or uncertainty that does not vary; "
            "calibrate on more prompts or tokens"
        )
    clustered = num_prompts >= 2
    result = _least_squares([uncertainty], rejection_prob, prompt_index if clustered else None)
    intercept, slope = (float(v) for v in result.params)
    bounds = result.conf_int(alpha=1 - confidence) if clustered else None
    covariance = np.asarray(result.cov_params())[::-1, ::-1]

    bins = binned_means(uncertainty, rejection_prob)
    moments = sum_by_prompt(
        line_moments(uncertainty, rejection_prob), prompt_index, num_prompts
    )  # (P, 6)
    num_bins = len(bins.num_tokens)
    by_bin = np.zeros((num_prompts, 3, num_bins))
    for column, values in enumerate((np.ones_like(uncertainty), uncertainty, rejection_prob)):
        np.add.at(by_bin[:, column], (prompt_index, bins.bin_of_token), values)

    def binned_correlation(totals: np.ndarray) -> np.ndarray:
        n, u, beta = (totals.reshape(-1, 3, num_bins)[:, i] for i in range(3))
        safe = np.where(n > 0, n, 1)
        return np.array(
            [
                weighted_correlation(u_i, b_i, n_i)
                for u_i, b_i, n_i in zip(u / safe, beta / safe, n, strict=True)
            ]
        )

    flat_bins = by_bin.reshape(num_prompts, -1)
    totals = moments.sum(0, keepdims=True)

    def figure(value: float, interval: tuple[float, float] | None, unit: str = "") -> Figure:
        low, high = interval if interval is not None else (None, None)
        return Figure(_finite(value), low, high, unit)

    mean_rejection = mean_over_tokens(rejection_prob, prompt_index, num_prompts)
    delta = mean_over_tokens(can_reject.astype(float), prompt_index, num_prompts)
    return LineFit(
        slope=figure(slope, _pair(bounds, 1)),
        intercept=figure(intercept, _pair(bounds, 0)),
        correlation=figure(
            float(_correlation(totals)[0]),
            jackknife_correlation_interval(moments, _correlation, confidence),
        ),
        correlation_binned=figure(
            bins.correlation,
            jackknife_correlation_interval(flat_bins, binned_correlation, confidence),
        ),
        mean_rejection=figure(mean_rejection.value, mean_rejection.interval(confidence)),
        delta=figure(delta.value, delta.interval(confidence)),
        curvature=_curvature(
            uncertainty, rejection_prob, prompt_index if clustered else None, confidence
        ),
        covariance=covariance.tolist(),
        num_bins=num_bins,
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


def _pair(bounds: Any, row: int) -> tuple[float, float] | None:
    return None if bounds is None else (float(bounds[row][0]), float(bounds[row][1]))


def _curvature(
    uncertainty: np.ndarray,
    rejection_prob: np.ndarray,
    groups: np.ndarray | None,
    confidence: float,
) -> Figure:
    if len(uncertainty) <= 3:  # a parabola through three points leaves nothing to judge it by
        return Figure(None)
    centred = (uncertainty - uncertainty.mean()) ** 2
    result = _least_squares([uncertainty, centred], rejection_prob, groups)
    low, high = result.conf_int(alpha=1 - confidence)[2] if groups is not None else (None, None)
    return Figure(
        float(result.params[2]),
        None if low is None else float(low),
        None if high is None else float(high),
    )


def _correlation(totals: np.ndarray) -> np.ndarray:
    return line_of_totals(totals).correlation


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class EstimatorScore:
    """How well one device-side score tells rejections, same trace and metrics for all.

    Attributes
    ----------
    name : str
    correlation : Figure
        Pearson correlation with beta, token by token.
    auroc : Figure
        P(score of a rejected token > score of an accepted one), each token counted as rejected
        with weight beta.
    skip_rate_at_risk : dict of str to Figure
        Largest share of drafts skipped with rejection risk at most the key.
    """

    name: str
    correlation: Figure
    auroc: Figure
    skip_rate_at_risk: dict[str, Figure]


def score_estimator(
    name: str,
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    confidence: float = 0.95,
    seed: int = 0,
) -> EstimatorScore:
    """Correlation, AUROC and skip rates of one score, with cluster-bootstrap intervals.

    The curves are evaluated on SCORE_BINS quantile bins of the score, ties kept together.
    """
    counts = resample_prompts(num_prompts, NUM_RESAMPLES, np.random.default_rng(seed))
    moments = sum_by_prompt(line_moments(score, rejection_prob), prompt_index, num_prompts)
    edges = np.unique(np.quantile(score, np.linspace(0, 1, SCORE_BINS + 1)[1:]))
    bin_of = np.searchsorted(edges, score, side="left")
    num_bins = len(edges)
    sums = np.zeros((num_prompts, 2, num_bins))
    np.add.at(sums[:, 0], (prompt_index, bin_of), 1.0)
    np.add.at(sums[:, 1], (prompt_index, bin_of), rejection_prob)
    flat = sums.reshape(num_prompts, -1)

    def auroc(totals: np.ndarray) -> np.ndarray:
        total, positive = (totals.reshape(-1, 2, num_bins)[:, i] for i in range(2))
        negative = total - positive
        below = np.cumsum(negative, axis=1) - negative
        with np.errstate(invalid="ignore", divide="ignore"):
            return (positive * (below + negative / 2)).sum(1) / (positive.sum(1) * negative.sum(1))

    def skip_rate(level: float) -> Any:
        def statistic(totals: np.ndarray) -> np.ndarray:
            total, positive = (totals.reshape(-1, 2, num_bins)[:, i] for i in range(2))
            number = total.sum(1, keepdims=True)
            risk = np.cumsum(positive, axis=1) / number
            rate = np.cumsum(total, axis=1) / number
            return np.max(np.where(risk <= level, rate, 0.0), axis=1)

        return statistic

    resampled = bootstrap_totals(flat, counts)

    def figure(data: np.ndarray, totals: np.ndarray, statistic: Any) -> Figure:
        value = float(statistic(data.sum(0, keepdims=True))[0])
        interval = percentile_interval(statistic(totals), num_prompts, confidence)
        low, high = interval if interval is not None else (None, None)
        return Figure(_finite(value), low, high)

    return EstimatorScore(
        name,
        figure(moments, bootstrap_totals(moments, counts), _correlation),
        figure(flat, resampled, auroc),
        {f"{level:g}": figure(flat, resampled, skip_rate(level)) for level in RISK_LEVELS},
    )
