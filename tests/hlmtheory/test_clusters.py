"""Prompts as the unit: cluster-robust means and the cluster bootstrap, with coverage simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hlmtheory.clusters import (
    RatioEstimate,
    bootstrap_totals,
    error_terms,
    jackknife_correlation_interval,
    joint_error,
    mean_over_tokens,
    percentile_interval,
    ratio_of_sums,
    resample_prompts,
    sum_by_prompt,
)


def clustered_trace(
    rng: np.random.Generator, num_prompts: int, *, between: float = 1.0, within: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Token values whose prompt means differ, 5 to 40 tokens a prompt, expectation 0.

    Lengths do not depend on the values, so that the mean over tokens estimates 0.
    """
    lengths = rng.integers(5, 41, size=num_prompts)
    prompt_index = np.repeat(np.arange(num_prompts), lengths)
    effect = between * rng.standard_normal(num_prompts)
    values = effect[prompt_index] + within * rng.standard_normal(len(prompt_index))
    return values, prompt_index


def mean_over_tokens_reference(
    values: np.ndarray, prompt_index: np.ndarray, num_prompts: int
) -> tuple[float, float]:
    """The obvious loops over prompts and tokens."""
    totals, counts = [], []
    for prompt in range(num_prompts):
        mine = [v for v, p in zip(values, prompt_index, strict=True) if p == prompt and v == v]
        if mine:
            totals.append(sum(mine))
            counts.append(len(mine))
    mean = sum(totals) / sum(counts)
    n = len(totals)
    scatter = sum((a - mean * b) ** 2 for a, b in zip(totals, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * scatter) / sum(counts)


# --- sums ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda num: st.tuples(
            arrays(np.float64, num, elements=st.floats(-1e3, 1e3)),
            arrays(np.int64, num, elements=st.integers(0, 6)),
        )
    )
)
def test_sum_by_prompt_is_the_loop(pair):
    values, prompt_index = pair
    expected = [sum(values[prompt_index == prompt]) for prompt in range(9)]
    np.testing.assert_allclose(sum_by_prompt(values, prompt_index, 9), expected, atol=1e-9)
    both = sum_by_prompt(np.column_stack([values, 2 * values]), prompt_index, 9)
    np.testing.assert_allclose(
        both, np.column_stack([expected, np.multiply(2, expected)]), atol=1e-9
    )


# --- the mean over tokens ------------------------------------------------------------------------


def test_mean_and_standard_error_are_the_loops(rng):
    values, prompt_index = clustered_trace(rng, 25)
    values[rng.uniform(size=len(values)) < 0.2] = np.nan
    values[prompt_index == 7] = np.nan  # a prompt without a value is no observation
    estimate = mean_over_tokens(values, prompt_index, 25)
    mean, standard_error = mean_over_tokens_reference(values, prompt_index, 25)
    assert estimate.value == pytest.approx(mean, abs=1e-12)
    assert estimate.standard_error == pytest.approx(standard_error, abs=1e-12)
    assert estimate.num_prompts == 24


def test_one_token_a_prompt_is_the_textbook_mean(rng):
    values = rng.normal(size=40)
    estimate = mean_over_tokens(values, np.arange(40), 40)
    assert estimate.value == pytest.approx(values.mean(), abs=1e-14)
    assert estimate.standard_error == pytest.approx(stats.sem(values), abs=1e-14)
    low, high = stats.t.interval(0.9, 39, values.mean(), stats.sem(values))
    assert estimate.interval(0.9) == pytest.approx((low, high), abs=1e-12)


def test_copies_of_a_token_add_no_information(rng):
    """Twenty copies of each token leave the standard error alone; a token-level one shrinks."""
    values = rng.normal(size=30)
    once = mean_over_tokens(values, np.arange(30), 30)
    copies = mean_over_tokens(np.repeat(values, 20), np.repeat(np.arange(30), 20), 30)
    assert copies.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert stats.sem(np.repeat(values, 20)) < 0.3 * once.standard_error


def test_order_of_tokens_and_numbering_of_prompts_do_not_matter(rng):
    values, prompt_index = clustered_trace(rng, 12)
    estimate = mean_over_tokens(values, prompt_index, 12)
    shuffle = rng.permutation(len(values))
    renamed = rng.permutation(12)[prompt_index]
    again = mean_over_tokens(values[shuffle], renamed[shuffle], 12)
    assert again.value == pytest.approx(estimate.value, abs=1e-12)
    assert again.standard_error == pytest.approx(estimate.standard_error, abs=1e-12)


