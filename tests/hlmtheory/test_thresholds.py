"""Thresholds: the published figures, infeasible and degenerate cases, the risk budget, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory.relation import linear_rejection
from hlmtheory.thresholds import (
    linear_threshold,
    risk_averse_threshold,
    risk_budget_threshold,
    risk_prone_threshold,
    threshold_sensitivity,
)

PUBLISHED = [(0.82, -0.06), (0.815, -0.066)]


@pytest.mark.parametrize(("slope", "intercept"), PUBLISHED)
def test_risk_averse_threshold_is_the_root_of_the_line(slope, intercept):
    threshold = risk_averse_threshold(slope, intercept)
    assert threshold.feasible
    assert threshold.reason == ""
    assert threshold.uncertainty_threshold == pytest.approx(-intercept / slope, abs=1e-15)
    assert linear_rejection(np.array(threshold.uncertainty_threshold), slope, intercept) < 1e-15


def test_quoted_thresholds_follow_from_the_quoted_fits():
    """0.073 is quoted for U-HLM's fit; the two digits of 0.43 leave Delta open by 0.82 * 0.005."""
    assert round(risk_averse_threshold(0.82, -0.06).uncertainty_threshold, 3) == 0.073
    assert round(risk_averse_threshold(0.815, -0.066).uncertainty_threshold, 3) == 0.081
    implied_delta = 0.82 * 0.43 - 0.06
    assert implied_delta == pytest.approx(0.2926, abs=1e-12)
    threshold = risk_prone_threshold(0.82, -0.06, 0.2926)
    assert threshold.uncertainty_threshold == pytest.approx(0.43, abs=1e-12)
    for delta in (implied_delta - 0.0040, implied_delta + 0.0040):
        quoted = risk_prone_threshold(0.82, -0.06, delta).uncertainty_threshold
        assert round(quoted, 2) == 0.43


@pytest.mark.parametrize(("slope", "intercept"), [(0.8, 0.05), (0.4, 1e-6)])
def test_positive_intercept_leaves_no_risk_averse_threshold(slope, intercept):
    threshold = risk_averse_threshold(slope, intercept)
    assert not threshold.feasible
    assert "below 0" in threshold.reason
    assert "no token qualifies" in threshold.reason


@pytest.mark.parametrize("slope", [0.0, -0.3])
def test_a_slope_that_does_not_rise_predicts_nothing(slope):
    for threshold in (
        risk_averse_threshold(slope, -0.05),
        risk_prone_threshold(slope, -0.05, 0.3),
    ):
        assert not threshold.feasible
        assert math.isnan(threshold.uncertainty_threshold)
        assert "not positive" in threshold.reason


def test_risk_prone_threshold_of_our_pair_skips_everything():
    """a = 0.61, b = -0.05, Delta = 0.57: the rule is degenerate, and says so."""
    threshold = risk_prone_threshold(0.61, -0.05, 0.57)
    assert threshold.feasible
    assert threshold.uncertainty_threshold > 1
    assert "every token is skipped" in threshold.reason


def test_degenerate_exactly_from_delta_equal_to_the_line_at_one():
    assert risk_prone_threshold(0.5, 0.0, 0.5).reason != ""
    assert risk_prone_threshold(0.5, 0.0, 0.499).reason == ""


def test_zero_intercept_is_feasible_at_zero():
    threshold = risk_averse_threshold(0.8, 0.0)
    assert threshold.feasible
    assert threshold.uncertainty_threshold == 0


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 3), st.floats(-1, 1), st.floats(0, 1))
def test_linear_threshold_is_where_the_line_meets_the_level(slope, intercept, level):
    threshold = linear_threshold("rule", level, slope, intercept)
    value = threshold.uncertainty_threshold
    assert slope * value + intercept == pytest.approx(level, abs=1e-12)
    assert threshold.feasible == (value >= 0)
    assert bool(threshold.reason) == (not 0 <= value < 1)


