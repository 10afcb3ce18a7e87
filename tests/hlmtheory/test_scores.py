"""Scores: each by its definition, their probabilities against brute force, atoms against skips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import law_step, random_logits, softmax, stored

from hlmtheory.scores import (
    SCORE_NAMES,
    LearnedScore,
    poisson_binomial_cdf,
    poisson_binomial_law,
    score_named,
    skip_set_bound,
)
from hlmtheory.steps import HEAD_SIZE, Axes, Step
from hlmtheory.uncertainty import exact_uncertainty, temperatures

LEARNED = {
    "features": ("uncertainty", "draft_prob", "entropy"),
    "mean": (0.4, 0.5, 1.0),
    "scale": (0.3, 0.4, 0.9),
    "coefficients": (1.3, -0.8, 0.5),
    "intercept": -0.7,
}


def a_score(name: str):
    return score_named(name, LEARNED)


# --- each by its definition ----------------------------------------------------------------------


def test_scores_of_the_draft_are_their_definitions(rng):
    z, w = random_logits(rng, 30, 25)
    step = law_step(rng, z, w)
    x = np.sort(softmax(z), -1)
    u = exact_uncertainty(z, step["draft_token"][:, None], temperatures())[:, 0]
    logit = (
        -0.7
        + 1.3 * (u - 0.4) / 0.3
        - 0.8 * (step["draft_prob"] - 0.5) / 0.4
        + 0.5 * (-(x * np.log(x)).sum(-1) - 1.0) / 0.9
    )
    expected = {
        "uncertainty": u,
        "entropy": -(x * np.log(x)).sum(-1),
        "one_minus_max_prob": 1 - x[:, -1],
        "one_minus_margin": 1 - x[:, -1] + x[:, -2],
        "max_logit": -z.max(-1),
        "learned": 1 / (1 + np.exp(-logit)),
    }
    assert set(expected) == set(SCORE_NAMES) - {"uncertainty_sampled"}
    for name, values in expected.items():
        for one in (step, stored(step)):
            np.testing.assert_allclose(a_score(name).of_draft(one), values, atol=1e-12)
        # A threshold at the score itself skips: score <= threshold.
        threshold = float(a_score(name).of_draft(step)[0])
        skips = a_score(name).skips(step, threshold)
        assert skips[0]
        np.testing.assert_array_equal(skips, a_score(name).of_draft(step) <= threshold)
        assert a_score(name).low <= values.min() <= values.max() <= a_score(name).high


def test_drawn_u_k_has_the_mean_u_and_counts_rounding_as_equal(rng):
    num = 40_000
    z = np.tile([1.0, 0.3, -0.5, 0.0], (num, 1))
    step = law_step(rng, z, z, drafts=np.zeros(num, dtype=int))
    sampled = a_score("uncertainty_sampled").of_draft(step)
    error = float(step["uncertainty_variance"][0]) ** 0.5 / num**0.5
    assert abs(sampled.mean() - step["uncertainty"][0]) < 4 * error
    # 3/20 in floating point may lie above 0.15; it counts as equal.
    # A draft beyond the head counts as 1.
    drawn, rank = np.array([1 - 0.85, 3 / 20, 0.2, 0.0]), np.array([0, 3, 1, -1])
    four = Step(Axes(9), {"uncertainty_sampled": drawn, "draft_rank": rank})
    skips = a_score("uncertainty_sampled").skips(four, 0.15)
    np.testing.assert_array_equal(skips, [True, True, False, False])


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 0.5, 0.8])
def test_sampled_sigma_is_the_frequency_of_simulated_draws(rng, threshold):
    """The K tokens are drawn from the K perturbed softmaxes, as U-HLM does."""
    num, vocab = 20_000, 6
    z = 2 * rng.standard_normal(vocab)
    step = law_step(rng, z[None], z[None])
    skip = a_score("uncertainty_sampled").skip_probability(step, threshold)
    drawn = []
    for theta in temperatures().values:
        if theta == 0:
            drawn.append(np.full(num, z.argmax()))
        else:
            drawn.append(rng.choice(vocab, size=num, p=softmax(z / theta)))
    for place, token in enumerate(step["candidate_token"][0]):
        misses = (np.stack(drawn) != token).sum(0)
        simulated = (misses <= round(threshold * 20 - 1e-9)) * 1.0
        sigma = skip.candidates[0, place]
        error = (sigma * (1 - sigma) / num) ** 0.5
        assert abs(simulated.mean() - sigma) < 4.5 * error + 1e-9
    assert not skip.whole.any()


# --- the Poisson-binomial law --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(-1, 9))
def test_poisson_binomial_law_is_the_sum_over_all_outcomes(probabilities, most):
    law = np.zeros(len(probabilities) + 1)
    for outcome in itertools.product((0, 1), repeat=len(probabilities)):
        weight = np.prod(
            [p if one else 1 - p for p, one in zip(probabilities, outcome, strict=True)]
        )
        law[sum(outcome)] += weight
    p = np.array(probabilities)
    np.testing.assert_allclose(poisson_binomial_law(p), law, atol=1e-13)
    cut = poisson_binomial_law(p, 1)
    np.testing.assert_allclose(cut, law[:2], atol=1e-13)
    below = law[: max(most + 1, 0)].sum()
    np.testing.assert_allclose(poisson_binomial_cdf(p, most), below, atol=1e-13)


# --- atoms ---------------------------------------------------------------------------------------


def cumulative(score, step, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Mass and rejection of the atoms of each context at or below a threshold."""
    values, mass, rejection = score.atoms(step)
    slack = 1e-9 if score.name == "uncertainty_sampled" else 0.0
    inside = values <= threshold + slack
    return (mass * inside).sum(-1), (rejection * inside).sum(-1)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("vocab", [9, 45, 300])
