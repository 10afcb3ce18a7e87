"""The fitted line and what stands beside it, against closed forms, loops and other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from calibrate.fit.line import fit_line, relation
from calibrate.run.records import LineFit
from hlmtheory.clusters import mean_over_tokens
from hlmtheory.relation import binned_means

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def tokens(rng: np.random.Generator, num_prompts: int = 60, most: int = 30) -> Tokens:
    """u, beta, prompt_index, P: beta = 0.7 u + 0.1 and an error that prompts share."""
    index = np.repeat(np.arange(num_prompts), rng.integers(5, most, size=num_prompts))
    u = rng.uniform(size=len(index))
    noise = 0.05 * rng.normal(size=num_prompts)[index] + 0.1 * rng.normal(size=len(index))
    return u, np.clip(0.7 * u + 0.1 + noise, 0, 1), index, num_prompts


def fitted(u: np.ndarray, beta: np.ndarray, index: np.ndarray, num_prompts: int) -> LineFit:
    return fit_line(u, beta, beta > 0, index, num_prompts)


def test_coefficients_are_least_squares_and_their_errors_clustered(rng) -> None:
    u, beta, index, num = tokens(rng)
    fit = fitted(u, beta, index, num)
    slope, intercept = np.polyfit(u, beta, 1)
    assert (fit.slope.value, fit.intercept.value) == pytest.approx((slope, intercept), abs=1e-10)
    # The sandwich, written out: bread x sum of outer products of prompts' scores x bread.
    design = np.column_stack([u, np.ones_like(u)])
    scores = design * (beta - design @ [slope, intercept])[:, None]
    by_prompt = np.stack([scores[index == i].sum(0) for i in range(num)])
    bread = np.linalg.inv(design.T @ design)
    n = len(u)
    small = num / (num - 1) * (n - 1) / (n - 2)  # statsmodels' correction
    expected = small * bread @ by_prompt.T @ by_prompt @ bread
    np.testing.assert_allclose(fit.covariance, expected, rtol=1e-8)
    half = stats.t.ppf(0.975, num - 1) * expected[0, 0] ** 0.5
    assert (fit.slope.low, fit.slope.high) == pytest.approx((slope - half, slope + half))
    assert fit.correlation.value == pytest.approx(np.corrcoef(u, beta)[0, 1], abs=1e-10)
    assert fit.delta.value == pytest.approx((beta > 0).mean())
    assert fit.correlation_binned.value > fit.correlation.value
    bins = binned_means(u, beta)
    assert fit.correlation_binned.value == pytest.approx(bins.correlation, abs=1e-10)
    assert fit.num_bins == len(bins.num_tokens)


def test_slope_interval_covers_and_one_over_tokens_does_not(rng) -> None:
    """Prompts that differ in slope: 200 data sets, the true slope 0.5."""
    clustered = naive = 0
    for _ in range(200):
        index = np.repeat(np.arange(40), 25)
        u = rng.uniform(size=1000)
        beta = np.clip((0.5 + 0.2 * rng.normal(size=40)[index]) * u, 0, 1)
        fit = fitted(u, beta, index, 40)
        clustered += fit.slope.low <= 0.5 <= fit.slope.high
        plain = stats.linregress(u, beta)
        naive += abs(plain.slope - 0.5) <= 1.96 * plain.stderr
    assert clustered >= stats.binom.ppf(1e-4, 200, 0.93)
    assert naive < stats.binom.ppf(1e-4, 200, 0.93)


def test_curvature_tells_a_parabola_from_a_line(rng) -> None:
    u, beta, index, num = tokens(rng)
    straight = fitted(u, beta, index, num).curvature
    bent = fitted(u, np.clip(beta * u, 0, 1), index, num).curvature
    assert straight.low < 0 < straight.high
    assert bent.low > 0


def test_lack_of_fit_is_told_where_the_relation_bends_and_rarely_where_it_does_not(rng) -> None:
    """An S that a parabola does not see; and 200 straight lines with errors that prompts share."""
    u, beta, index, num = tokens(rng, 160)
    found = fitted(u, np.clip(beta + 0.05 * np.sin(2 * np.pi * u), 0, 1), index, num)
    assert found.lack_of_fit.degrees == found.num_bins - 2
    assert found.lack_of_fit.p_value < 1e-3
    low = 0
    for _ in range(200):
        index = np.repeat(np.arange(60), 12)
        u = rng.uniform(size=len(index))
        noise = 0.05 * rng.normal(size=60)[index] * u + 0.05 * rng.normal(size=len(index))
        low += fitted(u, 0.5 * u + 0.2 + noise, index, 60).lack_of_fit.p_value < 0.05
    least, most = stats.binom.interval(0.9999, 200, 0.05)
    assert least <= low <= most
    assert fitted(u[:24], beta[:24], index[:24], 2).lack_of_fit is None


def test_one_prompt_has_values_and_no_intervals(rng) -> None:
    u, beta, _, _ = tokens(rng)
    index = np.zeros(len(u), dtype=int)
    fit = fitted(u, beta, index, 1)
    for name in ("slope", "intercept", "correlation", "mean_rejection", "delta", "curvature"):
        number = getattr(fit, name)
        assert number.value is not None
        assert number.low is number.high is None
    found = relation(u, beta, index, 1, fit)
    assert set(found.line.low) == set(found.line.high) == {None}
    assert fitted(u[:3], beta[:3], index[:3], 1).curvature.value is None


@pytest.mark.parametrize(
    ("u", "why"),
    [
        (np.full(9, 0.3), "all 9 tokens have the uncertainty 0.3"),
        (np.array([0.1, 0.9]), "2 tokens, fewer than three"),
    ],
)
def test_without_a_line_there_is_a_level_and_a_reason(u, why) -> None:
    beta, index = np.linspace(0.2, 0.6, len(u)), np.arange(len(u))
    fit = fitted(u, beta, index, len(u))
    assert fit.degenerate == why
    assert fit.slope.value is fit.correlation.value is fit.correlation_binned.value is None
    assert fit.intercept == fit.mean_rejection
    assert fit.intercept.value == pytest.approx(beta.mean())
    band = relation(u, beta, index, len(u), fit).line
    assert band.value == pytest.approx([beta.mean()] * len(band.grid))


def test_bins_are_means_with_clustered_intervals(rng) -> None:
    u, beta, index, num = tokens(rng)
    found = relation(u, beta, index, num, fitted(u, beta, index, num))
    bins = binned_means(u, beta)
    assert len(found.bins) == len(bins.num_tokens)
    for number, one in enumerate(found.bins):
        inside = bins.bin_of_token == number
        expected = mean_over_tokens(beta[inside], index[inside], num)
        assert one.num_tokens == inside.sum()
        assert one.uncertainty == pytest.approx(u[inside].mean())
        assert one.rejection_prob.value == pytest.approx(expected.value)
        low, high = np.clip(expected.interval(), 0, 1)
        assert (one.rejection_prob.low, one.rejection_prob.high) == pytest.approx((low, high))


def test_line_and_band_are_those_of_the_covariance(rng) -> None:
    u, beta, index, num = tokens(rng)
    fit = fitted(u, beta, index, num)
    line = relation(u, beta, index, num, fit).line
    slope, intercept = fit.slope.value, fit.intercept.value
    assert len(line.grid) == 41
    # At u = 0 the band is the intercept's own interval.
    assert (line.value[0], line.low[0], line.high[0]) == pytest.approx(
        (intercept, fit.intercept.low, fit.intercept.high)
    )
    for place in (13, 40):
        row = np.array([line.grid[place], 1.0])
        half = stats.t.ppf(0.975, num - 1) * (row @ np.array(fit.covariance) @ row) ** 0.5
        centre = slope * row[0] + intercept
        assert line.value[place] == pytest.approx(centre)
        assert line.high[place] - line.value[place] == pytest.approx(half)
    steep = fit.model_copy(update={"slope": fit.slope.model_copy(update={"value": 3.0})})
    clipped = relation(u, beta, index, num, steep).line
    assert max(clipped.value) == max(clipped.high) == 1.0


def test_isotonic_curve_is_the_reference(rng) -> None:
    """Against scikit-learn, ties of u included."""
    u, beta, index, num = tokens(rng)
    u = np.round(u, 2)
    found = relation(u, beta, index, num, fitted(u, beta, index, num))
    expected = IsotonicRegression(y_min=0, y_max=1).fit(u, beta)
    grid = np.unique(u)
    drawn = np.interp(grid, found.isotonic_uncertainty, found.isotonic_rejection)
    np.testing.assert_allclose(drawn, expected.predict(grid), atol=1e-10)
    assert np.all(np.diff(found.isotonic_rejection) >= 0)


def test_every_token_is_in_the_histogram(rng) -> None:
    u, beta, index, num = tokens(rng)
    u[:2], beta[:2] = (0.0, 1.0), (1.0, 0.0)
    cells = relation(u, beta, index, num, fitted(u, beta, index, num)).tokens
    counts = np.array(cells.counts)
    assert counts.shape == (40, 32)
    assert counts.sum() == len(u)
    assert counts[0, 31] >= 1
    assert counts[39, 0] >= 1
