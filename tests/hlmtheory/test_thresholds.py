"""Thresholds: the published figures, infeasible and degenerate cases, the risk budget, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory.relation import linear_rejection
from hlmtheory.risk import SkipAtoms
from hlmtheory.thresholds import (
    Threshold,
    largest_passing,
    linear_threshold,
    risk_averse_threshold,
    risk_budget_threshold,
    risk_prone_threshold,
)

PUBLISHED = [(0.82, -0.06), (0.815, -0.066)]


@pytest.mark.parametrize(("slope", "intercept"), PUBLISHED)
def test_risk_averse_threshold_is_the_root_of_the_line(slope, intercept):
    threshold = risk_averse_threshold(slope, intercept)
    assert threshold.feasible
    assert threshold.reason == ""
    assert threshold.value == pytest.approx(-intercept / slope, abs=1e-15)
    assert linear_rejection(np.array(threshold.value), slope, intercept) < 1e-15


def test_quoted_thresholds_follow_from_the_quoted_fits():
    """0.073 is quoted for U-HLM's fit; the two digits of 0.43 leave Delta open by 0.82 * 0.005."""
    assert round(risk_averse_threshold(0.82, -0.06).value, 3) == 0.073
    assert round(risk_averse_threshold(0.815, -0.066).value, 3) == 0.081
    implied_delta = 0.82 * 0.43 - 0.06
    assert implied_delta == pytest.approx(0.2926, abs=1e-12)
    threshold = risk_prone_threshold(0.82, -0.06, 0.2926)
    assert threshold.value == pytest.approx(0.43, abs=1e-12)
    for delta in (implied_delta - 0.0040, implied_delta + 0.0040):
        quoted = risk_prone_threshold(0.82, -0.06, delta).value
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
        assert math.isnan(threshold.value)
        assert "not positive" in threshold.reason


def test_risk_prone_threshold_of_our_pair_skips_everything():
    """a = 0.61, b = -0.05, Delta = 0.57: the rule is degenerate, and says so."""
    threshold = risk_prone_threshold(0.61, -0.05, 0.57)
    assert threshold.feasible
    assert threshold.value > 1
    assert "every token is skipped" in threshold.reason


def test_degenerate_exactly_from_delta_equal_to_the_line_at_one():
    assert risk_prone_threshold(0.5, 0.0, 0.5).reason != ""
    assert risk_prone_threshold(0.5, 0.0, 0.499).reason == ""


def test_zero_intercept_is_feasible_at_zero():
    threshold = risk_averse_threshold(0.8, 0.0)
    assert threshold.feasible
    assert threshold.value == 0


def test_linear_rules_know_the_bounds_of_another_score():
    """A score from -30 without an upper bound, as minus a logit: -25 qualifies, -31 does not."""
    bounds = (-30.0, math.inf)
    assert risk_averse_threshold(0.02, 0.5, *bounds).value == pytest.approx(-25)
    assert risk_averse_threshold(0.02, 0.5, *bounds).feasible
    below = risk_averse_threshold(0.02, 0.62, *bounds)
    assert not below.feasible
    assert "below -30: the line predicts rejection 0.02 > 0" in below.reason
    assert risk_prone_threshold(0.2, 0.0, 0.7, 0.0, 3.0).reason.startswith("threshold is at or")


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 3), st.floats(-1, 1), st.floats(0, 1))
def test_linear_threshold_is_where_the_line_meets_the_level(slope, intercept, level):
    threshold = linear_threshold("rule", level, slope, intercept)
    value = threshold.value
    assert slope * value + intercept == pytest.approx(level, abs=1e-12)
    assert threshold.feasible == (value >= 0)
    assert bool(threshold.reason) == (not 0 <= value < 1)