@pytest.mark.parametrize("name", SCORE_NAMES)
def test_atoms_sum_to_the_draft_and_their_sums_are_the_gate(rng, name, vocab, flat):
    z, w = random_logits(rng, 25, vocab)
    if flat:
        z, w = 0.2 * z, 0.2 * w
    step = stored(law_step(rng, z, w))
    score = a_score(name)
    values, mass, rejection = score.atoms(step)
    assert values.shape == mass.shape == rejection.shape
    assert (mass >= 0).all()
    assert (rejection >= 0).all()
    assert (rejection <= mass + 1e-12).all()
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(rejection.sum(-1), step["tv_distance"], atol=1e-12)
    of_draft = score.of_draft(step)
    high = 1.0 if score.high == 1 else of_draft.max() + 0.1
    for threshold in np.append(rng.uniform(min(of_draft.min(), high), high, size=12), high):
        skip = score.skip_probability(step, float(threshold))
        gate = skip.mass(step), skip.risk(step)
        for found, exact in zip(cumulative(score, step, threshold), gate, strict=True):
            if name == "uncertainty":
                decides = (step["head_uncertainty"][:, -1] > threshold) | (threshold >= 1)
                decides |= vocab <= HEAD_SIZE
            elif name == "uncertainty_sampled":
                decides = np.full(25, vocab <= HEAD_SIZE or threshold >= 1)
            else:
                decides = np.full(25, True)
            np.testing.assert_allclose(found[decides], exact[decides], atol=1e-10)


@pytest.mark.parametrize("name", ["uncertainty", "uncertainty_sampled", "learned"])
def test_atoms_bound_the_gate_from_above_where_the_head_does_not_decide(rng, name):
    """Against the gate of a live step that looks at the whole vocabulary."""
    vocab = 120
    z, w = random_logits(rng, 20, vocab)
    z, w = 0.15 * z, 0.15 * w
    live = law_step(rng, z, w, head_size=vocab)
    step = stored(law_step(rng, z, w, drafts=live["draft_token"]))
    loose = 0
    around = np.quantile(step["head_uncertainty"][:, -1], [0.2, 0.5, 0.9]) + 1e-4
    for threshold in (0.5, 0.9, 0.95, 0.98, *around):
        skip = a_score(name).skip_probability(live, threshold)
        exact = skip.mass(live), skip.risk(live)
        for found, truth in zip(cumulative(a_score(name), step, threshold), exact, strict=True):
            assert (found >= truth - 1e-10).all()
            loose += (found > truth + 1e-6).sum()
    assert (loose > 0) == (name == "uncertainty")  # the others count as 1 beyond the head


def test_atoms_of_a_context_are_never_split_by_a_score_of_the_context(rng):
    step = stored(law_step(rng, *random_logits(rng, 5, 60)))
    for name in ("entropy", "one_minus_max_prob", "one_minus_margin", "max_logit"):
        values, mass, rejection = a_score(name).atoms(step)
        assert values.shape == (5, 1)
        np.testing.assert_array_equal(mass, 1)
        np.testing.assert_array_equal(rejection[:, 0], step["tv_distance"])


# --- how far a live step must look ---------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(2, 80), st.floats(0, 3), st.integers(0, 2**32 - 1))
def test_skip_sets_are_no_larger_than_their_bound(threshold, vocab, sharpness, seed):
    z = sharpness * np.random.default_rng(seed).standard_normal(vocab)
    u = exact_uncertainty(z, np.arange(vocab), temperatures())
    assert (u <= threshold).sum() <= skip_set_bound(threshold, vocab)
    assert a_score("uncertainty").num_candidates(threshold, vocab) >= min(
        HEAD_SIZE, (u <= threshold).sum()
    )


def test_bound_of_the_skip_set_by_hand():
    found = [skip_set_bound(t, 100) for t in (-0.5, 0, 0.49, 0.5, 0.75, 0.9, 0.995, 1.0)]
    assert found == [1, 1, 1, 2, 4, 10, 100, 100]


# --- the learned score, and names ----------------------------------------------------------------


def test_learned_score_sends_what_lies_beyond_the_head(rng):
    """A draft beyond the head scores 1, whatever its features say, and is skipped only at 1."""
    vocab = 60
    z = np.tile(0.1 * rng.standard_normal(vocab), (vocab, 1))
    step = law_step(rng, z, z, drafts=np.arange(vocab))
    score = LearnedScore(("uncertainty",), (0.0,), (1.0,), (-50.0,), 0.0)
    values = score.of_draft(step)
    beyond = step["draft_rank"] < 0
    assert beyond.sum() == vocab - HEAD_SIZE
    assert (values[beyond] == 1).all()
    assert (values[~beyond] < 1e-6).all()
    for one in (step, stored(step)):
        below = score.skip_probability(one, 0.999)
        inside = np.sort(softmax(z[0]))[::-1][:HEAD_SIZE].sum()
        np.testing.assert_allclose(below.mass(one), inside, atol=1e-12)
        assert score.skip_probability(one, 1.0).whole.all()


def test_learned_scores_need_their_numbers():
    with pytest.raises(ValueError, match=r"^score = 'learned': none was fitted"):
        score_named("learned")
    with pytest.raises(ValueError, match="mean, scale and coefficient of each feature"):
        LearnedScore(("uncertainty",), (0.0,), (1.0, 2.0), (1.0,), 0.0)
    with pytest.raises(ValueError, match="of each feature"):
        LearnedScore()


def test_scores_by_name():
    for name in SCORE_NAMES:
        assert a_score(name).name == name
        assert a_score(name).label
    with pytest.raises(ValueError, match=r"^score = 'surprise': known are uncertainty, .*learned$"):
        score_named("surprise")
