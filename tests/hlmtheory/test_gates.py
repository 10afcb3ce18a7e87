"""Gates: the two views of each rule agree, skip sets are small, Poisson-binomial is exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hlmtheory.gates import (
    AlwaysSkip,
    NeverSkip,
    UncertaintyGate,
    UncertaintyImportanceGate,
    poisson_binomial_cdf,
    skip_set_bound,
)
from hlmtheory.uncertainty import (
    exact_uncertainty,
    perturbed_probabilities,
    sampled_uncertainty,
    temperatures,
)

THETAS = temperatures()


def whole_vocabulary(logits: np.ndarray) -> np.ndarray:
    """Every token id, for each row of logits."""
    return np.broadcast_to(np.arange(logits.shape[-1]), logits.shape)


def poisson_binomial_cdf_reference(probabilities: np.ndarray, most: int) -> float:
    """All 2^K outcomes, one by one."""
    total = 0.0
    for outcome in itertools.product((0, 1), repeat=len(probabilities)):
        if sum(outcome) <= most:
            total += math.prod(
                p if hit else 1 - p for p, hit in zip(probabilities, outcome, strict=True)
            )
    return total


# --- Poisson-binomial ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1)))
def test_poisson_binomial_is_the_enumeration(probabilities):
    for most in range(-1, len(probabilities) + 1):
        found = float(poisson_binomial_cdf(probabilities, most))
        expected = poisson_binomial_cdf_reference(probabilities, most)
        # 2^8 products below 1, each rounded at eps.
        assert found == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("p", [0.0, 0.03, 0.5, 1.0])
def test_equal_probabilities_give_the_binomial_law(p):
    for most in (0, 3, 10, 19, 20):
        found = float(poisson_binomial_cdf(np.full(20, p), most))
        assert found == pytest.approx(stats.binom.cdf(most, 20, p), abs=1e-13)


def test_poisson_binomial_keeps_batch_axes(rng):
    probabilities = rng.uniform(size=(3, 4, 6))
    found = poisson_binomial_cdf(probabilities, 2)
    assert found.shape == (3, 4)
    assert found[2, 1] == pytest.approx(poisson_binomial_cdf_reference(probabilities[2, 1], 2))
    np.testing.assert_array_equal(poisson_binomial_cdf(probabilities, -1), np.zeros((3, 4)))
    np.testing.assert_array_equal(poisson_binomial_cdf(probabilities, 6), np.ones((3, 4)))


def test_poisson_binomial_rises_with_the_count(rng):
    probabilities = rng.uniform(size=(50, 20))
    values = np.stack([poisson_binomial_cdf(probabilities, most) for most in range(-1, 21)])
    assert (np.diff(values, axis=0) >= -1e-15).all()


# --- the gate on uncertainty ---------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float64, st.integers(2, 60), elements=st.floats(-20, 20)),
    st.floats(0, 0.99),
)
def test_exact_skip_set_is_within_its_bound_and_holds_the_likeliest(logits, threshold):
    gate = UncertaintyGate(threshold)
    tokens = np.arange(len(logits))
    sigma = gate.skip_probability(perturbed_probabilities(logits, tokens, THETAS), None)
    assert set(np.unique(sigma)) <= {0.0, 1.0}
    size = int(sigma.sum())
    # The p_k sum to 1 within rounding, so a set exactly at 1/(1 - u_th) may sit on either side.
    assert size <= 1 / (1 - threshold) * (1 + 1e-12)
    assert size <= gate.max_skip_set_size(len(logits))
    if 0 < size < len(logits):
        assert logits[sigma == 1].min() >= logits[sigma == 0].max()


def test_skip_set_bound_is_attained_by_ties():
    """m tied tokens have u = 1 - 1/m each: at that threshold all of them are skipped."""
    for num_ties in (1, 2, 4, 5, 10):
        logits = np.array([200.0] * num_ties + [0.0] * 20)
        threshold = 1 - 1 / num_ties
        probabilities = perturbed_probabilities(logits, np.arange(len(logits)), THETAS)
        # One eps above, for 1 - mean(p) and 1 - 1/m are rounded differently.
        sigma = UncertaintyGate(threshold + 1e-15).skip_probability(probabilities, None)
        assert sigma.sum() == num_ties == skip_set_bound(threshold, 1_000)


@pytest.mark.parametrize(
    ("threshold", "bound"),
    [
        (0.0, 1),
        (0.3, 1),
        (0.499, 1),
        (0.5, 2),
        (2 / 3, 3),
        (0.8, 5),
        (0.9, 10),
        (0.99, 32),
        (1, 32),
    ],
)
def test_skip_set_bound_by_hand(threshold, bound):
    assert skip_set_bound(threshold, 32) == bound
    assert UncertaintyGate(threshold).max_skip_set_size(32) == bound


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.15, 0.3, 0.5, 0.95, 1.0])
def test_exact_gate_decides_the_same_both_ways(rng, threshold):
    logits = 3 * rng.standard_normal((20, 50))
    probabilities = perturbed_probabilities(logits, whole_vocabulary(logits), THETAS)
    uncertainty = exact_uncertainty(logits, whole_vocabulary(logits), THETAS)
    gate = UncertaintyGate(threshold)
    decided = gate.skip(uncertainty, np.ones_like(uncertainty), None)
    np.testing.assert_array_equal(gate.skip_probability(probabilities, None), decided)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.15, 0.3, 0.35, 0.62, 1.0])
def test_sampled_gate_skips_as_often_as_its_sigma(rng, threshold):
    """E[skip | s, d] = sigma(s, d), within 4 standard errors; 0.15 and 0.35 are whole counts."""
    logits = np.array([3.0, 2.0, 0.5, -1.0, 1.2])
    probabilities = perturbed_probabilities(logits, np.arange(5), THETAS)  # (5, K)
    num = 20_000
    uniforms = rng.uniform(size=(num, 5, 20))
    sampled = sampled_uncertainty(np.broadcast_to(probabilities, uniforms.shape), uniforms)
    gate = UncertaintyGate(threshold, "sampled")
    sigma = gate.skip_probability(probabilities, None)
    frequency = gate.skip(np.zeros_like(sampled), sampled, None).mean(axis=0)
    assert (np.abs(frequency - sigma) <= 4 * np.sqrt(sigma * (1 - sigma) / num) + 1e-12).all()


@pytest.mark.parametrize("num_temperatures", [5, 20, 30])
@pytest.mark.parametrize("threshold_off", [-1, 0, 1])
def test_sampled_gate_counts_the_same_both_ways_at_a_rounded_threshold(
    num_temperatures, threshold_off
):
    """A threshold one rounding off c/K, as 1 - 0.8 is off 0.2, must read as c misses both ways."""
    for misses in range(1, num_temperatures):
        nominal = misses / num_temperatures
        threshold = float(np.nextafter(nominal, threshold_off)) if threshold_off else nominal
        gate = UncertaintyGate(threshold, "sampled")
        certain = np.where(np.arange(num_temperatures) < misses, 0.0, 1.0)  # that many misses
        sampled = sampled_uncertainty(certain, np.full(num_temperatures, 0.5))
        assert bool(gate.skip(sampled, sampled, None)) == bool(gate.skip_probability(certain, None))


def test_sampled_skip_probability_falls_with_the_logit(rng):
    logits = np.sort(3 * rng.standard_normal(40))[::-1].copy()
    probabilities = perturbed_probabilities(logits, np.arange(40), THETAS)
    sigma = UncertaintyGate(0.4, "sampled").skip_probability(probabilities, None)
    assert (np.diff(sigma) <= 1e-15).all()


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.6, 0.7])
def test_sampled_skip_set_leaves_next_to_nothing_outside(threshold):
    """With K = 20 and u_th up to 0.7, sigma is below 1e-9 outside the tokens the gate names.

    A token ranked below m has p_k <= 1/m at every temperature, so its skip probability is at most
    that of K misses of probability 1 - 1/m each.
    """
    gate = UncertaintyGate(threshold, "sampled")
    worst = np.full(20, 1 / gate.max_skip_set_size(150_000))
    assert float(gate.skip_probability(worst, None)) < 1e-9


def test_never_and_always(rng):
    probabilities = rng.uniform(size=(3, 7, 20))
    uncertainty = rng.uniform(size=(3, 7))
    never, always = NeverSkip(), AlwaysSkip()
    np.testing.assert_array_equal(never.skip(uncertainty, uncertainty, None), False)
    np.testing.assert_array_equal(always.skip(uncertainty, uncertainty, None), True)
    np.testing.assert_array_equal(never.skip_probability(probabilities, None), np.zeros((3, 7)))
    np.testing.assert_array_equal(always.skip_probability(probabilities, None), np.ones((3, 7)))
    assert (never.max_skip_set_size(99), always.max_skip_set_size(99)) == (0, 99)
    assert not never.needs_importance
    assert not always.needs_importance


def test_thresholds_zero_and_one_are_the_limits(rng):
    logits = rng.standard_normal((10, 30))
    probabilities = perturbed_probabilities(logits, whole_vocabulary(logits), THETAS)
    for statistic in ("exact", "sampled"):
        one = UncertaintyGate(1.0, statistic).skip_probability(probabilities, None)
        np.testing.assert_array_equal(one, np.ones((10, 30)))
    assert UncertaintyGate(0.0).skip_probability(probabilities, None).sum() == 0
    # With sampled uncertainty the threshold 0 asks for K hits in a row.
    np.testing.assert_allclose(
        UncertaintyGate(0.0, "sampled").skip_probability(probabilities, None),
        probabilities.prod(axis=-1),
        atol=1e-15,
    )


# --- importance ----------------------------------------------------------------------------------


def test_importance_gate_sends_only_what_is_uncertain_and_important():
    gate = UncertaintyImportanceGate(0.3)
    uncertainty = np.array([0.1, 0.1, 0.8, 0.8])
    important = np.array([False, True, False, True])
    np.testing.assert_array_equal(
        gate.skip(uncertainty, uncertainty, important), [True, True, True, False]
    )
    assert gate.needs_importance
    # In an important context; an unimportant one skips whatever is drawn.
    assert gate.max_skip_set_size(77) == skip_set_bound(0.3, 77)


def test_importance_gate_decides_the_same_both_ways(rng):
    logits = 3 * rng.standard_normal((20, 30))
    important = rng.uniform(size=20) < 0.5
    gate = UncertaintyImportanceGate(0.4)
    probabilities = perturbed_probabilities(logits, whole_vocabulary(logits), THETAS)
    uncertainty = exact_uncertainty(logits, whole_vocabulary(logits), THETAS)
    sigma = gate.skip_probability(probabilities, important)
    decided = gate.skip(uncertainty, uncertainty, np.broadcast_to(important[:, None], (20, 30)))
    np.testing.assert_array_equal(sigma, decided)
    assert (sigma[~important] == 1).all()
    everywhere = np.ones(20, dtype=bool)
    np.testing.assert_array_equal(
        gate.skip_probability(probabilities, everywhere),
        UncertaintyGate(0.4).skip_probability(probabilities, None),
    )


def test_importance_gate_refuses_to_guess():
    gate = UncertaintyImportanceGate(0.4)
    with pytest.raises(ValueError, match=r"^important is None"):
        gate.skip(np.array([0.5]), np.array([0.5]), None)
    with pytest.raises(ValueError, match=r"^important is None"):
        gate.skip_probability(np.full((1, 2), 0.5), None)


@pytest.mark.parametrize("bad", [-0.1, 1.1, 30.0, math.nan])
def test_thresholds_outside_the_unit_interval_are_refused(bad):
    for build in (UncertaintyGate, UncertaintyImportanceGate, lambda u: skip_set_bound(u, 10)):
        with pytest.raises(ValueError, match=r"^threshold = .*allowed is \[0, 1\]"):
            build(bad)


def test_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match=r"^statistic = 'mean': allowed are 'exact', 'sampled'"):
        UncertaintyGate(0.3, "mean")  # type: ignore[arg-type]