def simulated_coverage(rng: np.random.Generator, num_runs: int) -> tuple[int, int]:
    """How often the clustered and the token-level 95 % intervals hold the true mean, 0."""
    clustered = naive = 0
    for _ in range(num_runs):
        values, prompt_index = clustered_trace(rng, 40)
        low, high = mean_over_tokens(values, prompt_index, 40).interval()
        clustered += low <= 0 <= high
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        naive += abs(values.mean()) <= half
    return clustered, naive


def test_interval_covers_and_the_token_level_one_does_not(rng):
    """40 prompts, half of the variance between prompts; the token-level error is the control."""
    num_runs = 2_000
    clustered, naive = simulated_coverage(rng, num_runs)
    # Unequal prompt lengths cost the t interval up to a percent of coverage at 40 prompts.
    assert clustered >= stats.binom.ppf(5e-4, num_runs, 0.94)
    assert clustered <= stats.binom.ppf(1 - 5e-4, num_runs, 0.95)
    assert naive < 0.6 * num_runs


@pytest.mark.parametrize(
    ("kind", "num_prompts", "share"),
    [("equal", 5, 0.934), ("equal", 160, 0.953), ("lognormal", 5, 0.862), ("lognormal", 40, 0.923),
     ("rare", 5, 0.407), ("rare", 40, 0.891)],
)  # fmt: skip
def test_intervals_hold_as_often_as_the_theory_says(rng, kind, num_prompts, share):
    """Section 9 of docs/theory.md, before (34): its own draws, 2,000 of them."""
    size, num_runs = (2_000, num_prompts), 2_000
    lengths = np.full(size, 64)
    if kind == "lognormal":
        lengths = np.clip(np.ceil(rng.lognormal(np.log(32), 1.0, size)), 1, 256).astype(int)
    rates, truth = rng.beta(2, 6, size), 0.25
    if kind == "rare":
        rates, truth = np.where(rng.random(size) < 0.1, 0.2, 0.0), 0.02
    sums = rng.binomial(lengths, rates)
    intervals = np.array(
        [ratio_of_sums(*one).interval() for one in zip(sums, lengths, strict=True)]
    )
    above, below = intervals[:, 1] < truth, intervals[:, 0] > truth
    held = 1 - np.mean(above | below)
    assert abs(held - share) < 4.5 * np.sqrt(share * (1 - share) * (1 / num_runs + 1 / 6_000))
    assert above.sum() > below.sum()
    if kind == "rare":
        assert above.sum() > 10 * below.sum()
        assert (
            held < np.mean(sums.any(axis=1)) + 1e-9
        )  # without an event the interval is a point, at 0


def test_without_prompt_effects_both_standard_errors_agree(rng):
    values, prompt_index = clustered_trace(rng, 4_000, between=0.0)
    estimate = mean_over_tokens(values, prompt_index, 4_000)
    # The variance of 4,000 prompts is known to sqrt(2/4000) = 2 %, its root to half of that.
    assert estimate.standard_error == pytest.approx(stats.sem(values), rel=0.05)


def test_one_prompt_has_a_value_and_no_interval():
    estimate = mean_over_tokens(np.array([0.2, 0.4]), np.array([3, 3]), 5)
    assert estimate.value == pytest.approx(0.3, abs=1e-15)
    assert math.isnan(estimate.standard_error)
    assert estimate.num_prompts == 1
    assert estimate.interval() is None


def test_interval_is_symmetric_and_widens_with_confidence():
    estimate = RatioEstimate(0.3, 0.02, 12)
    widths = []
    for confidence in (0.5, 0.9, 0.99):
        low, high = estimate.interval(confidence)
        assert (low + high) / 2 == pytest.approx(0.3, abs=1e-15)
        widths.append(high - low)
    assert widths == sorted(widths)
    assert RatioEstimate(0.3, 0.0, 12).interval() == (0.3, 0.3)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.5, math.nan])
def test_confidence_is_a_share_not_a_percentage(confidence):
    with pytest.raises(ValueError, match=r"^confidence = .*\(0, 1\)"):
        RatioEstimate(0.3, 0.02, 12).interval(confidence)


@pytest.mark.parametrize("bad", [2, 9, -1])
def test_prompt_index_out_of_range_is_refused(bad):
    """Prompts that do not exist must not raise the number of prompts, the n of every interval."""
    with pytest.raises(ValueError, match=r"^prompt_index "):
        mean_over_tokens(np.ones(3), np.array([0, 1, bad]), 2)


