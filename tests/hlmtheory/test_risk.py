"""Rejection risk, its sums and curves, averaging over the draft, and the learned score.

Sums of float64 over at most a few thousand terms of order 1: 1e-12 leaves a thousandfold margin.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlmtheory.acceptance import total_variation
from hlmtheory.clusters import mean_over_tokens, resample_prompts
from hlmtheory.learned_score import cross_fitted_score, fit_logistic
from hlmtheory.risk import (
    SkipAtoms,
    rejection_risk,
    skip_rate_at_risk,
    skip_risk_sums,
)
from hlmtheory.verification import FullDistribution, output_bias, output_law

WORST = 1e-12
Trace = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def random_trace(seed: int, num_prompts: int = 30, most: int = 40) -> Trace:
    """(score, beta, prompt_index, num_prompts): difficulty differs by prompt, so do lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most, size=num_prompts)
    index = np.repeat(np.arange(num_prompts), lengths)
    difficulty = rng.beta(1, 2, size=num_prompts)[index]
    score = np.round(rng.uniform(size=len(index)), 2)  # ties
    beta = np.clip(score * difficulty * rng.uniform(0, 2, size=len(index)), 0, 1)
    return score, beta, index, num_prompts


def drafts(score, beta, index, num_prompts) -> SkipAtoms:
    return SkipAtoms.of_drafts(score, beta, index, num_prompts)


def random_pair(rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = rng.dirichlet(np.full(vocab, 0.4), size=2)
    return x, y


def test_rejection_risk_is_the_output_bias():
    """(12) for deterministic and for randomised gates, V from 2 to 2,000."""
    rng = np.random.default_rng(0)
    for vocab in np.geomspace(2, 2_000, 60).round().astype(int):
        x, y = random_pair(rng, int(vocab))
        for sigma in (rng.uniform(size=vocab), (rng.uniform(size=vocab) < 0.4).astype(float)):
            bias = output_bias(FullDistribution(), x, y, sigma)
            assert rejection_risk(x, y, sigma) == pytest.approx(bias, abs=WORST)
            tensors = (torch.from_numpy(a) for a in (x, y, sigma))
            assert float(rejection_risk(*tensors)) == pytest.approx(bias, abs=WORST)


def test_rejection_risk_limits():
    x, y = random_pair(np.random.default_rng(1), 30)
    assert rejection_risk(x, y, np.zeros(30)) == 0
    assert rejection_risk(x, y, np.ones(30)) == pytest.approx(total_variation(x, y), abs=WORST)
    assert rejection_risk(x, x, np.ones(30)) == 0


def test_rejection_risk_monte_carlo():
    """Mean of sigma(d) beta_d over 200,000 drafts, within four standard errors."""
    rng = np.random.default_rng(2)
    x, y = random_pair(rng, 20)
    sigma = rng.uniform(size=20)
    values = (sigma * np.maximum(0, 1 - y / x))[rng.choice(20, size=200_000, p=x)]
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - rejection_risk(x, y, sigma)) < 4 * error


@pytest.mark.parametrize("weighting", ["tokens", "prompts"])
def test_curve_is_its_definition(weighting):
    score, beta, index, num_prompts = random_trace(3)
    grid = np.array([-0.1, 0.0, 0.255, 0.5, 0.5, 1.0])
    sums = skip_risk_sums(SkipAtoms.of_drafts(score, beta, index, num_prompts), grid)
    skip_rate, risk = sums.curve(weighting)
    for g, threshold in enumerate(grid):
        skipped = (score <= threshold).astype(float)
        for values, found, rows in (
            (skipped, skip_rate, sums.rates()[0]),
            (skipped * beta, risk, sums.rates()[1]),
        ):
            by_prompt = [values[index == i].mean() for i in range(num_prompts)]
            expected = values.mean() if weighting == "tokens" else np.mean(by_prompt)
            assert found[g] == pytest.approx(expected, abs=WORST)
            np.testing.assert_allclose(rows[:, g], by_prompt, atol=WORST)


