"""The device-side scores side by side, the learned one fitted, with intervals by prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibrate.run.figure import figure
from calibrate.run.records import EstimatorScore, Figure, LearnedModel
from calibrate.run.traces import Trace
from hlmtheory.clusters import bootstrap_totals, percentile_interval, resample_prompts
from hlmtheory.learned_score import Model, cross_fitted_score, fit_logistic
from hlmtheory.relation import line_of_totals
from hlmtheory.risk import SkipAtoms, SkipRiskSums, skip_rate_at_risk, skip_risk_sums
from hlmtheory.scores import PLAIN_SCORES, LearnedScore

NUM_RESAMPLES = 2000
RISK_LEVELS = (0.005, 0.01, 0.02, 0.05)
SCORE_BINS = 199
"""Quantiles of the tokens that a curve is kept at; its origin comes before them."""

COLUMNS = {"one_minus_max_prob": "max_prob", "one_minus_margin": "margin"}
"""What a score is made of, where that is not the column of its own name."""

LEARNED_FEATURES = ("uncertainty", "entropy", "max_prob", "margin", "draft_prob", "step")
LEARNED_MIN_PROMPTS = 10
LEARNED_MAX_TOKENS = 200_000


def compare_scores(
    trace: Trace, confidence: float = 0.95
) -> tuple[tuple[EstimatorScore, ...], LearnedModel | None]:
    """Every score that the trace has the columns of, learned ones last, and the learned model."""
    beta, index, num_prompts = trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    compared: list[EstimatorScore] = []
    exact = _skip_rates(SkipAtoms.of_drafts(trace["uncertainty"], beta, index, num_prompts))
    for score in PLAIN_SCORES:
        if COLUMNS.get(score.name, score.name) in trace:
            drafts = SkipAtoms.of_drafts(score.of_draft(trace.step()), beta, index, num_prompts)
            compared.append(compare_score(score.name, score.label, drafts, confidence, exact))
    learned, model = _learned(trace, confidence)
    return (*compared, *learned), model


def _learned(trace: Trace, confidence: float) -> tuple[list[EstimatorScore], LearnedModel | None]:
    """E[beta | device-side features], docs/theory.md, (15): the model, and its honest figures.

    The model is fitted on all tokens, or every m-th prompt where these are more than
    LEARNED_MAX_TOKENS. What is said of it, and of boosted trees beside it, is cross-fitted: each
    prompt scored by a fit to others. Nothing with fewer than LEARNED_MIN_PROMPTS prompts.
    """
    every = -(-trace.num_tokens // LEARNED_MAX_TOKENS)
    num_prompts = -(-trace.num_prompts // every)
    if num_prompts < LEARNED_MIN_PROMPTS or any(name not in trace for name in LEARNED_FEATURES):
        return [], None
    kept = trace.prompt_index % every == 0
    features = np.column_stack([trace[name][kept] for name in LEARNED_FEATURES])
    beta, index = trace["rejection_prob"][kept], trace.prompt_index[kept] // every
    fit = fit_logistic(features, beta)
    model = LearnedModel(
        features=LEARNED_FEATURES,
        mean=tuple(fit.mean.tolist()),
        scale=tuple(fit.scale.tolist()),
        coefficients=tuple(fit.coefficients.tolist()),
        intercept=fit.intercept,
    )
    compared = []
    exact = _skip_rates(SkipAtoms.of_drafts(trace["uncertainty"][kept], beta, index, num_prompts))
    kinds: dict[Model, tuple[str, str]] = {
        "logistic": (LearnedScore.name, LearnedScore.label),
        "boosting": ("learned_boosting", "learned, boosting"),
    }
    for kind, (name, label) in kinds.items():
        score = cross_fitted_score(features, beta, index, kind)
        drafts = SkipAtoms.of_drafts(score, beta, index, num_prompts)
        compared.append(compare_score(name, label, drafts, confidence, exact))
    return compared, model


@dataclass(frozen=True)
class SkipRates:
    """Skip rates of a score at RISK_LEVELS, (L,), and of resampled prompts, (R, L)."""

    sums: SkipRiskSums
    whole: np.ndarray
    resampled: np.ndarray
    auroc: tuple[np.ndarray, np.ndarray]


def _skip_rates(atoms: SkipAtoms) -> SkipRates:
    """At SCORE_BINS quantiles of the score, ties kept together; the same prompts for all scores."""
    counts = resample_prompts(atoms.num_prompts, NUM_RESAMPLES, np.random.default_rng(0))
    sums = skip_risk_sums(atoms, atoms.quantiles(SCORE_BINS))
    whole = np.ones((1, atoms.num_prompts), dtype=np.float32)
    both = [sums.resampled(weights) for weights in (whole, counts)]
    rates = [
        np.stack([skip_rate_at_risk(*one.rates(), level) for level in RISK_LEVELS], -1)
        for one in both
    ]
    return SkipRates(sums, rates[0][0], rates[1], (_auroc(both[0]), _auroc(both[1])))


def compare_score(
    name: str,
    label: str,
    atoms: SkipAtoms,
    confidence: float = 0.95,
    exact: SkipRates | None = None,
) -> EstimatorScore:
    """Correlation, AUROC, skip rates and curve of one score, with cluster-bootstrap intervals.

    All but the correlation are taken at SCORE_BINS quantiles of the score. `exact` is of the exact
    uncertainty on the same prompts, which differences are paired with, if there are to be any.
    """
    counts = resample_prompts(atoms.num_prompts, NUM_RESAMPLES, np.random.default_rng(0))
    whole = np.ones((1, atoms.num_prompts), dtype=np.float32)
    moments, found = _moments(atoms), _skip_rates(atoms)

    def interval(value: float, values: np.ndarray) -> Figure:
        ends = percentile_interval(values, atoms.num_prompts, confidence)
        return figure(value, *(ends or ()))

    def by_level(value: np.ndarray, values: np.ndarray) -> dict[str, Figure]:
        return {
            f"{level:g}": interval(float(value[place]), values[:, place])
            for place, level in enumerate(RISK_LEVELS)
        }

    rate, risk = found.sums.curve()
    return EstimatorScore(
        name=name,
        label=label,
        correlation=interval(
            line_of_totals(bootstrap_totals(moments, whole)).correlation[0],
            line_of_totals(bootstrap_totals(moments, counts)).correlation,
        ),
        auroc=interval(found.auroc[0][0], found.auroc[1]),
        skip_rate_at_risk=by_level(found.whole, found.resampled),
        less_uncertainty={}
        if exact is None
        else by_level(found.whole - exact.whole, found.resampled - exact.resampled),
        risk=(0.0, *risk.tolist()),
        skip_rate=(0.0, *rate.tolist()),
    )


def _moments(atoms: SkipAtoms) -> np.ndarray:
    """Sums by prompt of 1, s, beta, s^2, beta^2 and s beta over the drafts' probability, (P, 6)."""
    score, mass, rejection = atoms.score, atoms.mass, atoms.rejection
    parts = (
        mass, mass * score, rejection, mass * score**2, rejection**2 / mass, score * rejection,
    )  # fmt: skip
    sums = [np.bincount(atoms.prompt_index, weights=p, minlength=atoms.num_prompts) for p in parts]
    return np.stack(sums, axis=1)


def _auroc(sums: SkipRiskSums) -> np.ndarray:
    """P(score of a rejected token > score of an accepted one), ties half, of each row (R,)."""
    positive = np.diff(sums.rejected, axis=1, prepend=0.0)
    negative = np.diff(sums.skipped, axis=1, prepend=0.0) - positive
    below = np.cumsum(negative, axis=1) - negative
    with np.errstate(invalid="ignore", divide="ignore"):
        both = positive.sum(axis=1) * negative.sum(axis=1)
        return np.asarray((positive * (below + negative / 2)).sum(axis=1) / both)
