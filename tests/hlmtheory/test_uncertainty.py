"""Temperature-perturbation uncertainty: exact against the loop, sampled against drawn tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats

from hlmtheory.uncertainty import (
    Temperatures,
    attenuation,
    entropy,
    exact_uncertainty,
    log_partitions,
    margin,
    perturbed_probabilities,
    sampled_uncertainty,
    sampled_uncertainty_variance,
    temperatures,
)

DEFAULT = temperatures()
SIGNIFICANCE = 1e-3  # of one test with a fixed seed


def softmax(logits: np.ndarray, theta: float) -> np.ndarray:
    """Plain softmax at a temperature; at 0 uniform on the maxima."""
    if theta == 0:
        ties = (logits == logits.max()).astype(np.float64)
        return ties / ties.sum()
    weights = np.exp((logits - logits.max()) / theta)
    return weights / weights.sum()


def exact_uncertainty_reference(logits: np.ndarray, token: int, thetas: Temperatures) -> float:
    """The obvious loop: one softmax over the whole vocabulary for each temperature."""
    hits = [softmax(logits.astype(np.float64), theta)[token] for theta in thetas.values]
    return 1.0 - sum(hits) / len(hits)


def random_logits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Logits whose spread differs from row to row, from nearly flat to nearly one-hot."""
    spread = rng.uniform(0.1, 8.0, size=(*shape[:-1], 1))
    return spread * rng.standard_normal(shape)


# --- the temperatures ----------------------------------------------------------------------------


def test_grid_is_the_linspace_and_midpoint_its_cells():
    np.testing.assert_allclose(DEFAULT.values, np.linspace(0, 2, 20), atol=1e-15)
    midpoint = temperatures(4, 2.0, "midpoint")
    np.testing.assert_allclose(midpoint.values, [0.25, 0.75, 1.25, 1.75], atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, 2.0), r"num_temperatures = 1: allowed is >= 2"),
        ((20, 0.0), r"theta_max = 0\.0: allowed is \(0, inf\)"),
        ((20, -1.0), r"theta_max = -1\.0"),
        ((20, math.nan), r"theta_max = nan"),
        ((20, math.inf), r"theta_max = inf"),
        ((20, 2.0, "random"), r"kind = 'random': allowed are 'grid', 'midpoint'"),
    ],
)
def test_temperatures_are_checked(arguments, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        temperatures(*arguments)


@pytest.mark.parametrize("values", [(), (1.0, -0.5), (math.nan,), (math.inf,)])
def test_temperatures_record_is_checked(values):
    with pytest.raises(ValueError, match=r"^temperature"):
        Temperatures(values)


# --- exact uncertainty ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grid", "midpoint"])
@pytest.mark.parametrize("vocab", [2, 3, 40, 1_000, 5_000])
def test_exact_uncertainty_is_the_plain_loop(rng, vocab, kind):
    thetas = temperatures(20, 2.0, kind)
    logits = random_logits(rng, 3, vocab)
    tokens = np.concatenate(
        [logits.argmax(axis=-1)[:, None], rng.integers(vocab, size=(3, 4))], axis=-1
    )
    expected = np.array(
        [
            [exact_uncertainty_reference(row, token, thetas) for token in chosen]
            for row, chosen in zip(logits, tokens, strict=True)
        ]
    )
    # Squaring an exponential doubles its relative error, up to five times in a row: 32 eps.
    np.testing.assert_allclose(exact_uncertainty(logits, tokens, thetas), expected, atol=1e-12)
    narrow = exact_uncertainty(logits.astype(np.float32), tokens, thetas)
    rounded = np.array(
        [
            [exact_uncertainty_reference(row, token, thetas) for token in chosen]
            for row, chosen in zip(logits.astype(np.float32), tokens, strict=True)
        ]
    )
    assert narrow.dtype == np.float32
    # 32 times eps = 6e-8 for the chain of squares, and log Z of size 10 rounds at 1e-6.
    np.testing.assert_allclose(narrow, rounded, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        (1.0,),
        (0.0,),
        (2.0, 1.0, 0.5, 0.25, 0.125),
        (1.0, 1.0, 2.0, 2.0, 0.5),
        (0.3, 0.0, 0.6, 0.0, 0.7),
        (0.05, 100.0),
    ],
)
def test_any_temperatures_in_any_order(rng, values):
    """The chains of squares must hold for repeated, unsorted and lone temperatures too."""
    thetas = Temperatures(values)
    logits = random_logits(rng, 4, 60)
    every_token = np.broadcast_to(np.arange(60), (4, 60))
    expected = np.stack([np.stack([softmax(row, t) for t in values], -1) for row in logits])
    found = perturbed_probabilities(logits, every_token, thetas)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    log_z = log_partitions(logits, thetas)
    assert log_z.shape == (4, len(values))
    np.testing.assert_array_equal(
        found, perturbed_probabilities(logits, every_token, thetas, log_z)
    )