def test_the_two_weightings():
    """One long easy prompt, one short hard one: 0.1 of tokens against 0.5 of prompts."""
    index = np.repeat([0, 1], [9, 1])
    sums = skip_risk_sums(SkipAtoms.of_drafts(np.zeros(10), (index == 1) * 1.0, index, 2))
    assert sums.curve()[1] == pytest.approx([0.1])
    assert sums.curve("prompts")[1] == pytest.approx([0.5])
    # Equal lengths: one and the same. A prompt without tokens counts for neither.
    score, beta = np.random.default_rng(4).uniform(size=(2, 60))
    index = np.repeat(np.arange(6), 10)
    sums = skip_risk_sums(SkipAtoms.of_drafts(score, beta, index, 7))
    np.testing.assert_allclose(sums.curve(), sums.curve("prompts"), atol=WORST)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["tokens", "prompts"]))
def test_curve_rises_and_ends_at_the_mean(seed, weighting):
    skip_rate, risk = skip_risk_sums(drafts(*random_trace(seed, 8, 12))).curve(weighting)
    assert np.all(np.diff(risk) >= -WORST)
    assert np.all(np.diff(skip_rate) > 0)
    assert skip_rate[-1] == pytest.approx(1, abs=WORST)
    assert skip_rate_at_risk(skip_rate, risk, 1.0) == pytest.approx(1, abs=WORST)


def test_default_grid_holds_every_choice():
    """The scores that occur are all the thresholds there are, thinned only past `most`."""
    atoms = drafts(*random_trace(5))
    found, fine = (skip_risk_sums(atoms, grid).curve() for grid in (None, np.linspace(0, 1, 5001)))
    for alpha in (0.005, 0.01, 0.02, 0.05):
        assert skip_rate_at_risk(*found, alpha) == pytest.approx(skip_rate_at_risk(*fine, alpha))
    score = np.random.default_rng(6).uniform(size=5_000)
    thinned = drafts(score, score, np.zeros(5_000, dtype=int), 1).quantiles(100)
    np.testing.assert_array_equal(thinned, np.sort(score)[49::50])


def test_skip_rate_at_risk_counts_nothing_where_nothing_fits():
    curve = skip_risk_sums(drafts(np.zeros(4), np.full(4, 0.5), np.arange(4), 4)).curve()
    assert skip_rate_at_risk(*curve, 0.1) == 0
    assert skip_rate_at_risk(*curve, 0.5) == 1


def test_conditional_mean_is_the_best_score():
    """(15): no other score skips more at the same risk; the reverse score is the worst."""
    rng = np.random.default_rng(7)
    kinds = rng.integers(12, size=6_000)  # what the device knows
    mean = rng.uniform(size=12)
    beta = mean[kinds]
    index = np.arange(6_000) % 40
    best_rate, best_risk = skip_risk_sums(drafts(mean[kinds], beta, index, 40)).curve()
    for order in itertools.chain(
        [np.argsort(mean)[::-1]], (rng.permutation(12) for _ in range(40))
    ):
        rank = np.empty(12)
        rank[order] = np.arange(12)
        rate, risk = skip_risk_sums(drafts(rank[kinds], beta, index, 40)).curve()
        # At every point of the other curve the best one, joined by lines, skips at least as much.
        reachable = np.interp(risk, np.append(0, best_risk), np.append(0, best_rate))
        assert np.all(reachable >= rate - WORST)


def test_estimates_are_means_over_tokens():
    """Value and clustered error at every threshold, as of the skipped tokens themselves."""
    score, beta, index, num_prompts = random_trace(10)
    grid = np.array([0.2, 0.6])
    skip_rate, risk = skip_risk_sums(drafts(score, beta, index, num_prompts), grid).estimates()
    for g, threshold in enumerate(grid):
        skipped = (score <= threshold).astype(float)
        for found, values in ((skip_rate[g], skipped), (risk[g], skipped * beta)):
            expected = mean_over_tokens(values, index, num_prompts)
            assert found.value == pytest.approx(expected.value, abs=WORST)
            assert found.standard_error == pytest.approx(expected.standard_error, abs=WORST)


def test_resamples_are_those_of_whole_prompts():
    """The matrix product against a loop over resamples with the very same draws."""
    sums = skip_risk_sums(drafts(*random_trace(11)), np.array([0.2, 0.6]))
    counts = resample_prompts(30, 50, np.random.default_rng(11))
    drawn = sums.resampled(counts)
    for row, (weights, risk) in enumerate(zip(counts.astype(float), drawn.rates()[1], strict=True)):
        expected = (weights @ sums.rejected) / (weights @ sums.num_tokens)
        np.testing.assert_allclose(risk, expected, atol=WORST)
        assert drawn.num_tokens[row] == weights @ sums.num_tokens


