"""Predictions against reruns: strata, pooled errors, the law of a count, the shift of contexts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from calibrate.run.folder import Figure
from calibrate.run.traces import Trace
from calibrate.validate.comparison import (
    NUM_REPEATS,
    Cell,
    Comparison,
    common_strata,
    prediction_interval,
    repeats,
    stratum_numbers,
)
from calibrate.validate.context_shift import context_shift
from hlmtheory.clusters import ErrorTerms, error_terms, mean_over_tokens, pooled_difference


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def test_one_stratum_is_the_plain_standard_error(rng):
    prompt_index = np.repeat(np.arange(9), rng.integers(1, 6, 9))
    estimate = mean_over_tokens(rng.normal(size=len(prompt_index)), prompt_index, 9)
    for strata in (None, np.full(9, 3)):
        error = error_terms(estimate.influence, strata)
        assert error.standard_error == pytest.approx(estimate.standard_error, rel=1e-12)
        assert (error.num_prompts, error.freedom) == (9, 8)


def test_stratified_error_is_that_of_a_mean_of_stratum_means(rng):
    """Equal shares, one token a prompt: se^2 = sum of (1/C)^2 s_c^2 / n_c."""
    values = rng.normal(size=24) + np.repeat([0.0, 5.0, -3.0], 8)
    strata = np.repeat(np.arange(3), 8)
    error = error_terms(mean_over_tokens(values, np.arange(24), 24).influence, strata)
    by_stratum = [values[strata == c].var(ddof=1) / 8 / 9 for c in range(3)]
    assert error.standard_error == pytest.approx(sum(by_stratum) ** 0.5, rel=1e-12)
    assert error.freedom == 21


def test_a_stratum_of_one_prompt_counts_in_full():
    influence = np.array([0.3, 0.1, -0.1, np.nan, -0.3])
    error = error_terms(influence, np.array([0, 1, 1, 1, 2]))
    assert error.terms == pytest.approx([0.3, 2**0.5 * 0.1, -(2**0.5) * 0.1, 0.0, -0.3])
    assert (error.num_prompts, error.freedom) == (4, 1)


def test_numbering_of_strata_does_not_matter(rng):
    influence, strata = rng.normal(size=30), rng.integers(0, 4, 30)
    renamed = np.array([7, 2, 11, 5])[strata]
    same = error_terms(influence, renamed)
    assert same.terms == pytest.approx(error_terms(influence, strata).terms, abs=1e-15)


def test_pooled_error_is_that_of_the_two_sample_t_test(rng):
    """One token a prompt: the interval holds the other mean where the t test says 5 % or more."""
    for shift in (0.0, 0.4, 0.6, 0.8, 1.2):
        first, second = rng.normal(size=30), rng.normal(shift, size=18)
        sides = [mean_over_tokens(x, np.arange(len(x)), len(x)) for x in (first, second)]
        error = pooled_difference(*(error_terms(side.influence) for side in sides))
        test = stats.ttest_ind(second, first)
        statistic = (sides[1].value - sides[0].value) / error.standard_error
        # The standard error of RatioEstimate has n / (n - 1) where s^2 has 1 / (n - 1): the same.
        assert statistic == pytest.approx(test.statistic, rel=1e-12)
        assert error.freedom == test.df == 46
        low, high = prediction_interval(sides[0].value, error, 0.95)
        assert (low <= sides[1].value <= high) == (test.pvalue >= 0.05)


def test_no_freedom_is_refused_in_one_line():
    single = error_terms(np.array([0.0]))
    with pytest.raises(ValueError, match="no degree of freedom on either side: give more"):
        pooled_difference(single, single)


def stratified_draw(rng: np.random.Generator, per_stratum: int) -> tuple[np.ndarray, np.ndarray]:
    """Four categories a standard deviation apart, `per_stratum` prompts of each, one token each."""
    strata = np.repeat(np.arange(4), per_stratum)
    return rng.normal(size=len(strata)) + 1.5 * strata, strata


def test_stratified_intervals_cover_and_plain_ones_cover_too_much(rng):
    """Two sets of one mix: the interval of (36) by strata holds 95 %, the plain one far more."""
    num_runs, held = 4_000, {"strata": 0, "plain": 0}
    for _ in range(num_runs):
        (first, of_first), (second, of_second) = stratified_draw(rng, 10), stratified_draw(rng, 4)
        sides = [mean_over_tokens(x, np.arange(len(x)), len(x)) for x in (first, second)]
        for name, strata in (("strata", (of_first, of_second)), ("plain", (None, None))):
            error = pooled_difference(
                *(error_terms(side.influence, c) for side, c in zip(sides, strata, strict=True))
            )
            low, high = prediction_interval(sides[0].value, error, 0.95)
            held[name] += low <= sides[1].value <= high
    # Normal values and equal shares: exact. Binomial bounds at 1 in 1,000 each.
    assert stats.binom.ppf(1e-3, num_runs, 0.95) <= held["strata"]
    assert held["strata"] <= stats.binom.ppf(1 - 1e-3, num_runs, 0.95)
    assert held["plain"] > 0.995 * num_runs


def test_strata_need_the_same_share_of_every_category():
    strata = common_strata(["b", "a", "a", "b"], ["a", "b"])
    assert strata is not None
    assert strata.calibration.tolist() == [1, 0, 0, 1]
    assert strata.rerun.tolist() == [0, 1]
    assert common_strata(["a", "a", "b", "b"], ["a", "a", "b"]) is None
    assert common_strata(["a", "a", "b", "b"], ["a", "c"]) is None
    assert common_strata(["a", "a", "b", "b"], []) is None
    assert common_strata([], ["a", "a"]) is None
    assert common_strata([], []) is None
    assert common_strata(["a", "b"], ["b", "a"]) is None  # nothing left to judge a spread by
    assert stratum_numbers(["x", "x"]).tolist() == [0, 0]


def comparison(terms: np.ndarray, off: float) -> Comparison:
    """A cell whose measured value is `off` standard errors from its prediction."""
    error = ErrorTerms(terms, len(terms), len(terms) - 2)
    low, high = prediction_interval(0.5, error, 0.95)
    measured = 0.5 + off * error.standard_error
    cell = Cell(
        "u-hlm", "r", "skip_rate", Figure(0.5, low, high), Figure(measured), low <= measured <= high
    )
    return Comparison(cell, error, cell.covered)


def normal_share(freedom: int) -> float:
    """P(|z| <= t quantile), a little over 95 %."""
    return float(2 * stats.norm.cdf(stats.t.ppf(0.975, freedom)) - 1)


def test_count_of_one_figure_said_forty_times(rng):
    """All cells hold or none does: every quantity is that of a single cell."""
    terms = rng.normal(size=60)
    result = repeats([comparison(terms, 1.0)] * 40, 0.95)
    expected = normal_share(58)
    error = 4 * (expected * (1 - expected) / NUM_REPEATS) ** 0.5
    assert result["share"]["value"] == pytest.approx(expected, abs=error)
    assert (result["share"]["low"], result["share"]["high"]) == (0.0, 1.0)
    assert result["probability_of_at_least"] == pytest.approx(expected, abs=error)
    assert result["probability_of_at_most"] == 1.0
    assert result["widest_error"] == pytest.approx(1.0)
    wide = 2 * stats.norm.sf(1.0)
    assert result["probability_of_as_wide"] == pytest.approx(wide, abs=4 * 0.5 / NUM_REPEATS**0.5)


def test_count_of_independent_cells_is_binomial():
    """Each cell has a prompt of its own: 100 independent cells, of which 90 hold."""
    cells = [comparison(np.eye(100)[i], 3.0 if i < 10 else 0.5) for i in range(100)]
    result = repeats(cells, 0.95)
    expected = normal_share(98)
    assert result["share"]["value"] == pytest.approx(expected, abs=0.001)
    low, high = stats.binom.ppf([0.025, 0.975], 100, expected) / 100
    assert result["share"]["low"] == pytest.approx(low, abs=0.0101)
    assert result["share"]["high"] == pytest.approx(high, abs=0.0101)
    few = stats.binom.cdf(90, 100, expected)
    assert result["probability_of_at_most"] == pytest.approx(
        few, abs=4 * (few / NUM_REPEATS) ** 0.5
    )
    wide = 1 - (1 - 2 * stats.norm.sf(3.0)) ** 100
    assert result["probability_of_as_wide"] == pytest.approx(wide, abs=0.02)


def test_without_a_spread_there_is_no_count_to_expect():
    still = comparison(np.zeros(5), 0.0)
    assert repeats([still], 0.95) == {}
    assert repeats([], 0.95) == {}


def trace(uncertainty: np.ndarray, categories: tuple[str, ...] = ()) -> Trace:
    """One token a row and prompt of (P, steps) uncertainties, beta = u / 2."""
    num, steps = uncertainty.shape
    columns = {
        "uncertainty": uncertainty.ravel(),
        "rejection_prob": uncertainty.ravel() / 2,
        "prompt_index": np.repeat(np.arange(num), steps),
    }
    return Trace(columns, [f"p{i}" for i in range(num)], categories)


def point(policy: str = "u-hlm") -> dict[str, Any]:
    return {
        "policy": policy, "rule": "risk-0.05", "uncertainty_threshold": {"value": 0.5},
        "settings": {},
    }  # fmt: skip


def test_shift_of_contexts_is_the_paired_difference(rng):
    base = rng.uniform(size=(40, 6))
    own = np.clip(base + 0.1 * rng.normal(size=base.shape) + 0.05, 0, 1)
    shift = context_shift(point(), trace(base), trace(own), trace(base), 0.95)
    assert shift is not None
    by_prompt = own.mean(1) - base.mean(1)
    test = stats.ttest_1samp(by_prompt, 0.0).confidence_interval(0.95)
    assert shift.uncertainty.value == pytest.approx(by_prompt.mean(), abs=1e-12)
    assert (shift.uncertainty.low, shift.uncertainty.high) == pytest.approx((test.low, test.high))
    under = (own <= 0.5).mean() - (base <= 0.5).mean()
    assert shift.below_threshold.value == pytest.approx(under, abs=1e-12)
    risk = (own / 2 * (own <= 0.5)).mean() - (base / 2 * (base <= 0.5)).mean()
    assert shift.risk_below_threshold.value == pytest.approx(risk, abs=1e-12)


def test_the_same_outputs_shift_nothing(rng):
    same = trace(rng.uniform(size=(12, 4)), ("a", "b") * 6)
    shift = context_shift(point(), same, same, same, 0.95)
    assert shift is not None
    for figure in (shift.below_threshold, shift.risk_below_threshold, shift.uncertainty):
        assert (figure.value, figure.low, figure.high) == (0.0, 0.0, 0.0)


def test_what_categories_differ_in_is_no_error_of_a_shift(rng):
    """Every category shifts by its own amount, its prompts alike: the stratified error is 0."""
    base = rng.uniform(0.3, 0.4, size=(12, 5))
    moved = base + np.repeat([0.0, 0.2, 0.4], 4)[:, None]
    names = tuple(np.repeat(["a", "b", "c"], 4))
    with_names, without = trace(base, names), trace(base)
    strict = context_shift(point(), with_names, trace(moved, names), with_names, 0.95)
    loose = context_shift(point(), without, trace(moved), without, 0.95)
    assert strict.uncertainty.high - strict.uncertainty.low == pytest.approx(0, abs=1e-12)
    assert loose.uncertainty.high - loose.uncertainty.low > 0.1
    assert strict.uncertainty.value == loose.uncertainty.value == pytest.approx(0.2)


def test_shift_and_prompts_add_up_to_measured_less_predicted(rng):
    """Other prompts, and a different number of them; the second term is a two-sample t interval."""
    cal, base = trace(rng.uniform(size=(30, 4))), trace(rng.uniform(size=(20, 4)))
    own = trace(np.clip(rng.uniform(size=(20, 4)) - 0.1, 0, 1))
    shift = context_shift(point(), cal, own, base, 0.95)
    assert shift is not None
    shares = [one["uncertainty"].reshape(-1, 4) <= 0.5 for one in (cal, own, base)]
    measured_less_predicted = shares[1].mean() - shares[0].mean()
    total = shift.below_threshold.value + shift.prompts_below_threshold.value
    assert total == pytest.approx(measured_less_predicted, abs=1e-12)
    test = stats.ttest_ind(shares[2].mean(1), shares[0].mean(1)).confidence_interval(0.95)
    found = shift.prompts_below_threshold
    assert (found.low, found.high) == pytest.approx((test.low, test.high))
    risks = [np.where(s, one["rejection_prob"].reshape(-1, 4), 0).mean()
             for s, one in zip(shares, (cal, own, base), strict=True)]  # fmt: skip
    assert shift.risk_below_threshold.value + shift.prompts_risk.value == pytest.approx(
        risks[1] - risks[0], abs=1e-12
    )


def test_shift_is_of_thresholds_and_of_the_same_prompts(rng):
    base = trace(rng.uniform(size=(5, 4)))
    assert context_shift(point("slm"), base, base, base, 0.95) is None
    assert context_shift(point("hlm"), base, base, base, 0.95) is None
    others = Trace(base.columns, [f"q{i}" for i in range(5)])
    assert context_shift(point(), base, base, others, 0.95) is None