def test_perturbed_probabilities_sum_to_one_over_the_vocabulary(rng):
    logits = random_logits(rng, 5, 700)
    every_token = np.broadcast_to(np.arange(700), (5, 700))
    total = perturbed_probabilities(logits, every_token, DEFAULT).sum(axis=-2)
    np.testing.assert_allclose(total, 1, atol=1e-12)


def test_two_tokens_by_hand():
    """V = 2: softmax(z/theta) is a logistic function of the difference over theta."""
    gap = 1.3
    thetas = Temperatures((0.5, 1.0, 3.0))
    expected = 1 - np.mean([1 / (1 + math.exp(-gap / theta)) for theta in (0.5, 1.0, 3.0)])
    found = exact_uncertainty(np.array([gap, 0.0]), np.array([0]), thetas)
    assert found[0] == pytest.approx(expected, abs=1e-15)


def test_midpoint_rule_tends_to_the_integral_over_theta():
    logits = np.array([1.0, 0.3, -2.0, 0.9])
    exact = 1 - integrate.quad(lambda theta: softmax(logits, theta)[0], 1e-12, 2.0)[0] / 2
    errors = [
        abs(exact_uncertainty(logits, np.array([0]), temperatures(num, 2.0, "midpoint"))[0] - exact)
        for num in (10, 100, 1_000)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("num_ties", [1, 2, 5, 8])
def test_theta_zero_splits_ties_evenly(num_ties):
    logits = np.array([3.0] * num_ties + [1.0] * (8 - num_ties))
    zero = Temperatures((0.0,))
    tokens = np.arange(8)
    expected = [1 - 1 / num_ties] * num_ties + [1.0] * (8 - num_ties)
    np.testing.assert_allclose(exact_uncertainty(logits, tokens, zero), expected, atol=1e-15)


def test_limits_flat_and_one_hot_logits():
    vocab = 10
    flat = exact_uncertainty(np.zeros(vocab), np.array([4]), DEFAULT)
    assert flat[0] == pytest.approx(1 - 1 / vocab, abs=1e-15)
    sharp = np.zeros(vocab)
    sharp[4] = 1e4
    np.testing.assert_array_equal(exact_uncertainty(sharp, np.array([4, 0]), DEFAULT), [0.0, 1.0])


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, st.integers(2, 60), elements=st.floats(-30, 30)))
def test_uncertainty_falls_as_the_logit_grows(logits):
    tokens = np.argsort(logits, kind="stable")
    uncertainty = exact_uncertainty(logits, tokens, DEFAULT)
    # Logits one rounding apart may swap by the rounding of a mean of 20 values below 1.
    assert (np.diff(uncertainty) <= 1e-15).all()
    assert (uncertainty >= 0).all()
    assert (uncertainty <= 1).all()


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, st.integers(2, 20), elements=st.floats(-20, 20)), st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(logits, shift):
    tokens = np.arange(len(logits))
    # z + c rounds at 70 eps; the coldest temperature, 2/19, multiplies that by ten. Tokens within
    # rounding of the maximum may join or leave the ties at theta = 0, so that one is left out.
    warm = Temperatures(DEFAULT.values[1:])
    np.testing.assert_allclose(
        exact_uncertainty(logits + shift, tokens, warm),
        exact_uncertainty(logits, tokens, warm),
        atol=1e-12,
    )