# --- averaging over the draft --------------------------------------------------------------------


def split_atoms(rng: np.random.Generator, num: int) -> tuple[SkipAtoms, SkipAtoms, np.ndarray]:
    """Atoms of 5 candidates a context; the draws of one draft each; x of each context."""
    x, y = rng.dirichlet(np.full(5, 0.6), size=(2, num))
    score = np.round(rng.uniform(size=(num, 5)), 1)
    index = np.arange(num) % 25
    whole = SkipAtoms.of_candidates(score, x, np.maximum(x - y, 0), index, 25)
    drawn = np.array([rng.choice(5, p=row) for row in x])
    at = (np.arange(num), drawn)
    beta = np.maximum(0.0, 1 - y[at] / x[at])
    return whole, drafts(score[at], beta, index, 25), x


def test_atoms_are_the_mean_over_drafts():
    """Skip rate and risk of draws scatter around the atoms' within four standard errors."""
    whole, drawn, _ = split_atoms(np.random.default_rng(20), 40_000)
    grid = np.array([0.15, 0.45, 0.95])
    exact, sampled = (skip_risk_sums(atoms, grid) for atoms in (whole, drawn))
    for found, expected in zip(sampled.curve(), exact.curve(), strict=True):
        # A mean of 40,000 values in [0, 1].
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(40_000))
    # What varies less has the shorter interval: the same contexts, the draft averaged out.
    for narrow, wide in zip(exact.estimates()[1], sampled.estimates()[1], strict=True):
        assert narrow.standard_error < 1.05 * wide.standard_error
    assert np.all(exact.rates()[1] <= 1)


def test_pieces_of_a_draft_are_the_draft():
    """Cutting every draft of mass 1 in three pieces changes nothing."""
    score, beta, index, num_prompts = random_trace(21)
    mass = np.random.default_rng(22).dirichlet(np.ones(3), size=len(score))
    pieces = SkipAtoms(
        np.repeat(score, 3),
        mass.reshape(-1),
        (mass * beta[:, None]).reshape(-1),
        np.repeat(index, 3),
        np.bincount(index),
    )
    whole, cut = (skip_risk_sums(a) for a in (drafts(score, beta, index, num_prompts), pieces))
    np.testing.assert_array_equal(whole.thresholds, cut.thresholds)
    np.testing.assert_allclose(whole.skipped, cut.skipped, atol=1e-10)
    np.testing.assert_allclose(whole.rejected, cut.rejected, atol=1e-10)


def test_pieces_without_mass_are_dropped():
    atoms = SkipAtoms([0.9, 0.1, 0.5], [1.0, 0.0, 1.0], [0.2, 0.0, 0.1], [0, 0, 0], [2])
    np.testing.assert_array_equal(atoms.score, [0.5, 0.9])
    np.testing.assert_array_equal(atoms.rejection, [0.1, 0.2])


def test_sequence_bound_holds_exactly():
    """(14) by enumeration: V = 3, T = 3, contexts are prefixes, every answer's probability."""
    rng = np.random.default_rng(9)
    for _ in range(20):
        laws: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, float]] = {}
        for length in range(3):
            for prefix in itertools.product(range(3), repeat=length):
                x, y = random_pair(rng, 3)
                sigma = (rng.uniform(size=3) < 0.5).astype(float)
                risk = float(rejection_risk(x, y, sigma))
                laws[prefix] = (output_law(FullDistribution(), x, y, sigma), y, risk)
        distance = expected = 0.0
        for answer in itertools.product(range(3), repeat=3):
            ours = theirs = 1.0
            for t in range(3):
                law, y, _ = laws[answer[:t]]
                ours, theirs = ours * law[answer[t]], theirs * y[answer[t]]
            distance += abs(ours - theirs) / 2
            expected += ours * sum(laws[answer[:t]][2] for t in range(3))
        assert distance <= expected + WORST


@pytest.mark.parametrize("model", ["boosting", "logistic"])
def test_learned_score_learns_the_conditional_mean(model):
    """E[beta | f] = f_0 here; the other feature is noise."""
    rng = np.random.default_rng(16)
    index = np.repeat(np.arange(60), 50)
    features = rng.uniform(size=(3_000, 2))
    mean = 1 / (1 + np.exp(-4 * (features[:, 0] - 0.5)))
    beta = np.clip(mean + 0.2 * rng.standard_normal(3_000), 0, 1)
    score = cross_fitted_score(features, beta, index, model, seed=3)
    assert np.corrcoef(score, mean)[0, 1] > 0.95
    assert 0 <= score.min() <= score.max() <= 1
    again = cross_fitted_score(features, beta, index, model, seed=3)
    np.testing.assert_array_equal(score, again)


