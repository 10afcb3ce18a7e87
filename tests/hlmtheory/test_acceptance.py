"""Accept/resample: the identity E[beta] = TV, the residual law, limits and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory import domain
from hlmtheory.acceptance import (
    rejection_probability,
    residual_distribution,
    total_variation,
)
from hlmtheory.sampling import sample_inverse_cdf

# A sum of V terms of total 1 is off by a few eps = 2.2e-16 with pairwise summation.
ROUNDING = 1e-14


def _distribution(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


positive_weights = st.integers(2, 40).flatmap(
    lambda vocab: st.tuples(
        *[arrays(np.float64, vocab, elements=st.floats(1e-6, 1.0)) for _ in range(2)]
    )
)


@pytest.mark.parametrize("vocab", [2, 3, 50, 2_000])
@pytest.mark.parametrize("concentration", [0.05, 1.0, 20.0])
def test_mean_rejection_is_total_variation(dirichlet_pairs, vocab, concentration):
    x, y = dirichlet_pairs(20, vocab, concentration=concentration)
    mean = np.sum(x * rejection_probability(x, y), axis=-1)
    np.testing.assert_allclose(mean, total_variation(x, y), atol=ROUNDING)


def test_total_variation_is_half_the_l1_distance_and_the_positive_part(dirichlet_pairs):
    x, y = dirichlet_pairs(50, 300)
    positive_part = np.maximum(x - y, 0).sum(axis=-1)
    np.testing.assert_allclose(total_variation(x, y), positive_part, atol=ROUNDING)
    np.testing.assert_allclose(total_variation(x, y), total_variation(y, x), atol=0)


@settings(max_examples=100, deadline=None)
@given(positive_weights)
def test_mean_rejection_is_total_variation_property(pair):
    x, y = (_distribution(weights) for weights in pair)
    distance = float(total_variation(x, y))
    assert abs(float(x @ rejection_probability(x, y)) - distance) <= ROUNDING
    assert 0 <= distance <= 1 + ROUNDING


@settings(max_examples=100, deadline=None)
@given(positive_weights)
def test_accept_or_resample_rebuilds_the_target(pair):
    """x min(1, y/x) + TV(x, y) r = y, token by token: (2)."""
    x, y = (_distribution(weights) for weights in pair)
    accepted = x * (1 - rejection_probability(x, y))
    law = accepted + total_variation(x, y) * residual_distribution(x, y)
    np.testing.assert_allclose(law, y, atol=ROUNDING)


def test_drawing_and_verifying_tokens_has_the_law_of_the_target(rng):
    """The whole rule played out token by token, against y."""
    x, y = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.4, 0.25, 0.25])
    num = 200_000
    drafts = rng.choice(4, size=num, p=x)
    rejected = rng.uniform(size=num) < rejection_probability(x, y)[drafts]
    residual = np.broadcast_to(residual_distribution(x, y), (int(rejected.sum()), 4))
    tokens = drafts.copy()
    tokens[rejected] = sample_inverse_cdf(residual, rng.uniform(size=(len(residual), 2)))
    frequency = np.bincount(tokens, minlength=4) / num
    np.testing.assert_array_less(np.abs(frequency - y), 4.5 * np.sqrt(y * (1 - y) / num))
    mean_rejection = float(total_variation(x, y))
    error = np.sqrt(mean_rejection * (1 - mean_rejection) / num)
    assert abs(rejected.mean() - mean_rejection) < 4.5 * error


def test_rejection_probability_by_hand():
    draft = np.array([0.5, 0.5, 0.5, 0.2, 0.0, 0.0])
    target = np.array([0.5, 0.25, 0.0, 0.9, 0.0, 0.3])
    expected = [0.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(rejection_probability(draft, target), expected, atol=0)


def test_total_variation_limits():
    x = np.array([0.25, 0.75, 0.0, 0.0])
    y = np.array([0.0, 0.0, 0.5, 0.5])
    assert total_variation(x, x) == 0
    assert total_variation(x, y) == 1


def test_residual_of_equal_laws_is_the_target(dirichlet_pairs):
    x, _ = dirichlet_pairs(4, 30)
    np.testing.assert_array_equal(residual_distribution(x, x), x)


def test_residual_of_disjoint_laws_is_the_target():
    x, y = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.75, 0.25])
    np.testing.assert_array_equal(residual_distribution(x, y), y)


def test_residual_of_a_sub_distribution(dirichlet_pairs):
    """Residual verification passes sigma * x, whose sum is below 1."""
    x, y = dirichlet_pairs(10, 40)
    skipped = np.where(x > np.quantile(x, 0.9), x, 0.0)
    law = residual_distribution(skipped, y)
    np.testing.assert_allclose(law.sum(axis=-1), 1, atol=ROUNDING)
    assert (law >= 0).all()
    assert (law[y < skipped] == 0).all()
    np.testing.assert_allclose(residual_distribution(0 * x, y), y, atol=ROUNDING)


def test_batch_axes_lead_and_broadcast(dirichlet_pairs):
    x, y = dirichlet_pairs(6, 12)
    stacked = total_variation(x.reshape(2, 3, 12), y.reshape(2, 3, 12))
    assert stacked.shape == (2, 3)
    np.testing.assert_array_equal(stacked.ravel(), total_variation(x, y))
    one_target = total_variation(x, y[0])
    assert one_target.shape == (6,)
    assert one_target[3] == total_variation(x[3], y[0])


def test_float32_keeps_its_type_and_agrees(dirichlet_pairs):
    x, y = dirichlet_pairs(10, 500)
    narrow = total_variation(x.astype(np.float32), y.astype(np.float32))
    assert narrow.dtype == np.float32
    # Each of 500 entries carries a relative error of 6e-8; their sum is at most 2.
    np.testing.assert_allclose(narrow, total_variation(x, y), atol=1e-6)


@pytest.mark.parametrize("bad", ["x", "y"])
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.5, math.nan], "NaN"),
        ([0.5, math.inf], "infinity"),
        ([1.5, -0.5], r"-0\.5.*\[0, 1\]"),
        ([0.5, 0.4], "sums to 1 only within 0.1"),
        ([2.3, 0.7], "softmax"),
        ([-1.2, 3.4], "logits"),
    ],
)
def test_what_is_no_distribution_is_refused_by_name(bad, values, says):
    good = np.array([0.5, 0.5])
    arguments = {"x": good, "y": good, bad: np.array(values)}
    with pytest.raises(ValueError, match=rf"^{bad} .*{says}"):
        total_variation(arguments["x"], arguments["y"])


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"y has \(3,\) and x has \(2,\).*vocabulary"):
        total_variation(np.array([0.5, 0.5]), np.array([0.5, 0.25, 0.25]))
    with pytest.raises(ValueError, match=r"y has .*x has .*vocabulary"):
        residual_distribution(np.array([0.5, 0.5]), np.array([0.5, 0.25, 0.25]))


@pytest.mark.parametrize("weights", [[math.nan, 0.5], [-3.0, 2.0], [math.inf, 0.0]])
def test_residual_refuses_weights_that_are_none(weights):
    """x need not sum to one there, but it has no NaN and no sign: logits must not get through."""
    with pytest.raises(ValueError, match=r"^x "):
        residual_distribution(np.array(weights), np.array([0.5, 0.5]))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("draft_prob", 1.2, r"= 1\.2.*\[0, 1\]"),
        ("draft_prob", -0.1, r"= -0\.1.*\[0, 1\]"),
        ("target_prob", 40.0, r"= 40.*percentage"),
        ("target_prob", math.nan, r"NaN.*\[0, 1\]"),
    ],
)
def test_rejection_probability_refuses_what_is_no_probability(name, value, says):
    arguments = {"draft_prob": np.array([0.5]), "target_prob": np.array([0.5])}
    arguments[name] = np.array([value])
    with pytest.raises(ValueError, match=f"^{name} .*{says}"):
        rejection_probability(**arguments)


def test_messages_are_one_line():
    with pytest.raises(ValueError, match="logits") as caught:
        total_variation(np.array([3.0, -1.0]), np.array([0.5, 0.5]))
    assert "\n" not in str(caught.value)


def test_unchecked_switches_the_checks_off_and_on_again():
    logits, y = np.array([3.0, -1.0]), np.array([0.5, 0.5])
    with domain.unchecked():
        total_variation(logits, y)
    with pytest.raises(ValueError, match="logits"):
        total_variation(logits, y)


def test_checks_come_back_after_an_exception():
    with pytest.raises(RuntimeError, match="inside"), domain.unchecked():
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="logits"):
        total_variation(np.array([3.0, -1.0]), np.array([0.5, 0.5]))


def test_probabilities_that_nearly_underflow_do_not_overflow_the_ratio():
    """A float32 softmax holds subnormal entries: y/x passes the largest float32 there."""
    draft = np.array([1e-40], dtype=np.float32)
    target = np.array([0.5], dtype=np.float32)
    assert rejection_probability(draft, target)[0] == 0