def test_batch_axes_lead(rng):
    logits = random_logits(rng, 2, 3, 25)
    tokens = rng.integers(25, size=(2, 3, 4))
    found = exact_uncertainty(logits, tokens, DEFAULT)
    assert found.shape == (2, 3, 4)
    alone = exact_uncertainty(logits[1, 2], tokens[1, 2], DEFAULT)
    np.testing.assert_array_equal(found[1, 2], alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_must_be_finite(bad):
    """A filter that writes -inf into the logits belongs after the uncertainty, not before."""
    with pytest.raises(ValueError, match=r"^logits holds NaN or infinity"):
        exact_uncertainty(np.array([0.0, bad, 1.0]), np.array([0]), DEFAULT)


# --- sampled uncertainty -------------------------------------------------------------------------


def test_sampled_uncertainty_has_the_exact_mean_and_variance(rng):
    """E[u_K] = u and Var(u_K) = sum p(1 - p)/K^2, by Monte Carlo within 4 standard errors: (5)."""
    logits = random_logits(rng, 12, 200)
    tokens = logits.argmax(axis=-1)[:, None]
    probabilities = perturbed_probabilities(logits, tokens, DEFAULT)[:, 0]  # (12, K)
    num = 20_000
    uniforms = rng.uniform(size=(num, *probabilities.shape))
    draws = sampled_uncertainty(np.broadcast_to(probabilities, uniforms.shape), uniforms)
    exact = exact_uncertainty(logits, tokens, DEFAULT)[:, 0]
    variance = sampled_uncertainty_variance(probabilities)
    assert (np.abs(draws.mean(axis=0) - exact) <= 4 * np.sqrt(variance / num) + 1e-12).all()
    deviation = (draws - exact) ** 2
    error = deviation.std(axis=0) / math.sqrt(num)
    assert (np.abs(deviation.mean(axis=0) - variance) <= 4 * error + 1e-12).all()
    assert variance.max() > 1e-3  # the comparison is not one of zeros


def two_sample_p_value(first: np.ndarray, second: np.ndarray, num_values: int) -> float:
    """Chi-square test that two samples of counts have one law; rare values are pooled."""
    table = np.stack([np.bincount(sample, minlength=num_values) for sample in (first, second)])
    rare = table.sum(axis=0) < 20
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    return float(stats.chi2_contingency(table).pvalue)


@pytest.fixture
def drawn_misses(rng):
    """How many of K perturbed draws over the whole vocabulary miss the draft, 20,000 times."""
    logits = np.array([2.0, 1.6, 0.0, -0.5, -1.0, 1.1])
    law = np.stack([softmax(logits, theta) for theta in DEFAULT.values])
    counts = rng.multinomial(1, law, size=(20_000, len(law)))  # one-hot tokens
    return logits, (counts[..., 0] == 0).sum(axis=-1)


def test_drawing_tokens_has_the_law_of_the_bernoulli_form(rng, drawn_misses):
    logits, misses = drawn_misses
    probabilities = perturbed_probabilities(logits, np.array([0]), DEFAULT)[0]
    uniforms = rng.uniform(size=(len(misses), 20))
    sampled = sampled_uncertainty(np.broadcast_to(probabilities, uniforms.shape), uniforms)
    bernoulli = np.rint(sampled * 20).astype(int)
    assert two_sample_p_value(misses, bernoulli, 21) > SIGNIFICANCE


def test_the_same_test_tells_another_grid_apart(rng, drawn_misses):
    """Negative control: the midpoint temperatures have another law of u_K."""
    logits, misses = drawn_misses
    other = perturbed_probabilities(logits, np.array([0]), temperatures(20, 2.0, "midpoint"))[0]
    uniforms = rng.uniform(size=(len(misses), 20))
    sampled = sampled_uncertainty(np.broadcast_to(other, uniforms.shape), uniforms)
    assert two_sample_p_value(misses, np.rint(sampled * 20).astype(int), 21) < SIGNIFICANCE


def test_sampled_uncertainty_limits():
    uniforms = np.array([0.0, 0.5, np.nextafter(1.0, 0.0)])
    assert sampled_uncertainty(np.ones(3), uniforms) == 0
    assert sampled_uncertainty(np.zeros(3), uniforms) == 1
    assert sampled_uncertainty_variance(np.array([0.0, 1.0, 1.0])) == 0
    assert sampled_uncertainty_variance(np.full(20, 0.5)) == pytest.approx(1 / 80, abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1)))
def test_variance_is_at_most_a_quarter_over_k(probabilities):
    variance = sampled_uncertainty_variance(probabilities)
    assert 0 <= variance <= 1 / (4 * len(probabilities)) + 1e-15


@pytest.mark.parametrize("name", ["probabilities", "uniforms"])
@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_sampled_uncertainty_checks_its_arguments(name, bad):
    arguments = {"probabilities": np.full(3, 0.5), "uniforms": np.full(3, 0.5)}
    arguments[name] = np.array([0.5, bad, 0.5])
    with pytest.raises(ValueError, match=rf"^{name} .*\[0, 1\]"):
        sampled_uncertainty(**arguments)
    if name == "probabilities":
        with pytest.raises(ValueError, match=r"^probabilities .*\[0, 1\]"):
            sampled_uncertainty_variance(arguments[name])