@pytest.mark.parametrize("model", ["boosting", "logistic"])
def test_learned_score_does_not_know_its_own_prompt(model):
    """beta is a constant of the prompt, and a feature names the prompt: nothing can be learned.

    A score fitted on the same prompts would correlate almost perfectly (the trees) with beta.
    """
    rng = np.random.default_rng(17)
    index = np.repeat(np.arange(100), 30)
    beta = rng.uniform(size=100)[index]
    features = np.stack([index / 100, rng.uniform(size=3_000)], axis=1)
    score = cross_fitted_score(features, beta, index, model)
    by_prompt = np.array([score[index == i].mean() for i in range(100)])
    correlation = np.corrcoef(by_prompt, beta[::30])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(100)


def test_learned_score_of_certain_acceptance():
    index = np.repeat(np.arange(4), 5)
    features = np.random.default_rng(18).uniform(size=(20, 2))
    for model in ("boosting", "logistic"):
        np.testing.assert_allclose(
            cross_fitted_score(features, np.zeros(20), index, model, num_folds=2), 0, atol=WORST
        )


def test_logistic_fit_finds_the_coefficients():
    """beta is the very law of the model: coefficients come back but for the weak penalty."""
    rng = np.random.default_rng(19)
    features = rng.normal([2.0, -1.0], [0.5, 3.0], size=(20_000, 2))
    beta = 1 / (1 + np.exp(-(0.4 + 1.5 * features[:, 0] - 0.2 * features[:, 1])))
    fit = fit_logistic(features, beta)
    np.testing.assert_allclose(fit.coefficients / fit.scale, [1.5, -0.2], rtol=5e-3)
    np.testing.assert_allclose(fit.predict(features), beta, atol=2e-3)
    constant = fit_logistic(np.ones((5, 2)), np.full(5, 0.25))
    np.testing.assert_allclose(constant.predict(np.ones((1, 2))), 0.25, atol=1e-4)


def test_importing_stays_light():
    code = (
        "import sys, hlmtheory.learned_score, hlmtheory.guarantees; "
        "print(sorted({'torch', 'sklearn', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


HALF, TWO = np.full(2, 0.5), np.arange(2)
ATOMS = drafts(HALF, HALF, TWO, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rejection_risk(HALF, HALF, 3 * HALF), r"skip_probability = 1.5: allowed is \[0"),
        (lambda: rejection_risk(HALF, HALF, np.ones(3)), "skip_probability has"),
        (lambda: rejection_risk(HALF, HALF * np.nan, HALF), "y holds NaN"),
        (lambda: drafts(HALF, HALF + 1, TWO, 2), "rejection_prob = 1.5"),
        (lambda: drafts(HALF * np.nan, HALF, TWO, 2), "score holds NaN"),
        (lambda: drafts(HALF, HALF, TWO, 1), "prompt_index spans 0..1: allowed is 0"),
        (lambda: drafts(HALF, HALF[:1], TWO, 2), "give one entry a piece"),
        (lambda: drafts(HALF[:0], HALF[:0], TWO[:0], 2), "score is empty"),
        (lambda: SkipAtoms(HALF, HALF, HALF + 1, TWO, HALF), "rejection is above mass"),
        (lambda: SkipAtoms(HALF, -HALF, HALF, TWO, HALF), "mass = -0.5: allowed"),
        (lambda: SkipAtoms(HALF, HALF, HALF, TWO, TWO), "mass of prompt 0 sums to 0.5: allowed"),
        (lambda: skip_risk_sums(ATOMS, np.array([1.0, 0])), "thresholds fall"),
        (lambda: skip_risk_sums(ATOMS).curve("words"), "weighting = 'words'"),
        (lambda: cross_fitted_score(HALF[:, None], HALF, TWO, num_folds=3), "num_folds = 3"),
        (lambda: cross_fitted_score(HALF, HALF, TWO, num_folds=2), "give .N, F."),
        (lambda: cross_fitted_score(HALF[:, None], HALF, TWO, "svm", 2), "model = 'svm'"),
    ],
)
def test_refusals_name_argument_value_and_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