def test_no_token_is_refused():
    with pytest.raises(ValueError, match=r"^values holds no finite entry"):
        mean_over_tokens(np.array([np.nan, np.nan]), np.array([0, 1]), 2)


# --- the bootstrap -------------------------------------------------------------------------------


def ratio(totals: np.ndarray) -> np.ndarray:
    """Mean over tokens from the totals of values and of counts."""
    return totals[..., 0] / totals[..., 1]


def test_resamples_draw_as_many_prompts_as_there_are(rng):
    counts = resample_prompts(30, 5_000, rng)
    assert counts.shape == (5_000, 30)
    np.testing.assert_array_equal(counts.sum(axis=1), 30)
    # Each count is binomial(30, 1/30): mean 1, variance 29/30.
    assert counts.mean() == pytest.approx(1, abs=1e-12)
    assert counts.var() == pytest.approx(29 / 30, rel=0.02)


def test_resamples_have_the_multinomial_law(rng):
    """Each count is binomial, and two counts have covariance -1/P, as drawing with replacement."""
    num_prompts, num_resamples = 8, 40_000
    counts = resample_prompts(num_prompts, num_resamples, rng).astype(int)
    for column in (0, num_prompts - 1):
        seen = np.bincount(np.minimum(counts[:, column], 4), minlength=5)
        law = stats.binom.pmf(np.arange(4), num_prompts, 1 / num_prompts)
        expected = num_resamples * np.append(law, 1 - law.sum())
        assert stats.chisquare(seen, expected).pvalue > 1e-4
    products = (counts[:, 0] - 1.0) * (counts[:, 1] - 1.0)
    error = products.std() / math.sqrt(num_resamples)
    assert abs(products.mean() + 1 / num_prompts) < 4 * error


@pytest.mark.parametrize("num_resamples", [0, 1, 256, 257, 600])
def test_totals_in_blocks_are_the_sums_of_the_drawn_prompts(rng, num_resamples):
    """256 resamples make a block: none, a part of one, one, one and one more, several."""
    sums = rng.normal(size=(7, 3))
    counts = resample_prompts(7, num_resamples, rng)
    totals = bootstrap_totals(sums, counts)
    assert totals.shape == (num_resamples, 3)
    assert totals.dtype == np.float64
    for row, total in zip(counts.astype(int), totals, strict=True):
        # Sums of seven numbers near 1, in another order.
        np.testing.assert_allclose(total, sums[np.repeat(np.arange(7), row)].sum(0), atol=1e-12)


def test_totals_of_large_sums_keep_double_precision(rng):
    """Counts are stored in single precision, whose sums would lose tokens beyond 2^24."""
    totals = bootstrap_totals(np.full((4, 1), 2.0**24 + 1), resample_prompts(4, 300, rng))
    np.testing.assert_array_equal(totals, 4 * (2.0**24 + 1))


def test_bootstrap_is_the_resampling_of_whole_prompts(rng):
    """The matrix product against drawing prompts and concatenating their tokens."""
    values, prompt_index = clustered_trace(rng, 10)
    counts = resample_prompts(10, 50, rng)
    sums = np.column_stack(
        [sum_by_prompt(values, prompt_index, 10), sum_by_prompt(0 * values + 1, prompt_index, 10)]
    )
    means = []
    for row in counts.astype(int):
        drawn = [values[prompt_index == prompt] for prompt in np.repeat(np.arange(10), row)]
        means.append(np.concatenate(drawn).mean())
    found = percentile_interval(ratio(bootstrap_totals(sums, counts)), 10, 0.8)
    assert found == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])), abs=1e-12)


def test_percentile_interval_is_near_the_closed_form(rng):
    """With 200 prompts the percentile interval of a mean is the linearised one within a tenth."""
    values, prompt_index = clustered_trace(rng, 200)
    sums = np.column_stack(
        [sum_by_prompt(values, prompt_index, 200), np.bincount(prompt_index, minlength=200)]
    )
    totals = bootstrap_totals(sums, resample_prompts(200, 4_000, rng))
    low, high = percentile_interval(ratio(totals), 200)
    expected = mean_over_tokens(values, prompt_index, 200).interval()
    width = expected[1] - expected[0]
    # Quantiles of 4,000 resamples are known to 4 % of a half width, its skewness adds a little.
    assert low == pytest.approx(expected[0], abs=0.05 * width)
    assert high == pytest.approx(expected[1], abs=0.05 * width)