def test_sampled_uncertainty_wants_one_uniform_for_each_temperature():
    """One uniform stretched over K temperatures would tie all draws together, unnoticed."""
    with pytest.raises(ValueError, match=r"^(uniforms|probabilities) ha"):
        sampled_uncertainty(np.full((4, 3), 0.5), np.full((4, 1), 0.5))


# --- attenuation ---------------------------------------------------------------------------------


def test_attenuation_predicts_what_sampling_does_to_the_line(rng):
    """(6) against simulated traces: beta need not be linear in u for it."""
    num = 200_000
    mean_hit = rng.beta(0.6, 0.6, size=num)
    probabilities = np.clip(mean_hit[:, None] + rng.uniform(-0.05, 0.05, size=(num, 5)), 0, 1)
    uncertainty = 1 - probabilities.mean(axis=1)
    rejection = np.clip(uncertainty**2 + rng.uniform(-0.3, 0.3, size=num), 0, 1)
    sampled = sampled_uncertainty(probabilities, rng.uniform(size=(num, 5)))
    covariance = np.cov(uncertainty, rejection)
    predicted = attenuation(
        float(covariance[0, 0]),
        float(sampled_uncertainty_variance(probabilities).mean()),
        float(covariance[0, 1] / covariance[0, 0]),
        float(np.corrcoef(uncertainty, rejection)[0, 1]),
    )
    measured = np.cov(sampled, rejection)
    slope = measured[0, 1] / measured[0, 0]
    correlation = np.corrcoef(sampled, rejection)[0, 1]
    # Standard errors at 200,000 tokens: 0.001 for the slope, 0.001 for the correlation.
    assert slope == pytest.approx(predicted.slope, abs=0.005)
    assert correlation == pytest.approx(predicted.correlation, abs=0.005)
    assert covariance[0, 0] / measured[0, 0] == pytest.approx(predicted.reliability, abs=0.01)
    assert predicted.reliability < 0.9  # there is something to predict


def test_attenuation_limits():
    clean = attenuation(0.04, 0.0, 0.8, 0.6)
    assert (clean.reliability, clean.slope, clean.correlation) == (1.0, 0.8, 0.6)
    half = attenuation(0.04, 0.04, 0.8, 0.6)
    assert half.slope == pytest.approx(0.4)
    assert half.correlation == pytest.approx(0.6 / math.sqrt(2))


@pytest.mark.parametrize(
    ("variance", "noise", "says"),
    [
        (0.0, 0.1, r"variance_exact = 0\.0: allowed is \(0, inf\)"),
        (math.nan, 0.1, r"variance_exact = nan"),
        (0.1, -0.1, r"mean_sampling_variance = -0\.1: allowed is \[0, inf\)"),
        (0.1, math.nan, r"mean_sampling_variance = nan"),
    ],
)
def test_attenuation_checks_its_arguments(variance, noise, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        attenuation(variance, noise, 0.8, 0.6)


# --- entropy and margin --------------------------------------------------------------------------


def test_entropy_closed_forms(rng):
    assert entropy(np.full(16, 1 / 16)) == pytest.approx(math.log(16), abs=1e-14)
    assert entropy(np.array([0.0, 1.0, 0.0])) == 0
    x = rng.dirichlet(np.ones(50), size=7)
    np.testing.assert_allclose(entropy(x), stats.entropy(x, axis=-1), atol=1e-13)


def test_margin_is_the_gap_of_the_two_largest(rng):
    x = rng.dirichlet(np.full(30, 0.3), size=50)
    ordered = np.sort(x, axis=-1)
    np.testing.assert_array_equal(margin(x), ordered[:, -1] - ordered[:, -2])
    assert margin(np.array([0.4, 0.2, 0.4])) == 0
    assert margin(np.array([0.0, 1.0])) == 1


@pytest.mark.parametrize("function", [entropy, margin])
def test_entropy_and_margin_refuse_logits(function):
    with pytest.raises(ValueError, match=r"^x .*logits"):
        function(np.array([2.0, -1.0, 0.3]))


def test_margin_needs_two_tokens():
    with pytest.raises(ValueError, match=r"^x has one token"):
        margin(np.array([1.0]))
