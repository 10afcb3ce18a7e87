"""Rejection risk is exactly the output bias; lower bound, residual rule and the other rules' price.

The sums here have up to 2,000 terms of total 1 and carry a few eps = 2.2e-16 each way, so 1e-12 is
a thousandfold margin over rounding and far below any error of a formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory.acceptance import (
    rejection_probability,
    residual_distribution,
    total_variation,
)
from hlmtheory.policies.ask_llm import AskAndSample
from hlmtheory.policies.r_hlm import ResidualVerification
from hlmtheory.sampling import sample_inverse_cdf
from hlmtheory.scores import poisson_binomial_cdf
from hlmtheory.truncation import truncated_distribution
from hlmtheory.uncertainty import perturbed_probabilities, temperatures
from hlmtheory.verification import (
    DraftFromSent,
    FullDistribution,
    TruncatedDistribution,
    bias_lower_bound,
    output_bias,
    output_law,
)

WORST = 1e-12
RULES = (
    FullDistribution(),
    TruncatedDistribution(),
    DraftFromSent(),
    ResidualVerification(),
    AskAndSample(),
)
Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def rejection_risk(x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """rho = sum sigma max(x - y, 0): (11)."""
    return (sigma * np.maximum(x - y, 0)).sum(axis=-1)


def random_cases(rng: np.random.Generator, rows: int = 8) -> Iterator[Case]:
    """1,000 random (x, y, sigma, size), V from 2 to 2,000, three kinds of gate, 8 rows a batch."""
    thetas = temperatures(6)
    for index, vocab in enumerate(np.geomspace(2, 2_000, 125).round().astype(int)):
        shape = (rows, int(vocab))
        logits = rng.uniform(0.2, 6, size=(rows, 1)) * rng.standard_normal(shape)
        target = rng.uniform(0, 1.5, size=(rows, 1)) * rng.standard_normal(shape) + logits
        x, y = (np.exp(z - z.max(axis=-1, keepdims=True)) for z in (logits, target))
        x, y = x / x.sum(axis=-1, keepdims=True), y / y.sum(axis=-1, keepdims=True)
        if index % 5 == 0:  # exact zeros, as top-p filtering leaves them
            x = np.where(x < np.quantile(x, 0.3), 0, x)
            y = np.where(y < np.quantile(y, 0.3), 0, y)
            x, y = x / x.sum(axis=-1, keepdims=True), y / y.sum(axis=-1, keepdims=True)
        if index % 3 == 0:  # what an uncertainty gate does
            tokens = np.broadcast_to(np.arange(vocab), shape)
            probabilities = perturbed_probabilities(logits, tokens, thetas)
            threshold = float(rng.uniform())
            if index % 2:
                sigma = (1 - probabilities.mean(-1) <= threshold).astype(float)
            else:
                sigma = poisson_binomial_cdf(1 - probabilities, int(6 * threshold))
        elif index % 3 == 1:  # any set of tokens
            sigma = (rng.uniform(size=shape) < rng.uniform(size=(rows, 1))).astype(float)
        else:  # any skip probabilities
            sigma = rng.uniform(size=shape) ** rng.uniform(0.1, 10, size=(rows, 1))
        yield x, y, sigma, rng.integers(1, vocab + 1, size=rows)


def output_law_reference(
    x: np.ndarray, y: np.ndarray, sigma: np.ndarray, reference: np.ndarray, draft: np.ndarray
) -> np.ndarray:
    """The obvious loop for accept/resample: follow every draft through the gate and the server."""
    vocab = len(x)
    residual = [max(y[v] - reference[v], 0.0) for v in range(vocab)]
    mass = sum(residual)
    law = np.zeros(vocab)
    for d in range(vocab):
        law[d] += draft[d] * sigma[d]
        sent = draft[d] * (1 - sigma[d])
        accept = 1.0 if reference[d] <= y[d] else y[d] / reference[d]
        law[d] += sent * accept
        for v in range(vocab):
            share = residual[v] / mass if mass > 0 else y[v]
            law[v] += sent * (1 - accept) * share
    return law


# --- every identity on 1,000 random cases --------------------------------------------------------


def test_identities_on_a_thousand_random_cases(rng):
    """(3), (12), (13), (24) and (25): the worst violation stays below 1e-12."""
    num_cases = 0
    fractional_gap = 0.0
    for x, y, sigma, size in random_cases(rng):
        num_cases += len(x)
        rho, bound = rejection_risk(x, y, sigma), bias_lower_bound(x, y, sigma)
        bias = {type(rule): output_bias(rule, x, y, sigma, size) for rule in RULES}
        rejected = np.sum(x * rejection_probability(x, y), axis=-1)
        np.testing.assert_allclose(rejected, total_variation(x, y), atol=WORST)
        np.testing.assert_allclose(bias[FullDistribution], rho, atol=WORST)
        np.testing.assert_allclose(bias[ResidualVerification], bound, atol=WORST)
        skipped = sigma * x
        skip_rate = skipped.sum(axis=-1, keepdims=True)
        ask = np.abs(skipped - skip_rate * y).sum(axis=-1) / 2
        np.testing.assert_allclose(bias[AskAndSample], ask, atol=WORST)
        for rule in (FullDistribution, TruncatedDistribution, ResidualVerification, AskAndSample):
            assert (bias[rule] >= bound - WORST).all(), rule
        # A rule that drafts from another law has the bound of that law.
        sent = truncated_distribution(x, size)
        assert (bias[DraftFromSent] >= bias_lower_bound(sent, y, sigma) - WORST).all()
        np.testing.assert_allclose(bias[DraftFromSent], rejection_risk(sent, y, sigma), atol=WORST)
        assert (bound <= rho + WORST).all()
        if set(np.unique(sigma)) <= {0.0, 1.0}:
            np.testing.assert_allclose(bound, rho, atol=WORST)
        else:
            fractional_gap = max(fractional_gap, float((rho - bound).max()))
    assert num_cases == 1_000
    # For a gate that draws lots the papers' rule is not optimal; residual verification still is.
    assert fractional_gap > 0.01


def test_laws_of_a_thousand_random_cases_are_distributions(rng):
    nothing_skipped = np.zeros(())
    for x, y, sigma, size in random_cases(rng):
        for rule in RULES:
            law = output_law(rule, x, y, sigma, size)
            np.testing.assert_allclose(law.sum(axis=-1), 1, atol=WORST)
            assert (law >= 0).all(), rule
        never = nothing_skipped + 0 * sigma
        for rule in (FullDistribution(), DraftFromSent(), ResidualVerification(), AskAndSample()):
            law = output_law(rule, x, y, never, size)
            np.testing.assert_allclose(law, y, atol=WORST, err_msg=str(rule))


def test_truncation_bias_stays_within_data_processing(rng):
    """(22) at one step with no skipping: TV(output, y) <= TV(x, xhat) = N(k)/2."""
    for x, y, sigma, size in random_cases(rng):
        bias = output_bias(TruncatedDistribution(), x, y, 0 * sigma, size)
        assert (bias <= total_variation(x, truncated_distribution(x, size)) + WORST).all()


def test_full_size_recovers_the_full_rule(rng):
    for x, y, sigma, _ in random_cases(rng, rows=2):
        vocab = x.shape[-1]
        full = output_law(FullDistribution(), x, y, sigma)
        for rule in (TruncatedDistribution(), DraftFromSent()):
            for size in (vocab, np.full(len(x), vocab)):
                np.testing.assert_allclose(
                    output_law(rule, x, y, sigma, size), full, atol=WORST, err_msg=str(rule)
                )


# --- closed forms and limits ---------------------------------------------------------------------


small_cases = st.integers(2, 12).flatmap(
    lambda vocab: st.tuples(
        arrays(np.float64, vocab, elements=st.floats(1e-6, 1)),
        arrays(np.float64, vocab, elements=st.floats(1e-6, 1)),
        arrays(np.float64, vocab, elements=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))),
        st.integers(1, vocab),
    )
)


@settings(max_examples=100, deadline=None)
@given(small_cases)
def test_output_law_is_the_obvious_loop(case):
    x, y, sigma, size = case[0] / case[0].sum(), case[1] / case[1].sum(), case[2], case[3]
    sent = truncated_distribution(x, size)
    for rule, reference, draft in (
        (FullDistribution(), x, x),
        (TruncatedDistribution(), sent, x),
        (DraftFromSent(), sent, sent),
    ):
        expected = output_law_reference(x, y, sigma, reference, draft)
        # The loop adds 144 terms one after another: 144 eps at the most.
        np.testing.assert_allclose(output_law(rule, x, y, sigma, size), expected, atol=1e-13)


def test_skipping_everything_emits_the_draft_law(dirichlet_pairs):
    x, y = dirichlet_pairs(10, 60)
    for rule in RULES:
        draft = truncated_distribution(x, 5) if rule.drafts_from_sent else x
        np.testing.assert_allclose(output_law(rule, x, y, 0 * x + 1, 5), draft, atol=WORST)
        bias = output_bias(rule, x, y, 0 * x + 1, 5)
        np.testing.assert_allclose(bias, total_variation(draft, y), atol=WORST)


def test_equal_models_have_no_bias_except_by_truncation(dirichlet_pairs):
    x, _ = dirichlet_pairs(10, 60)
    sigma = (x > 0.1).astype(float)
    for rule in (FullDistribution(), ResidualVerification()):
        np.testing.assert_allclose(output_bias(rule, x, x, sigma), 0, atol=WORST)
    assert (output_bias(TruncatedDistribution(), x, x, 0 * x, 3) > 0).any()


def test_skipping_a_token_the_server_never_says_costs_its_whole_probability():
    x, y = np.array([0.6, 0.4]), np.array([0.0, 1.0])
    for rule in (FullDistribution(), ResidualVerification()):
        assert output_bias(rule, x, y, np.array([1.0, 0.0])) == pytest.approx(0.6, abs=1e-15)
        assert output_bias(rule, x, y, np.array([0.0, 1.0])) == pytest.approx(0.0, abs=1e-15)


def test_ask_and_sample_by_hand():
    """x = (.5, .5), y = (.8, .2), skip the first token: it is emitted with .5 + .5 * .8 = .9."""
    x, y = np.array([0.5, 0.5]), np.array([0.8, 0.2])
    sigma = np.array([1.0, 0.0])
    np.testing.assert_allclose(output_law(AskAndSample(), x, y, sigma), [0.9, 0.1], atol=1e-15)
    # Yet the gate itself risks nothing: the server says that token more often than the device.
    assert bias_lower_bound(x, y, sigma) == 0
    assert output_bias(ResidualVerification(), x, y, sigma) == pytest.approx(0, abs=1e-15)


def test_no_scheme_with_the_gate_beats_the_lower_bound(rng):
    """(13) against arbitrary servers: whatever law answers, the bias is at least the bound."""
    for _ in range(200):
        x, y, answer = rng.dirichlet(np.full(6, 0.5), size=3)
        sigma = rng.uniform(size=6) * rng.integers(0, 2, size=6)
        skipped = sigma * x
        law = skipped + (1 - skipped.sum()) * answer
        assert float(total_variation(law, y)) >= float(bias_lower_bound(x, y, sigma)) - WORST


def test_draft_from_sent_pays_in_rejections(dirichlet_pairs):
    """(23): no bias at any k, and TV(xhat, y) rejections instead of TV(x, y)."""
    x, y = dirichlet_pairs(6, 40)
    sigma = 0 * x
    for size in range(1, 41):
        np.testing.assert_allclose(output_law(DraftFromSent(), x, y, sigma, size), y, atol=WORST)
        sent = truncated_distribution(x, size)
        rate = (sent * (1 - DraftFromSent().acceptance(sent, y))).sum(axis=-1)
        np.testing.assert_allclose(rate, total_variation(sent, y), atol=WORST)


def test_playing_the_rules_out_has_the_output_law(rng):
    """Gate, acceptance and resampling drawn token by token, as an engine would draw them."""
    num, vocab = 100_000, 6
    x = np.array([0.45, 0.25, 0.15, 0.1, 0.04, 0.01])
    y = np.array([0.3, 0.3, 0.05, 0.1, 0.05, 0.2])
    sigma = np.array([1.0, 0.4, 0.0, 0.0, 0.5, 0.0])
    for rule in RULES:
        reference = rule.reference_law(x, 2)
        draft_law = reference if rule.drafts_from_sent else x
        drafts = rng.choice(vocab, size=num, p=draft_law)
        skipped = rng.uniform(size=num) < sigma[drafts]
        accepted = rng.uniform(size=num) < rule.acceptance(reference, y)[drafts]
        weights = rule.resample_weights(reference, y, sigma * draft_law)
        resampled = sample_inverse_cdf(
            np.broadcast_to(weights, (num, vocab)), rng.uniform(size=(num, 2))
        )
        tokens = np.where(skipped | accepted, drafts, resampled)
        frequency = np.bincount(tokens, minlength=vocab) / num
        law = output_law(rule, x, y, sigma, 2)
        # 30 comparisons, each within 4.5 standard errors: a false alarm once in 5,000 seeds.
        error = np.sqrt(law * (1 - law) / num)
        np.testing.assert_array_less(np.abs(frequency - law), 4.5 * error + 1e-12, str(rule))


def test_negative_control_the_law_without_the_gate_does_not_fit(dirichlet_pairs):
    """(12) has teeth: forgetting sigma, or verifying against the wrong x, breaks it visibly."""
    x, y = dirichlet_pairs(50, 30)
    sigma = (x > 0.1).astype(float)
    rho = rejection_risk(x, y, sigma)
    ungated = output_bias(FullDistribution(), x, y, 0 * sigma)
    assert np.abs(ungated - rho).max() > 0.01
    wrong_reference = output_bias(TruncatedDistribution(), x, y, sigma, 2)
    assert np.abs(wrong_reference - rho).max() > 0.01


# --- parts and refusals --------------------------------------------------------------------------


def test_resampling_weights_are_the_residual_law(dirichlet_pairs):
    x, y = dirichlet_pairs(5, 20)
    weights = FullDistribution().resample_weights(x, y, 0 * x)
    np.testing.assert_allclose(
        weights / weights.sum(axis=-1, keepdims=True), residual_distribution(x, y), atol=WORST
    )
    np.testing.assert_array_equal(AskAndSample().resample_weights(x, y, x), y)
    np.testing.assert_array_equal(ResidualVerification().acceptance(x, y), 0 * x)
    np.testing.assert_allclose(
        FullDistribution().acceptance(x, y), 1 - rejection_probability(x, y), atol=0
    )


def test_a_truncating_rule_needs_its_size(dirichlet_pairs):
    x, y = dirichlet_pairs(2, 10)
    for rule in (TruncatedDistribution(), DraftFromSent()):
        with pytest.raises(ValueError, match=r"^size is None"):
            output_law(rule, x, y, 0 * x)
        for size in (0, 11):
            with pytest.raises(ValueError, match=rf"^size = {size}: allowed is 1 to V = 10"):
                output_law(rule, x, y, 0 * x, size)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("x", [0.5, math.nan], "NaN"),
        ("x", [2.0, -1.0], "logits"),
        ("y", [0.5, 0.6], "sums to 1 only within 0.1"),
        ("skip_probability", [0.5, 1.5], r"= 1\.5: allowed is \[0, 1\]"),
        ("skip_probability", [math.nan, 0.5], r"NaN.*\[0, 1\]"),
        ("y", [0.2, 0.3, 0.5], r"\(3,\).*vocabulary"),
        ("skip_probability", [0.0, 1.0, 0.0], r"\(3,\).*vocabulary"),
    ],
)
def test_arguments_are_refused_by_name(rule, name, values, says):
    arguments = {
        "x": np.array([0.5, 0.5]),
        "y": np.array([0.25, 0.75]),
        "skip_probability": np.array([1.0, 0.0]),
    }
    arguments[name] = np.array(values)
    for function in (output_law, output_bias):
        with pytest.raises(ValueError, match=f"^{name} .*{says}"):
            function(rule, **arguments, size=1)
    with pytest.raises(ValueError, match=f"^{name} .*{says}"):
        bias_lower_bound(**arguments)