@pytest.mark.parametrize(
    ("level", "slope", "intercept", "says"),
    [
        (-0.1, 0.8, 0.0, r"rejection_level = -0\.1: allowed is \[0, 1\]"),
        (30.0, 0.8, 0.0, r"rejection_level = 30\.0: .*percentage"),
        (math.nan, 0.8, 0.0, r"rejection_level = nan"),
        (0.1, math.nan, 0.0, r"slope, intercept = nan, 0\.0: both must be finite"),
        (0.1, 0.8, math.inf, r"slope, intercept = 0\.8, inf"),
    ],
)
def test_linear_threshold_checks_its_arguments(level, slope, intercept, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        linear_threshold("rule", level, slope, intercept)


# --- the risk budget -----------------------------------------------------------------------------


def empirical_risk(uncertainty: np.ndarray, rejection: np.ndarray, threshold: float) -> float:
    """R(u_th), the obvious way."""
    return float(np.where(uncertainty <= threshold, rejection, 0.0).sum() / len(uncertainty))


# Multiples of 1/64 add without rounding, so that comparisons with the budget are exact.
sixty_fourths = st.integers(0, 64).map(lambda count: count / 64)
calibration_tokens = st.integers(1, 30).flatmap(
    lambda num: st.tuples(
        arrays(np.float64, num, elements=st.one_of(sixty_fourths, st.floats(0, 1))),
        arrays(np.float64, num, elements=sixty_fourths),
    )
)


@settings(max_examples=300, deadline=None)
@given(calibration_tokens, st.one_of(sixty_fourths, st.floats(0, 1)))
def test_risk_budget_threshold_is_the_supremum(tokens, alpha):
    uncertainty, rejection = tokens
    threshold = risk_budget_threshold(uncertainty, rejection, alpha)
    candidates = np.unique(uncertainty)
    fits = [u for u in candidates if empirical_risk(uncertainty, rejection, u) <= alpha]
    assert threshold.feasible == bool(fits)
    if not fits:
        assert math.isnan(threshold.uncertainty_threshold)
        least = empirical_risk(uncertainty, rejection, candidates[0])  # of all that tie there
        assert f"already carry risk {least:.4g} > {alpha:g}" in threshold.reason
        return
    chosen = threshold.uncertainty_threshold
    assert 0 <= chosen <= 1
    assert empirical_risk(uncertainty, rejection, chosen) <= alpha
    np.testing.assert_array_equal(uncertainty <= chosen, uncertainty <= max(fits))


def test_risk_budget_threshold_between_neighbouring_floats():
    """No float lies between the two values: the threshold must stay on the safe one."""
    low = float(np.nextafter(0.5, 1.0))
    high = float(np.nextafter(low, 1.0))
    threshold = risk_budget_threshold(np.array([low, high]), np.array([0.0, 1.0]), 0.1)
    assert low <= threshold.uncertainty_threshold < high


def test_risk_budget_threshold_lies_midway():
    uncertainty = np.array([0.1, 0.2, 0.4, 0.8])
    threshold = risk_budget_threshold(uncertainty, np.array([0.0, 0.0, 1.0, 0.0]), 0.2)
    assert threshold.uncertainty_threshold == pytest.approx(0.3, abs=1e-15)


def test_risk_budget_threshold_takes_ties_as_one():
    """Two tokens of equal u: the first alone would fit, both together do not."""
    uncertainty, rejection = np.array([0.1, 0.5, 0.5]), np.array([0.0, 0.0, 1.0])
    threshold = risk_budget_threshold(uncertainty, rejection, 0.2)
    assert threshold.uncertainty_threshold < 0.5
    assert not risk_budget_threshold(uncertainty[1:], rejection[1:], 0.2).feasible


def test_risk_budget_limits(rng):
    uncertainty, rejection = rng.uniform(size=50), rng.uniform(0.1, 1, size=50)
    all_of_it = risk_budget_threshold(uncertainty, rejection, 1.0)
    assert all_of_it.uncertainty_threshold == 1.0
    assert "every token" in all_of_it.reason
    assert not risk_budget_threshold(uncertainty, rejection, 0.0).feasible
    budgets = np.linspace(0.05, 0.5, 30)
    found = [
        risk_budget_threshold(uncertainty, rejection, float(alpha)).uncertainty_threshold
        for alpha in budgets
    ]
    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize(
    ("uncertainty", "rejection", "alpha", "says"),
    [
        ([0.1, 1.5], [0.0, 0.0], 0.1, r"uncertainty = 1\.5: allowed is \[0, 1\]"),
        ([0.1, math.nan], [0.0, 0.0], 0.1, r"uncertainty holds NaN"),
        ([0.1, 0.5], [0.0, -1.0], 0.1, r"rejection_prob = -1: allowed is \[0, 1\]"),
        ([0.1, 0.5], [0.0, 0.0], 5.0, r"alpha = 5\.0: allowed is \[0, 1\]"),
        ([0.1, 0.5], [0.0, 0.0], math.nan, r"alpha = nan"),
        ([], [], 0.1, r"uncertainty is empty"),
        ([0.1, 0.5], [0.0, 0.0, 1.0], 0.1, r"(uncertainty|rejection_prob) has"),
        ([0.1, 0.5], [0.0], 0.1, r"(uncertainty|rejection_prob) has"),
    ],
)
def test_risk_budget_threshold_checks_its_arguments(uncertainty, rejection, alpha, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        risk_budget_threshold(np.array(uncertainty), np.array(rejection), alpha)


# --- the delta method ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 0.2926])
@pytest.mark.parametrize(("slope", "intercept"), PUBLISHED)
def test_sensitivity_is_the_derivative(level, slope, intercept):
    def value(level: float, slope: float, intercept: float) -> float:
        return linear_threshold("rule", level, slope, intercept).uncertainty_threshold

    found = threshold_sensitivity(level, slope, intercept)
    step = 1e-5  # central differences: error of order step^2 = 1e-10, rounding 1e-16/step
    differences = [
        (value(level, slope + step, intercept) - value(level, slope - step, intercept)),
        (value(level, slope, intercept + step) - value(level, slope, intercept - step)),
        (value(level + step, slope, intercept) - value(max(level - step, 0), slope, intercept)),
    ]
    steps = [2 * step, 2 * step, 2 * step if level else step]
    np.testing.assert_allclose(
        [found.d_slope, found.d_intercept, found.d_level],
        np.array(differences) / steps,
        rtol=1e-8,
    )


def test_delta_method_standard_error_against_simulation(rng):
    slope, intercept = 0.8, -0.07
    covariance = np.array([[4e-4, -1.5e-4], [-1.5e-4, 1e-4]])
    draws = rng.multivariate_normal([slope, intercept], covariance, size=200_000)
    simulated = (-draws[:, 1] / draws[:, 0]).std()
    predicted = threshold_sensitivity(0.0, slope, intercept).standard_error(covariance)
    # The neglected second order is of relative size (se(a)/a)^2 = 6e-4; Monte Carlo adds 2e-3.
    assert predicted == pytest.approx(simulated, rel=0.01)


def test_sensitivity_needs_a_slope():
    with pytest.raises(ValueError, match=r"^slope = 0"):
        threshold_sensitivity(0.0, 0.0, -0.1)