def test_bootstrap_says_when_it_has_nothing_to_say() -> None:
    values = np.ones(1_000)
    assert percentile_interval(values, 1) is None
    values[:200] = np.nan  # a fifth is undefined
    assert percentile_interval(values, 5) is None
    values[50:] = 1.0
    assert percentile_interval(values, 5) == (1.0, 1.0)


# --- the jackknife -------------------------------------------------------------------------------


def moment_sums(x: np.ndarray, y: np.ndarray, prompt_index: np.ndarray, num: int) -> np.ndarray:
    """Per-prompt sums from which a correlation over tokens follows."""
    columns = np.column_stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    return sum_by_prompt(columns, prompt_index, num)


def correlation_of_totals(totals: np.ndarray) -> np.ndarray:
    """Pearson correlation from totals of (1, x, y, xx, yy, xy)."""
    n, sx, sy, sxx, syy, sxy = np.moveaxis(totals, -1, 0)
    return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))


def test_jackknife_is_the_loop_over_prompts(rng):
    x, prompt_index = clustered_trace(rng, 15)
    y = 0.7 * x + rng.standard_normal(len(x))
    left_out = []
    for prompt in range(15):
        kept = prompt_index != prompt
        left_out.append(math.atanh(np.corrcoef(x[kept], y[kept])[0, 1]))
    error = math.sqrt(14 / 15 * sum((z - np.mean(left_out)) ** 2 for z in left_out))
    half = stats.t.ppf(0.95, 14) * error
    z = math.atanh(np.corrcoef(x, y)[0, 1])
    found = jackknife_correlation_interval(
        moment_sums(x, y, prompt_index, 15), correlation_of_totals, 0.9
    )
    # The correlation from totals loses a few digits to cancellation.
    assert found == pytest.approx((math.tanh(z - half), math.tanh(z + half)), abs=1e-9)


def test_jackknife_interval_covers_the_correlation(rng):
    """30 prompts whose effect both variables share: true correlation 0.5 token by token."""
    num_runs, hits = 600, 0
    for _ in range(num_runs):
        prompt_index = np.repeat(np.arange(30), rng.integers(5, 21, size=30))
        shared = rng.standard_normal(30)[prompt_index]
        x = shared + rng.standard_normal(len(shared))
        y = shared + rng.standard_normal(len(shared))
        low, high = jackknife_correlation_interval(
            moment_sums(x, y, prompt_index, 30), correlation_of_totals
        )
        hits += low <= 0.5 <= high
    # Thirty prompts of unequal length cost up to two percent of coverage.
    assert stats.binom.ppf(5e-4, num_runs, 0.93) <= hits <= stats.binom.ppf(0.9995, num_runs, 0.96)


def test_jackknife_says_when_it_has_nothing_to_say(rng):
    x = rng.normal(size=20)
    sums = moment_sums(x, x, np.arange(20) % 2, 2)
    assert jackknife_correlation_interval(sums, correlation_of_totals) is None

    def undefined(totals: np.ndarray) -> np.ndarray:
        return np.full(totals.shape[:-1], np.nan)

    sums = moment_sums(x, x, np.arange(20) % 5, 5)
    assert jackknife_correlation_interval(sums, undefined) is None


# --- independent estimates together --------------------------------------------------------------


def test_independent_errors_add_and_share_their_degrees_of_freedom(rng):
    parts = [error_terms(rng.normal(size=n) * scale) for n, scale in ((8, 1.0), (20, 0.3))]
    both = joint_error(*parts)
    variances = [part.standard_error**2 for part in parts]
    assert both.standard_error**2 == pytest.approx(sum(variances))
    expected = sum(variances) ** 2 / (variances[0] ** 2 / 7 + variances[1] ** 2 / 19)
    assert both.freedom == int(expected)
    alike = error_terms(np.array([1.0, -1.0, 2.0, -2.0]))
    assert joint_error(alike, alike).freedom == 6  # twice that of one, where both vary alike
    still = error_terms(np.zeros(5))
    assert joint_error(alike, still).freedom == 3


def test_a_joint_interval_holds_the_difference_as_often_as_it_says(rng):
    """Two samples of unlike size and spread, 2,000 times: 95 % within its binomial error."""
    held = 0
    for _ in range(2000):
        one, other = rng.normal(size=6), 3 * rng.normal(size=40)
        terms = [error_terms((values - values.mean()) / len(values)) for values in (one, other)]
        error = joint_error(*terms)
        half = stats.t.ppf(0.975, error.freedom) * error.standard_error
        held += abs(one.mean() - other.mean()) <= half
    assert 0.935 < held / 2000 < 0.965
