"""The linear relation and its binned summary."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory.relation import (
    BinnedMeans,
    binned_means,
    line_moments,
    line_of_totals,
    linear_rejection,
    weighted_correlation,
)

unit_arrays = st.integers(1, 80).flatmap(
    lambda num: st.tuples(
        *[
            # A few round values beside arbitrary ones: ties are where binning goes wrong.
            arrays(
                np.float64,
                num,
                elements=st.one_of(st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.floats(0, 1)),
            )
            for _ in range(2)
        ]
    )
)


def test_linear_rejection_clips_the_line():
    found = linear_rejection(np.array([0.0, 0.05, 0.5, 1.0]), 1.2, -0.1)
    np.testing.assert_allclose(found, [0.0, 0.0, 0.5, 1.0], atol=1e-15)


@pytest.mark.parametrize(("slope", "intercept"), [(0.82, -0.06), (0.815, -0.066)])
def test_published_lines_cross_zero_at_the_risk_averse_threshold(slope, intercept):
    crossing = -intercept / slope
    around = linear_rejection(
        np.array([crossing - 0.01, crossing, crossing + 0.01]), slope, intercept
    )
    np.testing.assert_allclose(around, [0, 0, 0.01 * slope], atol=1e-15)


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_linear_rejection_refuses_what_is_no_uncertainty(bad):
    with pytest.raises(ValueError, match=r"^uncertainty .*\[0, 1\]"):
        linear_rejection(np.array([0.5, bad]), 0.8, 0.0)


# --- bins ----------------------------------------------------------------------------------------


def assert_bins_hold(bins: BinnedMeans, uncertainty: np.ndarray, rejection: np.ndarray) -> None:
    """What must be true of any binning, checked bin by bin with the obvious loop."""
    assert bins.num_tokens.sum() == len(uncertainty)
    assert (bins.num_tokens >= 1).all()
    assert bins.bin_of_token.shape == uncertainty.shape
    for index in range(len(bins.num_tokens)):
        members = bins.bin_of_token == index
        assert members.sum() == bins.num_tokens[index]
        assert bins.uncertainty[index] == pytest.approx(uncertainty[members].mean(), abs=1e-12)
        assert bins.rejection_prob[index] == pytest.approx(rejection[members].mean(), abs=1e-12)
        if index:
            assert uncertainty[members].min() > uncertainty[bins.bin_of_token == index - 1].max()


@settings(max_examples=100, deadline=None)
@given(unit_arrays, st.integers(2, 25))
def test_bins_partition_the_tokens_in_order_and_keep_ties_together(pair, num_bins):
    uncertainty, rejection = pair
    bins = binned_means(uncertainty, rejection, num_bins)
    assert len(bins.num_tokens) <= num_bins
    assert_bins_hold(bins, uncertainty, rejection)
    total = float((bins.num_tokens * bins.rejection_prob).sum())
    assert total == pytest.approx(rejection.sum(), abs=1e-10)


def test_bins_of_distinct_values_hold_equal_counts(rng):
    uncertainty, rejection = rng.uniform(size=1_000), rng.uniform(size=1_000)
    bins = binned_means(uncertainty, rejection, 20)
    np.testing.assert_array_equal(bins.num_tokens, 50)
    assert_bins_hold(bins, uncertainty, rejection)


def test_a_pile_up_leaves_fewer_bins():
    uncertainty = np.concatenate([np.zeros(50), np.full(30, 0.3), np.ones(20)])
    bins = binned_means(uncertainty, uncertainty, 10)
    assert_bins_hold(bins, uncertainty, uncertainty)
    assert len(bins.num_tokens) <= 3


def test_a_pile_up_at_zero_is_a_bin_of_its_own():
    """Sampled uncertainty takes multiples of 1/K and is 0 for half the tokens."""
    uncertainty = np.concatenate([np.zeros(510), np.full(245, 0.05), np.full(245, 0.5)])
    bins = binned_means(uncertainty, uncertainty, 20)
    np.testing.assert_allclose(bins.uncertainty, [0.0, 0.05, 0.5], atol=1e-15)


def test_constant_uncertainty_is_one_bin_without_a_correlation():
    bins = binned_means(np.full(9, 0.4), np.linspace(0, 1, 9), 20)
    assert bins.num_tokens.tolist() == [9]
    assert math.isnan(bins.correlation)


def test_binned_correlation_exceeds_the_token_correlation(rng):
    """Why both are always reported: averaging removes the scatter, not the ignorance."""
    uncertainty = rng.uniform(size=20_000)
    rejection = (rng.uniform(size=20_000) < uncertainty).astype(float)
    token_correlation = np.corrcoef(uncertainty, rejection)[0, 1]
    # Var(u) = 1/12 and Var(beta) = 1/4, so r = (1/12)/sqrt(1/48) = 0.577 token by token.
    assert token_correlation == pytest.approx(math.sqrt(1 / 3), abs=0.02)
    assert binned_means(uncertainty, rejection).correlation > 0.99


@pytest.mark.parametrize(
    ("uncertainty", "rejection", "num_bins", "says"),
    [
        ([0.1, 1.2], [0.0, 0.0], 5, r"uncertainty = 1\.2: allowed is \[0, 1\]"),
        ([0.1, math.nan], [0.0, 0.0], 5, r"uncertainty holds NaN"),
        ([0.1, 0.2], [0.0, -0.5], 5, r"rejection_prob = -0\.5: allowed is \[0, 1\]"),
        ([0.1, 0.2], [0.0, 0.5], 1, r"num_bins = 1: allowed is >= 2"),
    ],
)
def test_binned_means_checks_its_arguments(uncertainty, rejection, num_bins, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        binned_means(np.array(uncertainty), np.array(rejection), num_bins)


# --- correlation ---------------------------------------------------------------------------------


def test_weighted_correlation_is_that_of_repeated_points(rng):
    x, y = rng.normal(size=12), rng.normal(size=12)
    weights = rng.integers(1, 9, size=12)
    repeated = np.corrcoef(np.repeat(x, weights), np.repeat(y, weights))[0, 1]
    assert weighted_correlation(x, y, weights) == pytest.approx(repeated, abs=1e-12)
    assert weighted_correlation(x, 2 * x + 1, weights) == pytest.approx(1, abs=1e-12)
    assert weighted_correlation(x, -x, weights) == pytest.approx(-1, abs=1e-12)
    assert math.isnan(weighted_correlation(x, np.ones(12), weights))


def test_line_of_totals_is_least_squares(rng) -> None:
    """Against numpy's own least squares, for the whole and for every prompt left out."""
    x, noise = rng.uniform(size=600), rng.normal(scale=0.2, size=600)
    y = 0.7 * x + 0.1 + noise
    prompt = np.repeat(np.arange(20), 30)
    by_prompt = np.stack([line_moments(x, y)[prompt == i].sum(0) for i in range(20)])
    found = line_of_totals(by_prompt.sum(0) - by_prompt)
    for i in range(20):
        kept = prompt != i
        slope, intercept = np.polyfit(x[kept], y[kept], 1)
        # Sums of 570 terms of size one, and differences of them.
        assert found.slope[i] == pytest.approx(slope, abs=1e-10)
        assert found.intercept[i] == pytest.approx(intercept, abs=1e-10)
        assert found.correlation[i] == pytest.approx(np.corrcoef(x[kept], y[kept])[0, 1], abs=1e-10)
        assert found.variance[i] == pytest.approx(x[kept].var(), abs=1e-10)
    flat = line_of_totals(line_moments(np.full(5, 0.25), np.arange(5.0)).sum(0))
    assert np.isnan(flat.slope)
    assert np.isnan(flat.correlation)