@pytest.mark.parametrize(
    ("level", "slope", "intercept", "says"),
    [
        (-0.1, 0.8, 0.0, r"rejection_level = -0\.1: allowed is \[0, 1\]"),
        (30.0, 0.8, 0.0, r"rejection_level = 30: .*percentage"),
        (math.nan, 0.8, 0.0, r"rejection_level = nan"),
        (0.1, math.nan, 0.0, r"slope, intercept = nan, 0\.0: both must be finite"),
        (0.1, 0.8, math.inf, r"slope, intercept = 0\.8, inf"),
    ],
)
def test_linear_threshold_checks_its_arguments(level, slope, intercept, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        linear_threshold("rule", level, slope, intercept)


# --- the risk budget -----------------------------------------------------------------------------


def budget_threshold(uncertainty: np.ndarray, rejection: np.ndarray, alpha: float) -> Threshold:
    """The rule on drawn drafts, all of one prompt."""
    index = np.zeros(len(uncertainty), dtype=int)
    return risk_budget_threshold(SkipAtoms.of_drafts(uncertainty, rejection, index, 1), alpha)


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
    threshold = budget_threshold(uncertainty, rejection, alpha)
    candidates = np.unique(uncertainty)
    fits = [u for u in candidates if empirical_risk(uncertainty, rejection, u) <= alpha]
    assert threshold.feasible == bool(fits)
    if not fits:
        assert math.isnan(threshold.value)
        least = empirical_risk(uncertainty, rejection, candidates[0])  # of all that tie there
        assert f"already carry risk {least:.4g} > {alpha:g}" in threshold.reason
        return
    chosen = threshold.value
    assert 0 <= chosen <= 1
    assert empirical_risk(uncertainty, rejection, chosen) <= alpha
    np.testing.assert_array_equal(uncertainty <= chosen, uncertainty <= max(fits))


def test_risk_budget_threshold_between_neighbouring_floats():
    """No float lies between the two values: the threshold must stay on the safe one."""
    low = float(np.nextafter(0.5, 1.0))
    high = float(np.nextafter(low, 1.0))
    threshold = budget_threshold(np.array([low, high]), np.array([0.0, 1.0]), 0.1)
    assert low <= threshold.value < high


def test_risk_budget_threshold_lies_midway():
    uncertainty = np.array([0.1, 0.2, 0.4, 0.8])
    threshold = budget_threshold(uncertainty, np.array([0.0, 0.0, 1.0, 0.0]), 0.2)
    assert threshold.value == pytest.approx(0.3, abs=1e-15)


def test_risk_budget_threshold_takes_ties_as_one():
    """Two tokens of equal u: the first alone would fit, both together do not."""
    uncertainty, rejection = np.array([0.1, 0.5, 0.5]), np.array([0.0, 0.0, 1.0])
    threshold = budget_threshold(uncertainty, rejection, 0.2)
    assert threshold.value < 0.5
    assert not budget_threshold(uncertainty[1:], rejection[1:], 0.2).feasible


def test_risk_budget_limits(rng):
    uncertainty, rejection = rng.uniform(size=50), rng.uniform(0.1, 1, size=50)
    all_of_it = budget_threshold(uncertainty, rejection, 1.0)
    assert all_of_it.value == 1.0
    assert "every token" in all_of_it.reason
    assert not budget_threshold(uncertainty, rejection, 0.0).feasible
    budgets = np.linspace(0.05, 0.5, 30)
    found = [budget_threshold(uncertainty, rejection, float(alpha)).value for alpha in budgets]
    assert (np.diff(found) >= 0).all()


def test_a_larger_bound_of_the_score_is_the_answer_where_everything_fits():
    """Bounded: at the bound, or at a score beyond it; unbounded: at the largest score seen."""
    atoms = SkipAtoms.of_drafts(np.array([0.5, 3.0]), np.zeros(2), np.zeros(2, dtype=int), 1)
    for highest, expected in ((7.0, 7.0), (1.0, 3.0), (math.inf, 3.0)):
        found = risk_budget_threshold(atoms, 0.1, highest)
        assert (found.value, found.feasible) == (expected, True)


def test_fields_say_what_the_name_says():
    found = budget_threshold(np.array([0.1]), np.array([0.0]), 0.05)
    assert (found.rule, found.family, found.budget) == ("risk-0.05", "risk", 0.05)
    assert (found.weighting, found.confidence, found.bound) == ("tokens", None, None)
    assert risk_averse_threshold(0.8, -0.1).family == "risk-averse"


def test_given_candidates_are_the_only_answers():
    atoms = SkipAtoms.of_drafts(
        np.array([0.1, 0.5, 0.9]), np.array([0.0, 0.3, 0.6]), np.zeros(3, dtype=int), 1
    )
    grid = np.array([0.05, 0.2, 0.7, 0.95])
    assert risk_budget_threshold(atoms, 0.2, thresholds=grid).value == 0.7
    assert risk_budget_threshold(atoms, 0.05, thresholds=grid).value == 0.2
    with pytest.raises(ValueError, match="thresholds must be rising"):
        risk_budget_threshold(atoms, 0.2, thresholds=grid[::-1])


@pytest.mark.parametrize(("alpha", "says"), [(5.0, r"alpha = 5: allowed is"), (math.nan, "alpha")])
def test_risk_budget_threshold_checks_its_arguments(alpha, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        budget_threshold(np.array([0.1, 0.5]), np.zeros(2), alpha)


@pytest.mark.parametrize("mass", [1, 3])
def test_search_costs_one_pass(mass, rng):
    """Sums of a part and of the next are those from the start, with drafts cut in pieces too."""
    score = np.round(rng.uniform(size=400), 2)
    index = rng.integers(20, size=400)
    beta = rng.uniform(size=400) * score
    atoms = SkipAtoms(
        np.repeat(score, mass),
        np.full(400 * mass, 1 / mass),
        np.repeat(beta, mass) / mass,
        np.repeat(index, mass),
        np.bincount(index, minlength=20),
    )
    seen: list[float] = []

    def passes(rejected: np.ndarray) -> bool:
        seen.append(rejected.sum())
        return bool(rejected.sum() <= 30)

    found = largest_passing(atoms, passes, 1.0)
    expected = np.bincount(index, weights=beta * (score <= found.threshold), minlength=20)
    np.testing.assert_allclose(found.rejected, expected, atol=1e-12)
    assert found.rejected.sum() <= 30
    following = np.unique(score)[np.searchsorted(np.unique(score), found.threshold)]
    assert (beta * (score <= following)).sum() > 30
    assert len(seen) <= 8  # 101 distinct scores
